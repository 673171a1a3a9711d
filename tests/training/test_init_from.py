"""Runs that start from other weights: which weights are loaded, what may differ, and how such runs resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dia_diffusion.errors import InputError
from dia_diffusion.io import sha256_of_file
from dia_diffusion.sharing.convert import convert_to_pipeline
from dia_diffusion.training.trainer import Trainer
from tests.pipelines.test_convert import official_weights
from tests.training.conftest import Recorder


@pytest.fixture
def source(finished) -> Path:
    """A finished run without a unit."""
    return finished("source", "--model.attention", "none")


def pipeline_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "pipelines" / f"step-{step:08d}" / "unet" / "diffusion_pytorch_model.safetensors")


def test_weights_and_average_start_from_the_pipeline(source: Path, tiny, tmp_path: Path) -> None:
    options = ("--model.attention", "none", "--seed", "5", "--train.max_steps", "1")
    trainer = Trainer(tiny("run", "--init_from", str(source), *options), Recorder())
    expected = pipeline_weights(source, 6)
    model, average = trainer.model.state_dict(), dict(zip(trainer.names, trainer.ema.parameters, strict=True))
    assert model.keys() == average.keys() == expected.keys()
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    assert all(torch.equal(average[name], expected[name]) for name in expected)
    trainer.run()
    assert trainer.progress.messages[1] == f"starting from the weights of {source}"
    digest = sha256_of_file(source / "pipelines" / "step-00000006" / "unet" / "diffusion_pytorch_model.safetensors")
    folder = tmp_path / "run" / "pipelines" / "step-00000001"
    started_from = {"path": str(source), "weights_sha256": digest, "gained_unit": False}
    assert json.loads((folder / "training.json").read_text())["init_from"] == started_from
    assert digest in (folder / "README.md").read_text()


def test_a_unit_is_gained_with_its_own_first_weights(source: Path, tiny) -> None:
    from_nothing = Trainer(tiny("nothing")).model.state_dict()
    trainer = Trainer(tiny("run", "--init_from", str(source), "--train.max_steps", "1"), Recorder())
    expected = pipeline_weights(source, 6)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, from_nothing[name] if name.startswith("unit.") else expected[name]), name
    trainer.run()
    assert trainer.progress.messages[1].endswith("; they have no unit, so the unit keeps its initial weights")


def test_resuming_uses_the_checkpoint_and_not_init_from(source: Path, tiny, train, finished, tmp_path: Path) -> None:
    def options(path: Path, steps: int) -> tuple[str, ...]:
        return "--init_from", str(path), "--train.max_steps", str(steps), "--model.attention", "none"

    moved = tmp_path / "moved"
    train(tiny("run", *options(source, 1)))
    shutil.copytree(source / "pipelines" / "step-00000006", moved)
    shutil.rmtree(source)
    assert train(tiny("run", *options(source, 2))).step == 2  # the same path, which no longer exists
    assert train(tiny("run", *options(moved, 3))).step == 3  # another path to the same weights
    shutil.rmtree(moved)
    assert train(tiny("run", *options(moved, 4))).step == 4
    with pytest.raises(InputError, match=r"must be \S*moved, as when the run started, got None"):
        Trainer(tiny("run", "--model.attention", "none"))
    other = finished("other", "--model.attention", "none", "--seed", "1")
    with pytest.raises(InputError, match=r"must be \S*moved, as when the run started, got \S*other"):
        Trainer(tiny("run", *options(other, 9)))
    with pytest.raises(InputError, match=r"must be None, as when the run started, got \S*run"):
        Trainer(tiny("other", *options(tmp_path / "run", 9), "--seed", "1"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--model.hidden_size", "32"), r"tensor pos_embed is \(1, 5, 16\) there, \(1, 5, 32\) here"),
        (("--model.num_layers", "5"), r"tensor in_blocks\.1\.norm1\.weight is missing there, \(16,\) here"),
        (("--model.time_embed_mlp", "true"), r"tensor time_embed\.0\.weight is missing there, \(64, 16\) here"),
        (("--model.final_conv", "false"), r"tensor output_conv\.weight is \(1, 1, 3, 3\) there, missing here"),
        (("--model.num_attention_heads", "4"), r"num_attention_heads` must be 2 to match .*, got 4"),
        (("--model.skip_scaling", "constant"), r"`model\.skip_scaling` must be none to match .*, got constant"),
        (("--model.qk_norm", "true"), r"tensor in_blocks\.0\.attn\.q_norm\.weight is missing there, \(8,\) here"),
        (
            ("--noise.prediction_type", "sample"),
            r"`noise\.prediction_type` must be 'epsilon' to match .*, got 'sample'",
        ),
        (("--noise.schedule", "cosine"), r"`noise\.schedule` must be 'vp-continuous' to match .*, got 'cosine'"),
        (
            ("--noise.schedule", "ddpm-linear"),
            r"`noise\.schedule` must be 'vp-continuous' to match .*, got 'ddpm-linear'",
        ),
    ],
)
def test_other_networks_and_processes_are_refused(changed, message: str, source: Path, tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        Trainer(tiny("run", "--model.attention", "none", "--init_from", str(source), *changed))
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_unit_is_neither_dropped_nor_replaced(tiny, finished) -> None:
    start = ("--init_from", str(finished("source")))
    for key, there, here in (
        ("attention", "dia-lstm", "none"),
        ("attention", "dia-lstm", "dia-lstm-light"),
        ("pool_tokens", "all", "patch"),
    ):
        with pytest.raises(InputError, match=rf"`model\.{key}` must be {there} to match .*, got {here}$"):
            Trainer(tiny("run", *start, f"--model.{key}", here))
    with pytest.raises(InputError, match=r"`model\.attention_kwargs` must be None to match .*, got \{'reduction': 8\}"):
        Trainer(tiny("run", *start, "--model.attention_kwargs.reduction", "8"))
    Trainer(tiny("run", *start, "--model.drop_path", "0.5"))


def test_official_weights_are_fine_tuned(tiny, tmp_path: Path) -> None:
    official = official_weights(label_rows=10, channels=3, depth=2)
    torch.save(official, tmp_path / "official.pth")
    convert_to_pipeline(tmp_path / "official.pth", tmp_path / "converted", heads=4)
    network = ("--model.in_channels", "3", "--model.patch_size", "2", "--model.num_attention_heads", "4")
    classes = ("--model.num_classes", "10", "--data.label_dropout", "0.1")
    start = ("--init_from", str(tmp_path / "converted"), "--train.max_steps", "1")
    trainer = Trainer(tiny("run", *start, *network, *classes), Recorder())
    assert torch.equal(trainer.model.decoder.weight, official["decoder_pred.weight"])
    assert torch.equal(trainer.model.label_embed.weight[:10], official["label_emb.weight"])
    trainer.run()
