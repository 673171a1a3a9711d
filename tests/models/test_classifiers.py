"""Classifiers: published parameter counts, refused options, and the effect of a unit."""

import pytest
import torch
from torch import nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import build_classifier


# Tables IV, XIII and XVI of arXiv 2210.16101, in millions, for built networks; tests/analysis has all by formula.
@pytest.mark.parametrize(
    ("backbone", "norm", "attention", "millions"),
    [
        ("cifar-resnet164", "batch", "none", 1.73),
        ("cifar-resnet407", "batch", "dia-lstm", 4.45),
        ("cifar-wrn52-4", "batch", "dia-lstm", 12.30),
        ("cifar-resnext101-8x32", "batch", "dia-lstm", 33.01),
        ("cifar-resnet326", "none", "none", 3.35),
    ],
)
def test_published_counts(backbone: str, norm: str, attention: str, millions: float) -> None:
    unit = {} if attention == "none" else {"attention": attention, "attention_kwargs": {"reduction": 4}}
    with torch.device("meta"):
        model = build_classifier(BackboneConfig(backbone=backbone, norm=norm, num_classes=100, **unit))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_a_basic_resnet20_has_the_count_of_its_paper() -> None:
    """0.27 M in Table 6 of He et al. (2016), with 10 classes and parameter-free shortcuts."""
    model = build_classifier(BackboneConfig(backbone="cifar-resnet20-basic"))
    shortcuts = sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
    assert round((sum(p.numel() for p in model.parameters()) - shortcuts) / 1e6, 2) == 0.27


@pytest.mark.parametrize(("name", "parameters"), [("vit_s_16", 22_050_664), ("vit_b_16", 86_567_656)])
def test_vits_have_the_counts_of_deit(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_classifier(BackboneConfig(backbone=name, sample_size=224, num_classes=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "backbone",
    ["cifar-resnet29", "cifar-resnet20-basic", "cifar-wrn10-1", "cifar-resnext11-2x4", "feature-resnet"],
)
def test_a_unit_of_ones_changes_nothing(backbone: str) -> None:
    """The unit is at the end of the branches, and the backbone has the same initial weights with and without it."""
    torch.manual_seed(0)
    plain = build_classifier(BackboneConfig(backbone=backbone))
    torch.manual_seed(0)
    unit = {"attention": "fixed-scale", "attention_kwargs": {"scale": 1.0}}
    with_unit = build_classifier(BackboneConfig(backbone=backbone, **unit))
    images = torch.randn(4, 3, 32, 32)
    own, theirs = with_unit.state_dict(), plain.state_dict()
    if "wrn" not in backbone:  # with a unit, a WRN has a further norm
        assert torch.allclose(with_unit(images), plain(images), atol=1e-5)
        assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    weights = dict(plain.named_parameters())
    assert all(torch.equal(dict(with_unit.named_parameters())[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(("backbone", "attention"), [("resnet18", "srm"), ("cifar-resnet20-basic", "dia-lstm")])
def test_sync_batch_norms_keep_the_unit(backbone: str, attention: str) -> None:
    """In evaluation mode, SyncBatchNorm computes the same function as BatchNorm."""
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for sync_batchnorm in (False, True):
        torch.manual_seed(0)
        model = build_classifier(BackboneConfig(backbone=backbone, attention=attention), sync_batchnorm).eval()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
        assert norms and all(isinstance(norm, nn.SyncBatchNorm) == sync_batchnorm for norm in norms)
        outputs.append(model(images))
    assert torch.equal(*outputs)


def test_a_unit_scales_the_branch_and_not_the_shortcut() -> None:
    """With a scale of zero, only the shortcuts remain."""
    unit = {"attention": "fixed-scale", "attention_kwargs": {"scale": 0.0}}
    model = build_classifier(BackboneConfig(backbone="cifar-resnet20-basic", **unit)).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.stem(images)
    for block in (block for stage in model.stages for block in stage):
        x = block.shortcut(x).relu()
    assert torch.allclose(model(images), model.head(x.mean((2, 3))), atol=1e-6)


def test_stages_and_blocks_that_carry_the_unit() -> None:
    def positions(**options: object) -> list[str]:
        config = BackboneConfig(
            backbone="cifar-resnet20-basic", attention="se", attention_kwargs={"reduction": 4}, **options
        )
        stages = build_classifier(config).attention_units.attachment.stages
        return [position.module for stage in stages for position in stage.positions]

    assert len(positions()) == 9
    assert positions(attention_stages=[0, 2], attention_blocks=1) == ["stages.0.0.branch", "stages.2.0.branch"]
    for wrong in ({"attention_stages": [3]}, {"attention_stages": []}, {"attention_blocks": 0}):
        with pytest.raises(InputError, match=r"`model.attention_.* must be"):
            positions(**wrong)


def test_no_norms_and_no_shortcuts() -> None:
    model = build_classifier(
        BackboneConfig(backbone="cifar-resnet29", norm="none", residual=False, attention="dia-lstm")
    )
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any("shortcut" in name for name, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet99"}, "must be one of resnet18, .*, got 'resnet99'"),
        ({"backbone": "cifar-resnet30"}, r"depth must be 9 n \+ 2, such as .*, got 30"),
        ({"backbone": "resnet18", "norm": "none"}, "must be batch and true for backbone resnet18, got none and True"),
        ({"norm": "layer"}, "`norm` must be one of batch, none, got 'layer'"),
        ({"num_classes": 1}, "`model.num_classes` must be 2 or more, .*, got 1, 32 and 0.0"),
        ({"backbone": "vit_s_16", "sample_size": 100}, "must be a multiple of 16 for vit_s_16, got 100"),
        ({"dropout": 0.3}, "must be 0 for backbone .*, got 0.3"),
        ({"backbone": "cifar-resnet20-basic", "attention_blocks": 2}, "`model.attention` must be a unit"),
        ({"attention": "sa"}, "attention unit must be none or one of"),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_classifier(BackboneConfig(**options))
