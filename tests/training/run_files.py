"""What a run has left, for comparisons."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dia_diffusion.training.run_folder import read_metrics

TIMES = {"images_per_second", "peak_memory_mib"}


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run / "metrics.jsonl")]


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")
