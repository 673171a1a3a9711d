"""The pages of docs/ and the README: their commands parse or run, their examples run, files and tests they name exist.

A block after `<!-- run -->` is executed, in one folder per page, after the page's earlier blocks; SHORT cuts training
to a few steps. A block after `<!-- run long -->` is executed by `pytest -m long`. The commands of all other blocks are
checked with the parsers.
"""

import gc
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from dia_diffusion.cli.main import COMMANDS, _parse, main
from dia_diffusion.registry import Registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}

LANGUAGES = {"bash", "python", "yaml", "text"}
SCRIPTS = {
    "train/train.py": "train",
    "train/classify.py": "classify",
    "sample/sample.py": "sample",
    "eval/fid.py": "fid",
    "eval/curves.py": "curves",
}
PLACEHOLDERS = {"RECIPE": "digits_uvit_cpu", "RANK": "0", "PROTOCOL": "fd-digits", "STEPS": "6"}
"""Placeholders for values that the parsers check; others, such as RUN and DATA, pass as paths."""
TRAIN = "--train.max_steps 6 --train.batch_size 4 --train.log_every 3 --train.checkpoint_every 3 --train.compile false"
SHORT = {
    "train": f"{TRAIN} --train.sample_every 6 --samples.count 4 --samples.steps 2 --optimizer.warmup_steps 0",
    "classify": f"{TRAIN} --train.evaluate_every 6 --optimizer.warmup_steps 0",
    "quickstart": "--steps 6",
    "sample": "--steps 2 --seeds 0-3",
}
"""Options appended to executed commands."""


class Block(NamedTuple):
    page: str
    line: int
    mark: str
    """"", "run" or "run long"."""
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    pattern = r"^(?:<!-- (run(?: long)?) -->\n+)?```([^\n`]*)\n(.*?)^```$"
    return [
        Block(page, TEXT[page][: match.start()].count("\n") + 1, match[1] or "", match[2], match[3])
        for match in re.finditer(pattern, TEXT[page], re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in TEXT for block in blocks_of(page)]


def commands_in(block: Block) -> Iterator[list[str]]:
    """The simple commands of a bash block, without assignments, shell keywords and redirections."""
    text = re.sub(r'\$[A-Z]+|"\$\{@[^}]*\}"', "", block.text.replace("\\\n", " "))  # these expand to several words
    text = re.sub(r"\$\{\w+\}|\$\w+", "0", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|()<>"):
                if words:
                    yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*|do|then|else|for|\{", word):
                words.append(word)


def arguments_of(words: list[str]) -> list[str] | None:
    """The arguments of dia-diffusion, also after a launcher; None for other programs."""
    if words[0] == "dia-diffusion":
        return words[1:]
    if words[0] in ("accelerate", "torchrun", "python"):
        for index, word in enumerate(words):
            if word in SCRIPTS:
                return [SCRIPTS[word], *words[index + 1 :]]
            if word == "dia_diffusion":
                return words[index + 1 :]
    return None


def write_file(block: Block, folder: Path) -> bool:
    """Writes a block that begins with a file name in a comment to that file; returns whether it does."""
    name = re.match(r"# (\w+\.(?:py|yaml))\b", block.text)
    if name is not None:
        (folder / name[1]).write_text(block.text)
    return name is not None


def test_blocks_say_their_language() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES or block.language.startswith("{"), f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", TEXT)
def test_commands_parse(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        write_file(block, tmp_path)
        place = f"{page}:{block.line}"
        if block.language == "python":
            compile(block.text, place, "exec")
        if block.language != "bash":
            continue
        for words in commands_in(block):
            arguments = arguments_of(words)
            if arguments is not None:
                arguments = [PLACEHOLDERS.get(word, word) for word in arguments]
                if "--help" not in arguments:
                    _parse(arguments[0], arguments[1:])
            elif words[0] == "python" and words[1].endswith(".py"):
                source = (ROOT / words[1]).read_text(encoding="utf-8")
                for option in words[2:]:
                    name = option.removeprefix("--").replace("-", "_")
                    known = f'"{option}"' in source or re.search(rf"\b{name}:", source)
                    assert not option.startswith("--") or known, f"{place}: {option}"


@pytest.mark.parametrize("page", TEXT)
def test_inline_commands_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in re.findall(r"`dia-diffusion ([^`]+)`", re.sub(r"\s+", " ", TEXT[page])):
        name, *rest = command.split()
        if name.startswith("-") or name in ("NAME", "COMMAND"):
            continue
        assert name in COMMANDS, command
        part = (
            rest[:1] if hasattr(importlib.import_module(f"dia_diffusion.cli.{name.replace('-', '_')}"), "PARTS") else []
        )
        if options := [word for word in rest if word.startswith("--")]:
            assert main([name, *part, "--help"]) == 0
            shown = capsys.readouterr().out
            assert all(option in shown or option == "--config" for option in options), command


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page: str) -> None:
    """Sphinx checks links between pages of docs/; this also checks the README's, and links to files and headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = ROOT / page if not name else ((ROOT / page).parent / name).resolve()
        assert file.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", TEXT)
def test_files_that_are_named_exist(page: str) -> None:
    folders = "dia_diffusion|tests|tools|bench|train|eval|sample|examples"
    for path in re.findall(rf"`((?:{folders})/[\w/.]*\w\.\w+)", TEXT[page]):
        assert (ROOT / path).exists(), path


def test_every_promise_names_tests_that_exist() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    functions = " ".join(re.findall(r"def (test_\w+)", " ".join(files.values())))
    rows = [line for line in TEXT["docs/guarantees.md"].splitlines() if re.match(r"\| (?!---|what)", line)]
    assert len(rows) > 25
    for row in rows:
        cells = row.strip()[1:-1].split("|")
        assert len(cells) == 3, f"three columns: {row}"
        named = re.findall(r"(test_\w+\*?)(\.py)?", cells[2])
        assert named or "tests/" in cells[2], row
        for name, ending in named:
            exists = f"{name}.py" in files if ending else re.search(rf"\b{name.replace('*', '[a-z]')}", functions)
            assert exists, f"{cells[0]}: there is no {name}{ending}"


RUNNABLE = [(page, mark) for page in TEXT for mark in ("run", "run long") if mark in {b.mark for b in blocks_of(page)}]


@pytest.mark.parametrize(
    ("page", "mark"),
    [pytest.param(page, mark, marks=pytest.mark.long if mark == "run long" else ()) for page, mark in RUNNABLE],
)
def test_blocks_run(
    page: str, mark: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
) -> None:
    folder = Path(shutil.copytree(stand_ins, tmp_path / "work"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks_of(page):
        place = f"{page}:{block.line}"
        if block.mark not in ("run", mark):
            continue
        if write_file(block, folder):
            continue
        if block.language == "python":
            exec(compile(block.text, place, "exec"), names)
        else:
            for words in commands_in(block):
                if words[0] == "dia-diffusion":
                    arguments = [PLACEHOLDERS.get(word, word) for word in words[1:]]
                    assert main([*arguments, *SHORT.get(words[1], "").split()]) == 0, f"{place}: {' '.join(words)}"
                    AcceleratorState._reset_state(True)


@pytest.mark.long
def test_slurm_script_requeues_until_the_training_has_finished(tmp_path: Path) -> None:
    """With stand-ins for scontrol and for srun, which passes its command and signals on."""
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_GPUS_ON_NODE": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    options = "--config digits_uvit_cpu_dia --output run --train.max_steps 300 --train.log_every 10"
    options += " --train.checkpoint_every 300 --train.sample_every 300 --samples.count 4"
    command = ["bash", str(ROOT / "examples/slurm.sh"), *options.split()]

    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **job, **path})
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    process.wait()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1  # at the step of the signal
    assert not (tmp_path / "run/checkpoints/step-00000300").exists()

    assert subprocess.run(command, cwd=tmp_path, env={**os.environ, **job, **path}).returncode == 0
    assert (tmp_path / "run/checkpoints/step-00000300").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.fixture
def registries() -> Iterator[None]:
    """Removes the rows that examples register."""
    tables = [table for table in gc.get_objects() if type(table) is Registry]
    rows = [dict(table._rows) for table in tables]
    yield
    for table, before in zip(tables, rows, strict=True):
        table._rows.clear()
        table._rows.update(before)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the pages assume: images in class folders, a quickstart, and a short protocol under a shipped name."""
    folder = tmp_path_factory.mktemp("docs")
    generator = np.random.default_rng(0)
    for index in range(12):
        name = folder / "IMAGES" / ("cats" if index % 2 else "dogs") / f"{index}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(name)
    (folder / "fd-digits").write_text(
        "features: digits\nnum_samples: 80\nsampler: dpmsolver++\nsteps: 2\nreference_split: test\n"
    )
    for unit, recipe in {"none": "digits_uvit_cpu", "dia-lstm-identity": "digits_uvit_cpu_dia_identity"}.items():
        run = folder / "quickstart" / unit
        assert main(["train", "--config", recipe, "--output", str(run), *SHORT["train"].split()]) == 0
        shutil.copytree(run / "pipelines/step-00000006", run / "pipelines/step-00004200")
        AcceleratorState._reset_state(True)
    return folder
