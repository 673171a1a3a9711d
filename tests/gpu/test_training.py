"""Training on a GPU: it synchronizes only to log, and all ways of computing a step give the same losses."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_diffusion.errors import InputError, Stopped
from dia_diffusion.training.classification import ClassificationTask
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.trainer import Trainer
from tests.gpu.conftest import DEVICE, ON_CPU, train
from tests.training import classify
from tests.training.conftest import Recorder
from tests.training.test_backbones import KWARGS

Tiny = Callable[..., Experiment]

QUIET = ["--train.log_every", "1000", "--train.checkpoint_every", "1000"]


def waiting_is_an_error(step: int) -> None:
    """Makes synchronization an error from step 5, when all kernels are loaded, to step 25."""
    if not ON_CPU and step in (5, 25):
        torch.cuda.set_sync_debug_mode("error" if step == 5 else "default")


@pytest.fixture
def waiting_allowed_again() -> object:
    yield
    if not ON_CPU:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train.mixed_precision", "bf16", "--train.accumulation", "2", "--train.clip_grad_norm", "1"],
        ["--model.num_classes", "10", "--data.label_dropout", "0.1", "--noise.loss_weighting", "min-snr"],
        [] if ON_CPU else ["--train.mixed_precision", "fp16"],
        ["--optimizer.name", "muon", "--train.mixed_precision", "bf16" if ON_CPU else "fp16"],
    ],
    ids=["float32", "bf16 in parts", "by class", "fp16", "muon"],
)
def test_no_step_waits_between_two_logs(options: list[str], tiny: Tiny, waiting_allowed_again: None) -> None:
    Trainer(tiny("run", *QUIET, "--train.max_steps", "30", *options), Recorder(waiting_is_an_error)).run()


def test_no_step_of_a_classification_waits(tmp_path: Path, waiting_allowed_again: None) -> None:
    options = [*QUIET, "--train.evaluate_every", "0", "--train.max_steps", "30", "--data.cutout", "2"]
    experiment = classify.tiny(tmp_path, "run", "--train.compile", "false", *options)
    Trainer(ClassificationTask(experiment), Recorder(waiting_is_an_error)).run()


@pytest.mark.parametrize("ways", [["true"], ["cuda-graphs"], ["true", "2"], ["cuda-graphs", "2"], ["false", "4"]])
def test_compiled_and_divided_steps_have_the_losses_of_plain_ones(ways: list[str], tiny: Tiny) -> None:
    if ON_CPU and "cuda-graphs" in ways:
        pytest.skip("CUDA graphs need a GPU")
    compile, accumulation = [*ways, "1"][:2]
    plain = train(tiny("plain"))
    try:
        other = train(tiny("other", "--train.compile", compile, "--train.accumulation", accumulation))
    except InputError as error:
        pytest.skip(f"refused: {error}")
    assert other == pytest.approx(plain, rel=1e-4)


def test_fp16_resumes_with_its_scaler(tiny: Tiny) -> None:
    precision = ["--train.mixed_precision", "bf16" if ON_CPU else "fp16", "--train.max_steps", "12"]
    whole = train(tiny("whole", *precision))

    def stop(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    part = tiny("part", *precision)
    with pytest.raises(Stopped):
        train(part, stop)
    assert train(part) == pytest.approx(whole, rel=1e-3), "a rounding of fp16 is 1e-3"
    scalers = [
        json.loads((Path(run) / "checkpoints" / "step-00000012" / "state.json").read_text())["grad_scaler"]
        for run in (part.output, tiny("whole").output)
    ]
    assert scalers[0] == scalers[1] and (ON_CPU or scalers[0]["_growth_tracker"] > 0)


@pytest.mark.parametrize("backbone", ["uvit", *KWARGS])
def test_recomputation_with_units_gives_the_same_losses(backbone: str, tiny: Tiny) -> None:
    options = ["--model.attention", "dia-lstm", "--train.max_steps", "4"]
    if backbone != "uvit":
        # The recipe's sizes are for a UViT; other backbones take theirs from backbone_kwargs.
        recipe = Path(tiny("plain").output).parent / "tiny.yaml"
        shape = f"model: {{backbone: {backbone}, sample_size: 8, in_channels: 1, backbone_kwargs: {KWARGS[backbone]}}}"
        lines = [shape if line.startswith("model:") else line for line in recipe.read_text().splitlines()]
        recipe.write_text("\n".join(lines))
    plain = train(tiny("plain", *options))
    again = train(tiny("again", *options, "--train.gradient_checkpointing", "true"))
    assert again == pytest.approx(plain, rel=1e-4)


def test_memory_is_flat_over_500_steps(tiny: Tiny) -> None:
    held: dict[int, int] = {}

    def note(step: int) -> None:
        if step in (50, 500):
            held[step] = memory()

    options = ["--train.log_every", "50", "--train.checkpoint_every", "500", "--train.mixed_precision", "bf16"]
    assert len(train(tiny("run", *options, "--train.max_steps", "500"), note)) == 10
    assert held[500] - held[50] <= (16 << 20 if ON_CPU else 0)


def memory() -> int:
    """Bytes held by tensors on the GPU; on a CPU, the memory of the process."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
