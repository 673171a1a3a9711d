"""Sampling compared: our Euler-Maruyama and the official U-ViT's; and the network's share of our loop's time."""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from steps import OFFICIAL, OURS, Official
from timing import DTYPES, Contender, Found, interleave, note, rows_of

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SAMPLERS, SamplingSettings

ATTENTIONS = {OURS: None, f"{OURS}, DIA-LSTM": "dia-lstm", f"{OURS}, Light": "dia-lstm-light"}
START_STEPS = 1
SHARE_IMAGES = 8


def measure(
    batch_size: int,
    rounds: int,
    steps: int,
    precision: str,
    device: torch.device,
    checkout: Path | None,
) -> list[Found]:
    """Tables of seconds per batch, of the network's share of each sampler's loop, and of the command's start-up."""
    seeds = list(range(batch_size))
    contenders = []
    for name, attention in ATTENTIONS.items():
        drawn = partial(_draw, pipeline_of(attention, precision, device), seeds, steps)
        contenders.append(Contender(name, drawn, batch_size))
    if checkout is not None:
        theirs = Official(checkout).sampler(precision, device)
        noise = torch.randn(batch_size, 3, 32, 32, device=device)
        contenders.append(Contender(OFFICIAL, partial(theirs, noise, steps), batch_size))
    timings = interleave(contenders, rounds, device)
    title = f"Sampling, U-ViT-S/2, Euler-Maruyama of {steps} steps, batch {batch_size}, {precision}"
    return [
        Found(title, rows_of(timings, timings[0]), timings),
        Found(
            f"The network's share of the sampling loop, U-ViT-S/2, batch {SHARE_IMAGES}",
            _shares(steps, precision, device),
        ),
        Found("`dia-diffusion sample` of 4 images, 1 step, tiny network: the whole process", _start(rounds)),
    ]


def pipeline_of(attention: str | None, precision: str, device: torch.device) -> UViTPipeline:
    """An untrained U-ViT-S/2 that samples by Euler-Maruyama."""
    network = UViT(attention=attention).to(device, DTYPES[precision])
    return UViTPipeline(network.eval(), _scheduler())


def _scheduler() -> EulerMaruyamaScheduler:
    return EulerMaruyamaScheduler.from_config(NoiseProcess().scheduler_config())


def _draw(pipeline: UViTPipeline, seeds: list[int], steps: int, sampler: str = OWN_SAMPLER) -> None:
    for _ in generate(adapt_pipeline(pipeline, SamplingSettings(sampler, steps)), seeds, batch_size=len(seeds)):
        pass


def _shares(steps: int, precision: str, device: torch.device) -> list[dict]:
    """The network's share for each sampler. Not measured on a GPU, where its calls are asynchronous."""
    if device.type != "cpu":
        return [{"what": "not measured on a GPU", "% in the network": "-"}]
    pipeline, rows = pipeline_of("dia-lstm", precision, device), []
    clock = _Clock(pipeline.unet)
    for name in SAMPLERS:
        note(f"share of the loop: {name}")
        clock.seconds = 0.0
        started = time.perf_counter()
        _draw(pipeline, list(range(SHARE_IMAGES)), max(steps, 7), name)
        whole = time.perf_counter() - started
        rows.append({"what": name, "% in the network": 100 * clock.seconds / whole})
    return rows


class _Clock:
    """Adds up the seconds of a network's calls."""

    def __init__(self, network: torch.nn.Module):
        self.seconds, self.started = 0.0, 0.0
        network.register_forward_pre_hook(self._start)
        network.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started


def _start(rounds: int) -> list[dict]:
    """Seconds of whole processes, without the first, which may have to read from disk."""
    with tempfile.TemporaryDirectory() as folder:
        network = UViT.from_size("tiny/4", sample_size=16)
        UViTPipeline(network, _scheduler()).save_pretrained(folder)
        command = [sys.executable, "-m", "dia_diffusion", "sample", folder, "--seeds", "0-3"]
        command += ["--steps", str(START_STEPS), "--grid", f"{folder}/grid.png"]
        rows = []
        for name, words in {"sample": command, "sample --help": [*command[:4], "--help"]}.items():
            seconds = []
            for _ in range(rounds + 1):
                note(f"start: {name}")
                started = time.perf_counter()
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - started)
            rows.append({"what": name, "seconds": median(seconds[1:]), "lowest": min(seconds[1:])})
        return rows
