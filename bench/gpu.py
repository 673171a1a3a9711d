"""`python bench/gpu.py`: all GPU measurements, in pieces of a few minutes, as tables and figures.

Each call runs for at most --minutes and resumes where the last one stopped, until all tasks are done:

    test_...      the files of tests/gpu
    before-train  the suite train of bench/run.py
    study         twins of a study, for as many steps as fit in --training-minutes, with distances along the way
    before-...    the other suites of bench/run.py
    after-...     the suites train and sample again: any change since `before` is due to the machine

OUT/gpu.md and its figures are rewritten after each call. Exit codes: 0 done, 3 more to do, 2 can't be run.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dia_diffusion.errors import InputError
from dia_diffusion.io import write_json, write_text
from dia_diffusion.sweeps.sweep import Study, read_study

ROOT = Path(__file__).parents[1]
SUITES = "train,overhead,sample,memory,fid"  # without scale: on a GPU its small networks only time kernel launches
AFTER = ("train", "sample")
SECONDS_TO_STOP = 45
"""Reserved for the checkpoint after SIGTERM and for writing the page."""
ROUND_STEPS = 100
MORE_TO_DO = 3


@dataclass(frozen=True)
class Task:
    """A command. If time runs out, one that can resume does so in the next piece; others start again in a whole one."""

    name: str
    command: list[str]
    resumable: bool = False


@dataclass
class State:
    """Progress, kept in OUT/state.json."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A task's name -> its seconds and exit code; the code is null if it took longer than a whole piece."""
    steps: int | None = None
    """Steps of the study's runs, once they are decided."""


def main() -> int:
    """Runs one piece."""
    options = _parser().parse_args()
    options.out = options.out.resolve()  # the tasks run in the checkout
    deadline = time.monotonic() + 60 * options.minutes - SECONDS_TO_STOP
    try:
        if options.minutes * 60 <= 2 * SECONDS_TO_STOP:
            raise InputError(f"--minutes must be above {2 * SECONDS_TO_STOP / 60:g}, got {options.minutes:g}")
        options.out.mkdir(parents=True, exist_ok=True)
        state = _read(options.out)
        left = _work(options, state, deadline)
    except InputError as error:
        print(f"bench/gpu.py: error: {error}", file=sys.stderr)
        return 2
    page = write_page(options.out, state.done)
    print(f"{page}: {f'left: {left}; the same command resumes' if left else 'all done'}")
    return MORE_TO_DO if left else 0


def _work(options: argparse.Namespace, state: State, deadline: float) -> str:
    """Runs tasks until time is up, and returns the names of the remaining ones."""
    names = _names(options)
    fresh = True  # nothing has run in this piece yet
    for name in names:
        if name in state.done:
            continue
        task = _task(name, options, state)
        seconds, code = _run(task, options.out, deadline)
        if code is None and (task.resumable or not fresh):
            break
        state.done[name] = {"seconds": round(seconds, 1), "code": code}
        write_json(options.out / "state.json", asdict(state))
        fresh = False
        if code is None:
            break
    return ", ".join(name for name in names if name not in state.done)


def _names(options: argparse.Namespace) -> list[str]:
    suites = [suite for suite in options.suites.split(",") if suite]
    sizes = options.batch_sizes.split(",")

    def measured(when: str, chosen: list[str]) -> list[str]:
        by_size = ("train", "overhead")
        return [
            f"{when}-{suite}{f'-b{size}' if suite in by_size else ''}"
            for suite in chosen
            for size in (sizes if suite in by_size else sizes[:1])
        ]

    first, rest = ([suite for suite in suites if (suite == "train") is train] for train in (True, False))
    after = [suite for suite in suites if suite in AFTER]
    tests = [] if options.no_tests else [file.stem for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))]
    return [*tests, *measured("before", first), "study", *measured("before", rest), *measured("after", after)]


def _task(name: str, options: argparse.Namespace, state: State) -> Task:
    if name.startswith("test_"):
        file = ROOT / "tests" / "gpu" / f"{name}.py"
        return Task(name, [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs", str(file)])
    if name == "study":
        place = _write_study(options, state)
        return Task(name, [sys.executable, "-m", "dia_diffusion", "curves", str(place)], resumable=True)
    suite, _, size = name.partition("-")[2].partition("-b")
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--suite", suite, "--device", options.device]
    command += ["--batch-size", size or options.batch_sizes.split(",")[0], "--name", name, "--out", str(options.out)]
    command += [] if options.uvit_repo is None else ["--uvit-repo", str(options.uvit_repo)]
    return Task(name, command + shlex.split(options.bench_options))


def _run(task: Task, out: Path, deadline: float) -> tuple[float, int | None]:
    """Seconds and exit code, or None if time ran out first. The output goes to OUT/NAME.log."""
    started = time.monotonic()
    if deadline <= started:
        return 0.0, None
    print(f"{task.name}: {shlex.join(task.command)}", flush=True)
    # Keeps torch.compile's cache for the next piece, even on a new machine.
    environment = {"TORCHINDUCTOR_CACHE_DIR": str((out / "compiled").resolve()), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (out / f"{task.name}.log").open("a") as log:
        process = subprocess.Popen(
            task.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(deadline - started)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGTERM)  # a study has its runs write a checkpoint and stops them
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP / 2)
        finally:
            _end_group(process)
    return time.monotonic() - started, code


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the remaining processes of a task, including those it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_study(options: argparse.Namespace, state: State) -> Path:
    """Writes OUT/twins.yaml: the study with the chosen units, its first seed, and as many steps as fit."""
    place = options.out.resolve() / "twins.yaml"
    study = read_study(options.study)
    if state.steps is None:
        state.steps = options.steps or _fitting_steps(options, study)
    values = study.config.model_dump()
    if options.units:
        grid = values["runs"][0]
        values["runs"] = [{**grid, "units": options.units.split(","), "seeds": grid["seeds"][:1]}]
    values |= {"output": str(place.parent / "study"), "steps": state.steps, "images": None}
    if options.data is not None:
        values["overrides"] = {**values["overrides"], "data.source": str(options.data)}
    write_text(place, yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    write_json(options.out / "state.json", asdict(state))
    return place


def _fitting_steps(options: argparse.Namespace, study: Study) -> int:
    """Steps per run so that all runs together take --training-minutes, by the timings of the suite train; at most
    the study's own."""
    size = options.batch_sizes.split(",")[0]
    file = options.out / f"before-train-b{size}.json"
    most = study.runs[0].experiment.train.max_steps
    if not file.is_file():
        return most
    rows = json.loads(file.read_text())["tables"][0]["figures"]
    own = [row["seconds"] for row in rows if row["what"] == "dia-diffusion, DIA-LSTM, compiled"]
    seconds = own[0] if own else rows[0]["seconds"]
    runs = len(options.units.split(",")) if options.units else len(study.runs)
    fitting = int(60 * options.training_minutes / runs / seconds)
    whole = ROUND_STEPS * study.config.points
    return min(most, max(whole, fitting // whole * whole))


def _read(out: Path) -> State:
    file = out / "state.json"
    return State(**json.loads(file.read_text())) if file.is_file() else State()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench/gpu.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of everything, to be kept between calls")
    add("--minutes", type=float, default=9.0, help="of a call, at the most")
    add("--training-minutes", type=float, default=20.0, help="of the study's runs together, without their distances")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--data", help="the study's images; the recipe's own, which are downloaded, if none")
    add("--uvit-repo", type=Path, metavar="PATH", help="a checkout of github.com/baofff/U-ViT")
    add("--suites", default=SUITES, help="of bench/run.py, separated by commas")
    add("--batch-sizes", default="32,128", help="of the suites train and overhead; the others take the first")
    add("--bench-options", default="", help='more for bench/run.py, such as "--rounds 3"')
    add("--study", default="cifar10_fig8_short", help="a study by name or file")
    add("--units", default="none,dia-lstm", help="the study's units, separated by commas; an empty text takes its own")
    add("--steps", type=int, help="of the study's runs; as many as fit, if none")
    add("--no-tests", action="store_true", help="leave out tests/gpu")
    return parser


ENDS = {0: "done", None: "took more than a whole piece", 5: "no tests"}
FIGURES = ("curves.png", "final.png")


def write_page(out: Path, done: dict[str, dict[str, Any]]) -> Path:
    """Writes OUT/gpu.md from the tasks' files in OUT.

    done: a task's name -> its seconds and exit code.
    """
    measured = {name: json.loads(file.read_text()) for name in done if (file := out / f"{name}.json").is_file()}
    parts = [_machine(measured), _tasks(out, done)]
    for name, suite in measured.items():
        for table in suite["tables"]:
            if name.startswith("after-") and not table["timings"]:
                continue  # compilation, which takes its kernels from the cache by now
            parts.append(f"## {name}: {table['title']}")
            parts.append(_timings(name, table, measured) if table["timings"] else _rows(table["figures"]))
            parts += [table["note"]] if table["note"] else []
        if (out / f"{name}.png").is_file():
            parts.append(f"![{name}]({name}.png)")
    results = out / "study" / "results.md"
    if results.is_file():
        parts += ["## Study", results.read_text().strip()]
        parts += [f"![{name}](study/{name})" for name in FIGURES if (out / "study" / name).is_file()]
    write_text(out / "gpu.md", "\n\n".join(parts) + "\n")
    return out / "gpu.md"


def _machine(measured: dict[str, Any]) -> str:
    if not measured:
        return "# Measured on a GPU\n\nNothing yet."
    suite = list(measured.values())[-1]
    rows = {"processor": suite["processor"], "precision": suite["precision"], **suite["environment"]}
    if "gpu" in suite:
        rows |= {"CUDA": suite["gpu"]["cuda"], "clocks": " / ".join(suite["gpu"]["clocks"].splitlines())}
    lines = [f"- {name}: {value}" for name, value in rows.items()]
    return "\n".join([f"# Measured on {suite['environment']['device']}", "", *lines])


def _tasks(out: Path, done: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, task in done.items():
        log = out / f"{name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        ended = ENDS.get(task["code"], f"exit code {task['code']}")
        said = "".join(last).replace(f"{out.resolve()}/", "")  # paths are this machine's own
        rows.append({"task": name, "seconds": task["seconds"], "ended": ended, "last line": said})
    return _rows(rows) if rows else "No task has been done."


def _timings(name: str, table: dict[str, Any], measured: dict[str, Any]) -> str:
    """Median and range of each contender's seconds, and the figures that the suite derived from them."""
    earlier = _medians(measured.get(name.replace("after-", "before-"))) if name.startswith("after-") else {}
    rows = []
    for timing, figures in zip(table["timings"], table["figures"], strict=True):
        seconds = sorted(timing["seconds"])
        row = {
            "what": timing["name"],
            "median, ms": 1000 * figures["seconds"],
            "lowest to highest": f"{1000 * seconds[0]:.4g} to {1000 * seconds[-1]:.4g}",
            "rounds x runs": f"{len(seconds)} x {timing['block']}",
        }
        row |= {key: value for key, value in figures.items() if key not in ("what", "seconds")}
        if before := earlier.get((table["title"], timing["name"])):
            row["time / before's"] = figures["seconds"] / before
        rows.append(row)
    return _rows(rows)


def _medians(suite: dict[str, Any] | None) -> dict[tuple[str, str], float]:
    tables = [] if suite is None else [table for table in suite["tables"] if table["timings"]]
    return {(table["title"], row["what"]): row["seconds"] for table in tables for row in table["figures"]}


def _rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; numbers to four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
