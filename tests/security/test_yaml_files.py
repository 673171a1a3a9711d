"""Recipes, studies, protocols and a run's config.yaml: tags are never obeyed, aliases never expanded without bound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_diffusion.analysis.run import open_run
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.reading import Unreadable, parse_yaml
from dia_diffusion.report.subjects import run_page
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from tests.security.hostile import put_json, yaml_texts
from tests.security.watch import Sandbox, check_line

READERS: dict[str, Callable[[Path], Any]] = {
    "recipe": lambda file: read_experiment(str(file)),
    "classifier's recipe": lambda file: read_experiment(str(file), kind=ClassifyExperiment),
    "study": lambda file: read_study(str(file)),
    "protocol": lambda file: EvalProtocol.read(str(file)),
    "run": lambda file: open_run(file.parent),
    "page": lambda file: run_page(file.parent),
}
KINDS = [*yaml_texts(Path("nowhere")), "pipe", "folder", "device", "gigabytes"]
# Valid YAML and valid recipes that change nothing.
EMPTY = ("nothing",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_hostile_yaml_is_refused(name: str, kind: str, sandbox: Sandbox) -> None:
    file = sandbox.folder / "config.yaml"
    if kind in ("pipe", "folder", "device", "gigabytes"):
        put_json(file, kind)
    else:
        file.write_bytes(yaml_texts(sandbox.marker)[kind])
    sandbox.refused(lambda: READERS[name](file))


WRONG = ["[]", "{}", "x", "-1", "1.5", "1e400", ".nan", "null", "true", "[[]]", "{a: {b: 1}}", "9" * 400, "2020-01-01"]
KEYS = [
    "output",
    "seed",
    "data",
    "data.source",
    "model",
    "model.hidden_size",
    "model.attention_kwargs",
    "model.attention_blocks",
    "train.batch_size",
    "train.compile",
    "optimizer.betas",
    "optimizer.learning_rate",
    "ema.decay",
    "samples.guidance_scale",
    "trackers",
]


@pytest.mark.parametrize("key", KEYS)
def test_values_of_other_types_are_refused_or_mean_something(key: str, sandbox: Sandbox) -> None:
    section, _, inner = key.rpartition(".")
    for value in WRONG:
        text = f"{section}: {{{inner}: {value}}}" if section else f"{inner}: {value}"
        file = sandbox.folder / "recipe.yaml"
        file.write_text(text)
        try:
            read_experiment(str(file))
        except InputError as error:
            check_line(str(error))


def test_aliases_that_stay_small_are_welcome() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}


@pytest.mark.parametrize(
    "text", ["[" * 70 + "]" * 70, "&a [*a]", "x" * ((1 << 20) + 1)], ids=["deep", "endless", "long"]
)
def test_errors_say_which_bound_is_exceeded(text: str) -> None:
    with pytest.raises(Unreadable, match="more than"):
        parse_yaml(text)
