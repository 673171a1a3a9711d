import hashlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UVIT_SIZES
from dia_diffusion.sharing.convert import convert_official, convert_to_pipeline
from tests.models.reference_uvit import u_vit

WIDTH, PATCH, SIDE, HEADS = 16, 2, 4, 4
PUBLISHED = {  # width, blocks minus one, patch, image, classes, millions of parameters as stated in the paper
    "cifar10-S/2": (512, 12, 2, 32, 0, 44),
    "celeba64-S/4": (512, 12, 4, 64, 0, 44),
    "imagenet64-M/4": (768, 16, 4, 64, 1000, 131),
    "imagenet64-L/4": (1024, 20, 4, 64, 1000, 287),
}
SHORT_AND_LONG = [
    *("cifar10-S/2", "imagenet64-M/4"),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("celeba64-S/4", "imagenet64-L/4")),
]
FULL = {"qkv_bias": True, "time_mlp": True, "label_rows": 6}
BARE = {"conv": False, "skip": False}


def official_weights(
    depth=4, channels=3, label_rows=0, qkv_bias=False, time_mlp=False, conv=True, skip=True, width=WIDTH
):
    """Random weights under the names of the official code."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def linear(name, n_in, n_out, bias=True):
        weights[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator) * n_in**-0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(n_out, generator=generator) * 0.1

    def norm(name):
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def block(name, has_skip=False):
        norm(f"{name}.norm1")
        linear(f"{name}.attn.qkv", width, 3 * width, qkv_bias)
        linear(f"{name}.attn.proj", width, width)
        norm(f"{name}.norm2")
        linear(f"{name}.mlp.fc1", width, 4 * width)
        linear(f"{name}.mlp.fc2", 4 * width, width)
        if has_skip:
            linear(f"{name}.skip_linear", 2 * width, width)

    extras = 2 if label_rows else 1
    weights["pos_embed"] = torch.randn(1, extras + SIDE**2, width, generator=generator)
    weights["patch_embed.proj.weight"] = 0.3 * torch.randn(width, channels, PATCH, PATCH, generator=generator)
    weights["patch_embed.proj.bias"] = torch.randn(width, generator=generator)
    if time_mlp:
        linear("time_embed.0", width, 4 * width)
        linear("time_embed.2", 4 * width, width)
    if label_rows:
        weights["label_emb.weight"] = torch.randn(label_rows, width, generator=generator)
    for index in range(depth // 2):
        block(f"in_blocks.{index}")
        block(f"out_blocks.{index}", skip)
    block("mid_block")
    norm("norm")
    linear("decoder_pred", width, PATCH**2 * channels)
    if conv:
        weights["final_layer.weight"] = 0.2 * torch.randn(channels, channels, 3, 3, generator=generator)
        weights["final_layer.bias"] = torch.randn(channels, generator=generator)
    return weights


def published_weights(width, depth, patch, size, label_rows):
    """Weights of a published shape, as overlapping views of a few random numbers to keep even large files small."""
    numbers = 0.05 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    tokens = (size // patch) ** 2
    sizes = {WIDTH * n: width * n for n in (1, 2, 3, 4)} | {SIDE**2 + n: tokens + n for n in (1, 2)}
    sizes |= {PATCH: patch, 3 * PATCH**2: 3 * patch**2}
    weights = {}
    for index, (name, small) in enumerate(official_weights(depth, label_rows=label_rows).items()):
        shape = [sizes.get(n, n) for n in small.shape]
        weights[name] = numbers.as_strided(shape, [1] * len(shape), storage_offset=index)
    return weights


@pytest.fixture
def saved(tmp_path):
    def save(weights):
        torch.save(weights, tmp_path / "official.pth")
        return tmp_path / "official.pth"

    return save


def refusal(path, heads: int | None = HEADS):
    with pytest.raises(InputError) as error:
        convert_official(path, heads)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [{}, FULL, BARE, {"channels": 1, "depth": 0}], ids=str)
def test_is_the_same_function(kind, saved):
    weights = official_weights(**kind)
    model = convert_official(saved(weights), heads=HEADS)
    assert model.unit is None
    assert sum(p.numel() for p in model.parameters()) - (WIDTH if "label_rows" in kind else 0) == sum(
        tensor.numel() for tensor in weights.values()
    )
    x = torch.randn(3, kind.get("channels", 3), 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([0.4, 500.0, 998.6])
    labels = torch.tensor([0, 3, 5]) if "label_rows" in kind else None
    with torch.no_grad():
        ours = model(x, times, labels).sample
        torch.testing.assert_close(ours, u_vit(weights, x, times, labels, num_heads=HEADS), rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_published_shapes(name, saved, monkeypatch):
    monkeypatch.setattr("dia_diffusion.reading.EXPANDED_LIMIT", 1 << 40)  # the tensors share storage
    width, depth, patch, size, classes, millions = PUBLISHED[name]
    weights = published_weights(width, depth, patch, size, classes)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    assert round(num_parameters / 1e6) == millions
    model = convert_official(saved(weights))
    null_label = width if classes else 0
    assert sum(p.numel() for p in model.parameters()) == num_parameters + null_label
    published = {"hidden_size": width, "num_layers": depth + 1, "patch_size": patch, "sample_size": size}
    published |= {"num_attention_heads": width // 64, "num_classes": classes or None, "in_channels": 3}
    assert {key: model.config[key] for key in published} == published
    same = UVIT_SIZES[name.split("-")[1].split("/")[0]]
    assert {key: model.config[key] for key in same} == same
    if depth == 12:  # the larger ones differ only in their sizes
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours, theirs = model(x, 300.0).sample, u_vit(weights, x, torch.tensor([300.0]), num_heads=width // 64)
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.skipif("UVIT_REPO" not in os.environ, reason="UVIT_REPO names no checkout of the official U-ViT")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_of_the_official_network(name, saved, monkeypatch):
    repo = Path(os.environ["UVIT_REPO"])
    monkeypatch.syspath_prepend(str(repo))
    spec = importlib.util.spec_from_file_location("libs.uvit", repo / "libs" / "uvit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    width, depth, patch, size, classes, _ = PUBLISHED[name]
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 64}
    torch.manual_seed(0)
    official = module.UViT(**sizes, num_classes=classes or -1).eval()
    model = convert_official(saved(official.state_dict()))
    x, times = torch.randn(1, 3, size, size), torch.tensor([3.3])
    labels = (torch.tensor([7]),) if classes else ()
    with torch.no_grad():
        theirs = official(x, times, *labels)
        assert (theirs - model(x, times, *labels).sample).abs().max() < 1e-4 * theirs.abs().max()


def test_the_null_label(saved):
    weights = official_weights(label_rows=6)
    model = convert_official(saved(weights), heads=HEADS)
    assert model.config.num_classes == 6
    torch.testing.assert_close(model.label_embed.weight[6], weights["label_emb.weight"].mean(dim=0))
    weights = official_weights(label_rows=1001)
    model = convert_official(saved(weights), heads=HEADS)
    assert model.config.num_classes == 1000
    torch.testing.assert_close(model.label_embed.weight.data, weights["label_emb.weight"])


def test_heads_of_published_widths(saved):
    path = saved(official_weights(width=512, depth=2))
    assert convert_official(path).config.num_attention_heads == 8
    assert convert_official(path, heads=16).config.num_attention_heads == 16
    path = saved(official_weights())
    assert "width 16" in refusal(path, heads=None)
    assert "`num_attention_heads` must divide" in refusal(path, heads=3)


def test_tensors_missing_left_over_or_of_other_shapes_are_named(saved):
    weights = official_weights()
    for name in ("norm.bias", "pos_embed", "in_blocks.1.attn.proj.bias", "out_blocks.1.skip_linear.weight"):
        assert name in refusal(saved({key: tensor for key, tensor in weights.items() if key != name}))
    for extra in ("in_blocks.0.attn.gate", "decoder.weight", "time_embed.2.weight"):
        assert extra in refusal(saved({**weights, extra: torch.zeros(2)}))
    assert "norm.weight" in refusal(saved({**weights, "norm.weight": torch.zeros(15)}))
    assert "not a square" in refusal(saved({**weights, "pos_embed": torch.zeros(1, 16, WIDTH)}))


def test_pipeline_folder(saved, tmp_path):
    path = saved(official_weights())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    convert_to_pipeline(path, tmp_path / "pipeline", heads=HEADS)
    pipeline = UViTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    model = convert_official(path, heads=HEADS)
    for name, tensor in pipeline.unet.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    images = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
    assert images.isfinite().all()
    with pytest.raises(InputError, match="exists"):
        convert_to_pipeline(path, tmp_path / "pipeline", heads=HEADS)
    with pytest.raises(InputError, match=r"must be a model of images .* latents with 4"):
        convert_to_pipeline(saved(official_weights(channels=4)), tmp_path / "latent", heads=HEADS)
    assert not (tmp_path / "latent").exists()
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert f"Converted from the official U-ViT weights `official.pth` (sha256 `{sha256}`)" in card
    assert "An unconditional UViT (16 wide, 5 blocks, 8x8 images) with no attention unit" in card
    assert str(tmp_path) not in card
