"""Training steps compared: ours, the official U-ViT's and diffusers' backbones; and the memory that each takes."""

import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from steps import OURS, Official, Setting, build_step, eager, names
from timing import STEPS, Contender, Found, flops_of, interleave, matmul_peak, memory_now, memory_peak, note, rows_of


def measure(
    batch_size: int,
    rounds: int,
    precision: str,
    device: torch.device,
    checkout: Path | None,
    recipe: str,
    with_compiled: bool,
) -> list[Found]:
    """Tables of step times, and of the cost and gain of compilation."""
    with tempfile.TemporaryDirectory() as folder:
        official = None if checkout is None else Official(checkout)
        setting = Setting(batch_size, precision, Path(folder), official, recipe)
        # Operations are proportional to the number of images, so they are counted for a batch of two.
        few = replace(setting, batch_size=2, work=Path(folder) / "counted")
        few.work.mkdir()
        flops: dict[str, float] = {}
        contenders = []
        for name in names(setting, with_compiled):
            note(f"building: {name}")
            run = build_step(name, setting)
            if eager(name) == name:
                flops[name] = flops_of(build_step(name, few)) * batch_size / 2
            contenders.append(Contender(name, run, batch_size, flops[eager(name)]))
        timings = interleave(contenders, rounds, device, STEPS)
        peak = matmul_peak(precision, device)
        by_name = {timing.name: timing for timing in timings}
        title = f"Training step, {recipe} and networks of its size, batch {batch_size}, {precision}"
        caption = f"matrix products here reach {peak / 1e12:.3f} TFLOP/s in {precision}"
        return [
            Found(title, rows_of(timings, by_name[OURS], peak), timings, caption),
            *([Found("torch.compile: what it costs and gives", _compilation(by_name))] if with_compiled else []),
        ]


def measure_memory(
    batch_size: int,
    precision: str,
    checkout: Path | None,
    recipe: str,
    with_compiled: bool,
) -> list[Found]:
    """A table of the memory that a step takes."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(batch_size, precision, Path(folder), None if checkout is None else Official(checkout), recipe)
        title = f"Peak memory of a training step over what was held before, {recipe}, batch {batch_size}, {precision}"
        return [Found(title, _memory(setting, checkout, with_compiled))]


def _compilation(timings: dict) -> list[dict]:
    rows = []
    for name, timing in timings.items():
        if eager(name) != name:
            cost, gain = timing.first - timing.median, timings[eager(name)].median - timing.median
            pays = f"{cost / gain:,.0f}" if gain > 0 else "never"
            rows.append(
                {"what": name, "seconds to compile": cost, "seconds less a step": gain, "pays after steps": pays}
            )
    return rows


def _memory(setting: Setting, checkout: Path | None, with_compiled: bool) -> list[dict]:
    """Measures each step in a separate process, so that none inherits memory from another."""
    rows = []
    for name in [*names(setting, with_compiled), f"{OURS}, DIA-LSTM, checkpointing"]:
        note(f"memory: {name}")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            plain = replace(setting, official=None, work=setting.work / "memory")
            taken = pool.apply(peak_of_step, (name, plain, checkout))
        rows.append({"what": name, "MiB": round(taken / 2**20)})
    return rows


def peak_of_step(name: str, setting: Setting, checkout: Path | None) -> int:
    """Peak bytes of building a network and running two steps."""
    setting.work.mkdir(exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    official = None if checkout is None else Official(checkout)
    before = memory_now(device)
    step = build_step(name, replace(setting, official=official))
    for _ in range(2):
        step()
    return memory_peak(device) - before
