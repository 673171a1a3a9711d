"""Options from a typed model: parsed values, refused input and the help text."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from dia_diffusion.cli.options import Metavar, Positional, parse_options
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict


class Optimizer(Strict):
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay rates."""
    compile: Literal["auto", "graphs"] | bool = "auto"
    """Compile it."""


class Options(Strict):
    """Draws images."""

    source: Annotated[str, Positional("SOURCE")]
    """100 % of a folder."""
    others: Annotated[tuple[Path, ...], Positional("OTHER")]
    """Further ones."""
    batch_size: int = Field(64, ge=1)
    """Images per pass."""
    scale: float = 1.0
    """Of guidance."""
    channels: Literal[1, 3] = 3
    """Of images."""
    number: int | None = Field(None, alias="class")
    """A class."""
    classes: list[int] | None = None
    """Of images."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments."""
    out: Annotated[Path | None, Metavar("FILE.png")] = None
    """The figure."""
    yes: bool = False
    """Don't ask."""
    optimizer: Optimizer = Optimizer()
    """A section."""


def test_text_becomes_the_values_of_the_model() -> None:
    line = "007 a b --class -3 --batch-size 010 --yes --scale 1e-3 --channels 1 --out=x.png --optimizer.betas [0,1]"
    options = parse_options(Options, [*line.split(), "--kwargs", "{reduction: 8}", "--classes", "3, 4"], "draw")
    assert options.model_dump(by_alias=True) == {
        "source": "007",
        "others": (Path("a"), Path("b")),
        "batch_size": 10,
        "scale": 1e-3,
        "channels": 1,
        "class": -3,
        "classes": [3, 4],
        "kwargs": {"reduction": 8},
        "out": Path("x.png"),
        "yes": True,
        "optimizer": {"betas": [0.0, 1.0], "compile": "auto"},
    }
    assert "batch_size" in options.model_fields_set


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 0", "`--batch-size` must be 1 or more, got 0"),
        ("--batch-size many", "`--batch-size` must be a whole number, got 'many'"),
        ("--batch-size 1.5", "`--batch-size` must be a whole number, got '1.5'"),
        ("--scale nan", "`--scale` must be a finite number, got nan"),
        ("--channels 2", "`--channels` must be one of 1, 3, got '2'"),
        ("--class", "`--class` needs one argument"),
        ("--class x", "`--class` must be a whole number, got 'x'"),
        ("--classes 1,x", "each of `--classes` must be a whole number, got 'x'"),
        ("--kwargs 8", "`--kwargs` must be a mapping, got 8"),
        ("--optimizer.betas [1]", "`--optimizer.betas` must be a list of 2 or more, got [1]"),
        ("--optimizer.betas [1,yes]", "each of `--optimizer.betas` must be a number, got True"),
        ("--optimizer.compile c", "`--optimizer.compile` must be one of auto, graphs or true or false, got 'c'"),
        ("--batchsize 2", "unknown option `--batchsize`; did you mean `--batch-size`?"),
        ("--batch 2", "unknown option `--batch`; did you mean `--batch-size`?"),
    ],
)
def test_what_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_options(Options, ["source", "other", *arguments.split()], "draw")
    assert str(error.value) == message


def test_what_is_missing() -> None:
    with pytest.raises(InputError, match="`OTHER` is missing"):
        parse_options(Options, ["source"], "draw")


def test_help_has_docstrings_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(Options, ["--help"], "draw")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and text.startswith("usage: dia-diffusion draw")
    for part in (
        "Draws images.",
        "SOURCE 100 % of a folder.",
        "Images per pass. (default: 64)",
        "--channels {1,3} Of images. (default: 3)",
        "--out FILE.png The figure.",
        "--yes Don't ask.",
        "Decay rates. (default: 0.9,0.999)",
    ):
        assert part in text
