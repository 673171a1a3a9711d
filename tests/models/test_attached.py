"""diffusers networks with attached units as one model: called, saved, loaded and sampled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dia_diffusion import AttachedModel, UViTPipeline, attach
from dia_diffusion.errors import InputError
from dia_diffusion.sampling.load import load_pipeline

ARGUMENTS: dict[str, dict[str, Any]] = {
    "unet2d": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    },
    "dit": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "patch_size": 2},
}
BOTH = pytest.mark.parametrize("backbone", ARGUMENTS)


def tiny(backbone: str, **kwargs: Any) -> AttachedModel:
    torch.manual_seed(0)
    model = AttachedModel(backbone, ARGUMENTS[backbone], sample_size=8, in_channels=1, **kwargs).eval()
    for parameter in model.parameters():  # a new DiT's output is 0 whatever its blocks do
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3.5, 700.25])


@pytest.mark.parametrize(
    ("backbone", "num_classes", "attention"),
    [("unet2d", None, "srm"), ("unet2d", 3, "none"), ("dit", None, "dia-lstm"), ("dit", 3, "srm")],
)
def test_saving_and_loading_keep_the_outputs(
    tmp_path: Path, backbone: str, num_classes: int | None, attention: str
) -> None:
    model = tiny(backbone, num_classes=num_classes, attention=attention)
    model.save_pretrained(tmp_path)
    loaded = AttachedModel.from_pretrained(tmp_path).eval()
    labels = None if num_classes is None else torch.tensor([2, 3])
    expected = model(*inputs(), labels).sample
    assert torch.equal(loaded(*inputs(), labels).sample, expected)
    assert (loaded.unit is None) == (attention == "none")
    with torch.device("meta"):
        names = list(AttachedModel.from_config(AttachedModel.load_config(tmp_path)).state_dict())
    assert names == list(model.state_dict())


@BOTH
def test_outputs_match_the_network_with_attached_units(backbone: str) -> None:
    model = tiny(backbone, num_classes=3)
    kind = {"unet2d": UNet2DModel, "dit": DiTTransformer2DModel}[backbone]
    classes = {"num_class_embeds": 4} if backbone == "unet2d" else {"num_embeds_ada_norm": 3}
    network = kind(sample_size=8, in_channels=1, out_channels=1, **classes, **ARGUMENTS[backbone]).eval()
    attach(network)
    network.load_state_dict(model.network.state_dict())
    sample, timestep = inputs()
    for labels, own in ((torch.tensor([1, 0]), [1, 0]), (None, [3, 3])):
        expected = network(sample, timestep, class_labels=torch.tensor(own)).sample
        assert torch.equal(model(sample, timestep, labels).sample, expected)
    assert torch.equal(model(sample, 5).sample, model(sample, torch.tensor([5, 5])).sample)


@BOTH
def test_a_plain_model_with_units_is_saved_as_an_attached_model(tmp_path: Path, backbone: str) -> None:
    model = tiny(backbone, num_classes=3, attention="none")
    network, labels = model.network, torch.tensor([1, 0])
    attach(network, "se", reduction=2, sharing="individual")
    network.save_pretrained(tmp_path)
    loaded = AttachedModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(*inputs(), labels).sample, network(*inputs(), class_labels=labels).sample)
    assert loaded.config.attention_at is None and loaded.config.attention_kwargs["reduction"] == 2
    # diffusers' classes would ignore the unknown weights and start the rest at random.
    for kind in (UNet2DModel, DiTTransformer2DModel):
        with pytest.raises((ValueError, NotImplementedError), match=r"dia_diffusion\.AttachedModel"):
            kind.from_pretrained(tmp_path)


def test_units_at_custom_positions_are_saved(tmp_path: Path) -> None:
    network = tiny("unet2d", attention="none").network
    attach(network, at=lambda name, module: name.startswith("down_blocks") and name.endswith(".conv2"))
    AttachedModel.from_backbone(network).save_pretrained(tmp_path)
    loaded = AttachedModel.from_pretrained(tmp_path).eval()
    sample, timestep = inputs()
    assert torch.equal(loaded(sample, timestep).sample, network(sample, timestep).sample)
    assert [p.module for p in loaded.attachment.positions] == [f"down_blocks.{i}.resnets.0.conv2" for i in (0, 1)]


def test_replaced_units_are_not_saved_under_the_old_config(tmp_path: Path) -> None:
    model = tiny("unet2d")
    model.attachment.detach()
    with pytest.raises(
        InputError, match=r"must be those that the model was created with, attention 'dia-lstm', got others"
    ):
        model.save_pretrained(tmp_path)
    AttachedModel.from_backbone(model.network, "none").save_pretrained(tmp_path)
    assert AttachedModel.from_pretrained(tmp_path).unit is None
    # Units with the same tensors but another function than the config says.
    model = tiny("unet2d", attention="fixed-scale")
    model.attachment.detach()
    attach(model.network, "fixed-scale", scale=1.0)
    with pytest.raises(InputError, match="got others"):
        model.save_pretrained(tmp_path)
    copied = copy.deepcopy(tiny("unet2d"))
    copied.save_pretrained(tmp_path)
    assert torch.equal(AttachedModel.from_pretrained(tmp_path)(*inputs()).sample, copied(*inputs()).sample)


@BOTH
def test_twins_share_initial_weights_and_later_draws(backbone: str) -> None:
    found = []
    for attention in ("none", "dia-lstm", "srm"):
        torch.manual_seed(0)
        model = AttachedModel(backbone, ARGUMENTS[backbone], 8, 1, attention=attention)
        own = {name: w for name, w in model.state_dict().items() if "attention_units" not in name}
        found.append({**own, "after": torch.randn(3)})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@BOTH
def test_a_pipeline_draws_by_class_and_guided(tmp_path: Path, backbone: str) -> None:
    model = tiny(backbone, num_classes=3)
    UViTPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)

    def draw(**kwargs: Any) -> Tensor:
        return pipeline(2, torch.Generator().manual_seed(0), 3, output_type="pt", **kwargs).images

    by_class = draw(class_labels=[0, 1])
    assert by_class.shape == (2, 1, 8, 8)
    assert not torch.equal(by_class, draw()) and not torch.equal(by_class, draw(class_labels=[0, 1], guidance_scale=3))
    # Guidance extrapolates from the unconditional to the conditional prediction, here in one step.
    sample, timestep = inputs()
    labels = torch.tensor([0, 1])
    null, conditional = model(sample, timestep).sample, model(sample, timestep, labels).sample
    guided = pipeline._predict(sample, timestep[:1], labels, 3.0)
    again = [model(sample, timestep[:1], given).sample for given in (None, labels)]
    torch.testing.assert_close(guided, again[0] + 3 * (again[1] - again[0]))
    assert not torch.equal(null, conditional)


def test_a_wrapped_network_without_null_label_needs_classes(tmp_path: Path) -> None:
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3, **ARGUMENTS["unet2d"])
    model = AttachedModel.from_backbone(network, reduction=2)
    assert model.num_classes == 3 and not model.has_null_label
    with pytest.raises(InputError, match=r"`class_labels` must be 0\.\.2 for a model without a null label"):
        model(*inputs())
    model(*inputs(), torch.tensor([0, 2]))
    with pytest.raises(InputError, match="without a null label"):
        UViTPipeline(model, DDPMScheduler())(1, class_labels=1, guidance_scale=2.0, num_inference_steps=1)


def test_a_wrapped_dit_drops_no_labels_by_itself() -> None:
    given = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4, "norm_num_groups": 4}
    network = DiTTransformer2DModel(sample_size=8, in_channels=1, num_embeds_ada_norm=3, **given)
    model = AttachedModel.from_backbone(network, "none").train()
    assert [m.dropout_prob for m in model.modules() if hasattr(m, "dropout_prob")] == [0.0]


def test_a_wrapped_network_has_a_size() -> None:
    network = UNet2DModel(in_channels=1, out_channels=1, **ARGUMENTS["unet2d"])
    with pytest.raises(InputError, match="`sample_size` of the model must be"):
        AttachedModel.from_backbone(network, "none")


def test_a_network_saved_as_a_moving_average_is_wrapped(tmp_path: Path) -> None:
    network = tiny("unet2d", attention="none").network
    EMAModel(network.parameters(), model_cls=UNet2DModel, model_config=network.config).save_pretrained(tmp_path)
    averaged = UNet2DModel.from_pretrained(tmp_path)
    assert "decay" in averaged.config  # diffusers leaves it there
    model = AttachedModel.from_backbone(averaged, "none")
    assert torch.equal(model(*inputs()).sample, network(*inputs()).sample)


def test_a_diffusers_pipeline_with_attached_units_is_refused(tmp_path: Path) -> None:
    network = tiny("unet2d", attention="none").network
    attach(network)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"backbone": "resnet"}, "`backbone` must be one of unet2d, dit, got 'resnet'"),
        ({"backbone_kwargs": {"layers": 2}}, "`backbone_kwargs` must be of act_fn, .* for UNet2DModel, got 'layers'"),
        ({"backbone_kwargs": {"in_channels": 2}}, "must not have in_channels, which the model sets to 1, got 2"),
        ({"backbone_kwargs": {"block_out_channels": [8]}}, "UNet2DModel can't be built from backbone_kwargs: Must"),
        ({"attention": "none", "attention_at": ["conv_in"]}, "`attention_at` must be null without attention"),
        ({"attention_at": [3]}, "must hold names of the network's modules, got 3"),
        ({"attention_at": [[3]]}, "must name modules of the model, got 3"),
        ({"attention_at": [[["a"]]]}, r"must name modules of the model, got \['a'\]"),
        ({"backbone_kwargs": {"class_embed_type": "timestep"}}, "class_embed_type` must be null .*, got 'timestep'"),
        ({"attention": "nothing"}, "attention unit must be none or one of"),
        ({"num_classes": 0}, "`num_classes` must be above 0, got 1, 8 and 0"),
        ({"num_classes": -1, "backbone": "dit"}, "must be above 0"),
        ({"in_channels": 0}, "must be above 0"),
        ({"sample_size": [8, 0]}, "must be above 0"),
        ({"sample_size": 7}, "`sample_size` must be a multiple of 2 for this UNet2DModel, got 7"),
        (
            {"backbone": "dit", "backbone_kwargs": ARGUMENTS["dit"], "sample_size": 9},
            "`sample_size` must be a multiple of 2 for this DiTTransformer2DModel, got 9",
        ),
    ],
)
def test_bad_input(kwargs: dict[str, Any], error: str) -> None:
    given = {"backbone": "unet2d", "backbone_kwargs": ARGUMENTS["unet2d"], "sample_size": 8, "in_channels": 1}
    with pytest.raises(InputError, match=error):
        AttachedModel(**{**given, **kwargs})


def test_inputs_that_dont_fit() -> None:
    model = tiny("unet2d")
    with pytest.raises(InputError, match="unconditional model"):
        model(*inputs(), torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"must have shape \(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        model(torch.zeros(2, 3, 8, 8), 5)
    with pytest.raises(InputError, match="`model` must be a UNet2DModel or DiTTransformer2DModel, got a AttachedModel"):
        AttachedModel.from_backbone(model)
