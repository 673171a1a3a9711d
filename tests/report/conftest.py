"""Hand-written runs with known numbers, and a parser that reads their pages as a browser would."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_diffusion.evaluation.record import append_record
from dia_diffusion.sampling.writers import save_grid
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder
from tests.evaluation.conftest import record
from tests.training.conftest import TINY

__all__ = ["record"]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run(folder, overrides, records, steps) writes a run of the tiny recipe."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def write(folder: Path, overrides: Sequence[str] = (), records: Sequence[Any] = (), steps: Any = (3, 6)) -> Path:
        experiment = read_experiment(str(tmp_path / "tiny.yaml"), ["--output", str(folder), *overrides])
        return write_run_of(experiment, records, steps)

    return write


def write_run_of(experiment: Experiment, records: Sequence[Any] = (), steps: Sequence[int] = (3, 6)) -> Path:
    """A run that was trained to the last of these steps and drew a grid at each of them."""
    run, batch_size = RunFolder(experiment.output), experiment.train.batch_size
    run.path.mkdir(parents=True)
    run.write_config(experiment)
    lines = []
    for step in range(1, max(steps, default=0) + 1):
        values = {"loss": 1 / (step + experiment.seed), "grad_norm": 2.0 / step, "lr": 1e-3 * step}
        cost = {"images_per_second": 16.0, "peak_memory_mib": 100 + step}
        lines.append(json.dumps({"step": step, "images": step * batch_size, **values, **cost}) + "\n")
    run.metrics.write_text("".join(lines))
    for step in steps:
        noise = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
        save_grid(noise, run.samples / f"step-{step:08d}.png", min_size=32)
    for each in records:
        append_record(run.evaluations, each)
    return run.path


@dataclass
class Parsed(HTMLParser):
    """A page as a browser reads it: its tags, the addresses it would load, the plots' JSON, and the text."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    styles: str = ""
    plots: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    """Caption -> rows of cells, header first."""

    def __post_init__(self) -> None:
        super().__init__()
        self._inside = [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        loading = ("src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href")
        self.loaded += [attributes[name] or "" for name in loading if name in attributes]
        self.styles += attributes.get("style") or ""
        if tag == "table":
            self.tables[attributes["aria-label"] or ""] = []
        if tag == "tr":
            self.tables[[*self.tables][-1]].append([])
        if tag in ("th", "td"):
            self._inside.append("cell")
            self.tables[[*self.tables][-1]][-1].append("")
        if tag in ("script", "style"):
            self._inside.append(attributes.get("type") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "th", "td"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        match self._inside[-1]:
            case "application/json":
                self.plots.append(json.loads(data))
            case "style":
                self.styles += data
            case "cell":
                self.text += data
                self.tables[[*self.tables][-1]][-1][-1] += data
            case "":
                self.text += data

    def traces(self, name: str) -> list[dict[str, Any]]:
        """The traces with this name, from all plots."""
        return [trace for plot in self.plots for trace in plot["data"] if trace.get("name") == name]


def parse(html: str) -> Parsed:
    """A page as a browser reads it."""
    parsed = Parsed()
    parsed.feed(html)
    parsed.close()
    return parsed
