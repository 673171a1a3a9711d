"""The analyses on a run of an attached network of diffusers, whose units are one a stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_diffusion.analysis.correlation import correlations_of_run
from dia_diffusion.analysis.gradients import gradients_of_run
from dia_diffusion.analysis.run import Coverage, open_runs
from dia_diffusion.cli.main import main
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder

TINY_UNET = """
seed: 0
data: {source: digits}
model:
  backbone: unet2d
  sample_size: 8
  in_channels: 1
  backbone_kwargs:
    block_out_channels: [8, 16]
    layers_per_block: 1
    down_block_types: [DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D]
    norm_num_groups: 4
train: {batch_size: 8, max_steps: 2, mixed_precision: none, log_every: 1, checkpoint_every: 2, sample_every: 0}
optimizer: {learning_rate: 0.05, warmup_steps: 0}
"""


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_unet("dia-lstm") is the folder of a UNet's run with a pipeline of step 2."""
    folder = tmp_path_factory.mktemp("unets")
    (folder / "tiny.yaml").write_text(TINY_UNET)

    def make(unit: str) -> Path:
        if not (folder / unit).exists():
            overrides = ["--output", str(folder / unit), "--model.attention", unit]
            Trainer(read_experiment(str(folder / "tiny.yaml"), overrides), Recorder()).run()
        return folder / unit

    return make


def test_stages_follow_the_channels_in_order_of_execution(tiny_unet: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_unet("block-channels")])
    (step,) = correlations_of_run(run, [2], Coverage(3, 2))["steps"]
    # Down: 8 and 16 channels, the middle's two blocks and the first up's two 16, the last up's two 8.
    assert [(stage["channels"], len(stage["blocks"])) for stage in step["stages"]] == [(8, 1), (16, 5), (8, 2)]
    scale = run.model(2).unit[1].scale.detach().double()
    pairs = torch.corrcoef(scale)[tuple(torch.triu_indices(5, 5, 1))]
    assert step["stages"][1]["maps"]["mean"] == pytest.approx(float(pairs.mean()), abs=1e-3)
    assert step["stages"][0]["maps"]["mean"] is None  # one block makes no pair


def test_gradients_with_and_without_unit_are_at_the_same_blocks(tiny_unet: Callable[[str], Path]) -> None:
    records = [gradients_of_run(run, num_batches=2) for run in open_runs([tiny_unet("none"), tiny_unet("dia-lstm")])]
    with_unit, without = ([step["blocks"] for step in record["steps"]] for record in records)
    for a, b in zip(with_unit, without, strict=True):
        assert [block["block"] for block in a] == [block["block"] for block in b]
        assert [block["elements"] for block in a] == [block["elements"] for block in b] and a[0]["mean"] != b[0]["mean"]


def test_the_commands_draw_them(tiny_unet: Callable[[str], Path], tmp_path: Path) -> None:
    few = ["--out", str(tmp_path), "--images", "3", "--times", "2"]
    for name in ("maps", "ablations"):
        assert main(["analyze", name, str(tiny_unet("dia-lstm")), *few, "--steps", "2"]) == 0
        assert (tmp_path / f"{name}.png").is_file()
