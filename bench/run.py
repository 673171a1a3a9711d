"""`python bench/run.py`: speed side by side with peers, in one interleaved run; a table, JSON and a figure."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import Found, console, note, save, show

from dia_diffusion.cli.env import cpu_model
from dia_diffusion.environment import environment, keep_freed_memory
from dia_diffusion.errors import InputError
from dia_diffusion.precision import DTYPES, Precision, best_precision

SUITES = ("train", "memory", "sample", "fid", "scale", "overhead", "attention")


def main() -> int:
    """Runs the requested suites. Exit codes: 0, or 2 if something can't be run."""
    options = _parser().parse_args()
    try:
        device = _device(options.device)
        precision = _precision(options.precision, device)
        options.precision = precision.name
        note(str(precision))
        if device.type == "cpu":
            keep_freed_memory()  # as the package's commands do
        for suite in [options.suite] if options.suite else SUITES:
            tables = _measure(suite, options, device)
            for found in tables:
                show(found)
            about = {"suite": suite, "precision": str(precision), **_about(options, device)}
            path = options.out / (options.name or f"{suite}-{device.type}")
            save(tables, about, path)
            console.print(f"{path}.json")
    except InputError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench/run.py", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="all of them if none")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, if none")
    parser.add_argument("--uvit-repo", type=Path, metavar="PATH", help="a checkout of github.com/baofff/U-ViT")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--sampler-steps", type=int, default=5, help="of the suite sample")
    parser.add_argument("--images", type=int, default=256, help="of the suite fid")
    parser.add_argument(
        "--precision", choices=("auto", *DTYPES), default="auto", help="of autocast; auto: what the device has"
    )
    parser.add_argument("--recipe", default="cifar10_uvit_s2", help="of train and memory; others have no peers")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes of the steps")
    parser.add_argument("--name", help="of the files in it; the suite and the device if none")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"), help="folder of the JSON and figures")
    return parser


def _measure(suite: str, options: argparse.Namespace, device: torch.device) -> list[Found]:
    """Imports only the suite that runs, since their dependencies differ."""
    batch, rounds, precision = options.batch_size, options.rounds, options.precision
    compiled = not options.no_compile
    if suite == "train":
        import train

        return train.measure(batch, rounds, precision, device, options.uvit_repo, options.recipe, compiled)
    if suite == "memory":
        import train

        return train.measure_memory(batch, precision, options.uvit_repo, options.recipe, compiled)
    if suite == "sample":
        import sample

        return sample.measure(batch, rounds, options.sampler_steps, precision, device, options.uvit_repo)
    if suite == "fid":
        import fid

        return fid.measure(options.images, rounds, device)
    if suite == "scale":
        import scale

        return scale.measure(rounds, precision)
    if suite == "attention":
        import attention

        return attention.measure(rounds, precision, device)
    import overhead

    return overhead.measure(batch, rounds, precision, device)


def _device(name: str | None) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("`--device` must be cpu without a CUDA GPU, got cuda")
    if name == "cpu" and there:
        raise InputError(
            "`--device` must be cuda where there is a CUDA GPU, got cpu; CUDA_VISIBLE_DEVICES= hides the GPU"
        )
    return torch.device("cuda" if there else "cpu")


def _precision(name: str, device: torch.device) -> Precision:
    """The precision of this name; "auto" is what the device multiplies natively."""
    if name == "fp16" and device.type != "cuda":
        raise InputError("`--precision` must be auto, bf16 or none without a CUDA GPU, got fp16")
    return best_precision(device) if name == "auto" else Precision(name, "by --precision")


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures depend on in addition to the code."""
    about: dict[str, Any] = {
        "environment": environment(),
        "processor": f"{cpu_model()}, {best_precision(torch.device('cpu')).reason}",
    }
    # Paths mean nothing on another machine.
    about |= {"options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)}}
    if device.type == "cuda":
        about["gpu"] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "clocks": _gpu_clocks()}
    return about


def _gpu_clocks() -> str:
    """Current and maximum clocks of the multiprocessors and the memory, from nvidia-smi."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,driver_version"
    try:
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
