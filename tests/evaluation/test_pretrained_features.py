"""DINOv2, CLIP and VGG-16 against other implementations, with seeded random weights: no released file is needed."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

from dia_diffusion.cli.main import main
from dia_diffusion.download import Download
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import FEATURES, build_features
from dia_diffusion.evaluation.features.clip import CLIP, clip
from dia_diffusion.evaluation.features.dinov2 import DINOV2, resize_positions
from dia_diffusion.evaluation.features.pretrained import resize_bicubic
from dia_diffusion.evaluation.features.vgg16 import VGG16
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import sha256_of_file

timm = pytest.importorskip("timm")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def images(count: int, size: int = 32) -> torch.Tensor:
    """Noise of a color that differs from image to image."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(count, 3, 1, 1, generator=generator) * 255
    return (mean + 60 * torch.randn(count, 3, size, size, generator=generator)).clamp(0, 255).to(torch.uint8)


def normalized(batch: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Preprocessing by Pillow, one channel at a time in floating point."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((224, 224), Image.Resampling.BICUBIC))
        for channel in batch.flatten(0, 1).numpy().astype(np.float32)
    ]
    pixels = torch.from_numpy(np.stack(channels)).reshape(len(batch), 3, 224, 224) / 255
    return (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


def drawn(network: nn.Module) -> dict[str, torch.Tensor]:
    """Seeded tensors in the network's shapes that give different features for different images."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) / max(tensor[0].numel(), 4) ** 0.5
        for name, tensor in network.state_dict().items()
    }


def cubic_weight(distance: np.ndarray) -> np.ndarray:
    """The bicubic kernel with a = -0.75."""
    x, a = np.abs(distance), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def positions_by_hand(positions: np.ndarray) -> np.ndarray:
    """37x37 position embeddings resampled to 16x16, 37 / 16.1 apart, edges repeated; the class token's is kept."""
    centers = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    taps = np.floor(centers)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((16, 37))
    for row, (center, tap) in enumerate(zip(centers, taps, strict=True)):
        for place in tap:
            matrix[row, int(np.clip(place, 0, 36))] += cubic_weight(center - place)
    grid = positions[0, 1:].reshape(37, 37, -1)
    resized = np.einsum("ij,kl,jld->ikd", matrix, matrix, grid).reshape(1, 256, -1)
    return np.concatenate([positions[:, :1], resized], 1)


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights of ViT-S in the format of Meta's file."""
    tensors = drawn(timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0))
    tensors["pos_embed"] *= 500  # as large as the patches' embeddings
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save({**tensors, "mask_token": torch.zeros(1, 384)}, path)
    return path


def test_dinov2_matches_timm_with_dinov2s_positions(dinov2_file: Path) -> None:
    tensors = torch.load(dinov2_file, weights_only=True)
    del tensors["mask_token"]
    by_hand = torch.from_numpy(positions_by_hand(tensors["pos_embed"].double().numpy())).float()
    torch.testing.assert_close(resize_positions(tensors["pos_embed"], 16), by_hand, rtol=0, atol=1e-5)
    reference = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    reference.load_state_dict({**tensors, "pos_embed": by_hand})
    with torch.no_grad():
        expected = reference(normalized(images(3), *IMAGENET))
    extractor = build_features("dinov2-vit-s-14", weights=dinov2_file)
    assert extractor.widths == {"features": 384}
    assert expected.std(0).mean() > 0.05
    torch.testing.assert_close(extractor(images(3)), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extractor(images(3)[:1]), expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 224, 300])
def test_resizing_matches_pillow(size: int) -> None:
    expected = normalized(images(2, size), (0, 0, 0), (1 / 255,) * 3)
    torch.testing.assert_close(resize_bicubic(images(2, size).float()), expected, rtol=0, atol=0.01)


def dinov2_shapes(width: int, depth: int, hidden: int, gated: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in Meta's release."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= (
        {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
        if gated
        else {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    )
    for block in range(depth):
        for name, (rows, columns) in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": (rows, columns), f"blocks.{block}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{block}.{name}"] = (width,)
    return shapes


def transformers_shapes(width: int, depth: int, patch: int, embedding: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a transformers CLIP, with only one tensor of the text encoder."""
    shapes = {
        "logit_scale": (),
        "text_model.final_layer_norm.bias": (width,),
        "visual_projection.weight": (embedding, width),
    }
    vision = {
        "embeddings.class_embedding": (width,),
        "embeddings.position_ids": (1, (224 // patch) ** 2 + 1),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": ((224 // patch) ** 2 + 1, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(depth):
        inside = f"encoder.layers.{layer}"
        norms += [f"{inside}.layer_norm1", f"{inside}.layer_norm2"]
        for name, (rows, columns) in {
            **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            vision |= {f"{inside}.{name}.weight": (rows, columns), f"{inside}.{name}.bias": (rows,)}
    vision |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return shapes | {f"vision_model.{name}": shape for name, shape in vision.items()}


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        (DINOV2["dinov2-vit-s-14"], dinov2_shapes(384, 12, 1536, False)),
        (DINOV2["dinov2-vit-b-14"], dinov2_shapes(768, 12, 3072, False)),
        (DINOV2["dinov2-vit-l-14"], dinov2_shapes(1024, 24, 4096, False)),
        (DINOV2["dinov2-vit-g-14"], dinov2_shapes(1536, 40, 4096, True)),
        (CLIP["clip-vit-b-32"], transformers_shapes(768, 12, 32, 512)),
        (CLIP["clip-vit-l-14"], transformers_shapes(1024, 24, 14, 768)),
    ],
)
def test_released_tensors_fit(network, shapes) -> None:
    with torch.device("meta"):
        tensors = network.rename({name: torch.empty(shape) for name, shape in shapes.items()})
        own = network.build().state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: each.shape for name, each in own.items()}


def test_gated_layers_of_the_giant_match_dinov2() -> None:
    """w12 outputs the gate and then the value; w3 is applied to SiLU(gate) * value."""
    small = timm.create_model("vit_giant_patch14_dinov2", embed_dim=24, depth=1, num_heads=2, num_classes=0).eval()
    names = {"blocks.0.mlp.fc1.weight": "w12", "blocks.0.mlp.fc2.weight": "w3"}
    weights = {names[name]: tensor for name, tensor in small.state_dict().items() if name in names}
    torch.nn.init.zeros_(small.blocks[0].mlp.fc1.bias)
    torch.nn.init.zeros_(small.blocks[0].mlp.fc2.bias)
    tokens = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    gate, value = (tokens @ weights["w12"].T).chunk(2, -1)
    torch.testing.assert_close(small.blocks[0].mlp(tokens), (F.silu(gate) * value) @ weights["w3"].T)


SMALL_CLIP = clip("openai/clip-vit-small", 32, 128, 2, 16)


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seeded weights of a two-block CLIP in OpenAI's format, and in transformers' in half and single precision."""
    folder = tmp_path_factory.mktemp("clip")
    openai = {name: tensor.half() for name, tensor in drawn(SMALL_CLIP.build()).items()}
    theirs = {
        "visual_projection.weight": openai["visual.proj"].T.contiguous(),
        "vision_model.embeddings.class_embedding": openai["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": openai["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": openai["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(50)[None],
    }
    for part in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{part}"] = openai[f"visual.ln_pre.{part}"]
        theirs[f"vision_model.post_layernorm.{part}"] = openai[f"visual.ln_post.{part}"]
        for layer in range(2):
            old, new = f"visual.transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
            in_proj = openai[f"{old}.attn.in_proj_{part}"]
            for name, tensor in zip("qkv", in_proj.chunk(3), strict=True):
                theirs[f"{new}.self_attn.{name}_proj.{part}"] = tensor.clone()
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            for first, second in {**pairs, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
                theirs[f"{new}.{second}.{part}"] = openai[f"{old}.{first}.{part}"]
    save_file(openai, folder / "openai.safetensors")
    save_file(theirs, folder / "half.safetensors")
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in theirs.items()}
    save_file(single, folder / "single.safetensors")
    return {path.stem: path for path in folder.iterdir()}


def test_clip_matches_timm(clip_files: dict[str, Path]) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    reference = timm.create_model(
        "vit_base_patch32_clip_quickgelu_224", embed_dim=128, depth=2, num_heads=2, num_classes=16
    ).eval()
    tensors = {name: tensor.float() for name, tensor in load_file(clip_files["openai"]).items()}
    reference.load_state_dict(checkpoint_filter_fn(tensors, reference))
    with torch.no_grad():
        expected = reference(normalized(images(3), *OPENAI))
    assert expected.std(0).mean() > 0.05
    loaded = [SMALL_CLIP.load("clip", path, None) for path in clip_files.values()]
    for _, extractor, _ in loaded:
        (features,) = extractor(images(3))
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert len({weights_hash for *_, weights_hash in loaded}) == 1


class SmallVGG(nn.Module):
    """VGG-16 with narrow layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.MaxPool2d(4))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        layers = [nn.Linear(392, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 24), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*layers, nn.Linear(24, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(pixels)).flatten(1))


def test_vgg16_matches_torch_fidelity(tmp_path: Path) -> None:
    network = SmallVGG()
    network.load_state_dict(drawn(network))
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    reference = FeatureExtractorVGG16.__new__(FeatureExtractorVGG16)  # its constructor unpickles a file
    nn.Module.__init__(reference)
    network.classifier = network.classifier[:4]
    reference.model, reference.features_list = network.eval(), ["fc2_relu"]
    reference.feature_extractor_internal_dtype = torch.float32
    (expected,) = reference(images(20))
    _, extractor, _ = replace(VGG16, build=SmallVGG).load("vgg16", tmp_path / "vgg16.pth", None)
    assert expected.std(0).mean() > 0.05 and expected.shape == (20, 24)
    torch.testing.assert_close(extractor(images(20))[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("visual.conv1.weight"), "no tensor visual.conv1.weight"),
        (lambda tensors: tensors.update({"visual.proj": torch.zeros(128, 8)}), r"visual.proj of shape \(128, 8\)"),
        (lambda tensors: tensors["visual.ln_post.bias"].fill_(torch.nan), "ln_post.bias that aren't finite"),
        (lambda tensors: tensors.update({"visual.more": torch.zeros(1)}), "an unknown tensor visual.more"),
    ],
)
def test_other_weights_are_refused(clip_files: dict[str, Path], tmp_path: Path, change, said: str) -> None:
    tensors = load_file(clip_files["openai"])
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=said) as caught:
        SMALL_CLIP.load("clip-vit-b-32", tmp_path / "other.safetensors", None)
    message = str(caught.value)
    assert str(tmp_path / "other.safetensors") in message and "openai/clip-vit-small" in message
    assert "\n" not in message


def test_a_download_is_checked(clip_files: dict[str, Path], own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("dia_diffusion.download._check_secure", lambda url: None)  # allows a local file
    file = clip_files["half"]
    network = replace(SMALL_CLIP, release=Download(file.as_uri(), sha256_of_file(file), file.stat().st_size))
    downloaded = network.load("clip", None, None)[2]
    assert downloaded == network.load("clip", file, None)[2]
    assert [path.name for path in own_cache.rglob("*.*")] == [file.name]
    hub = Path(torch.hub.get_dir()) / "checkpoints" / file.name
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"is damaged.*remove it or give --weights"):
        network.load("clip", None, None)


@pytest.mark.parametrize("name", [*DINOV2, "clip-vit-l-14", "vgg16"])
def test_downloads_are_pinned(name: str) -> None:
    release = FEATURES[name].func.__self__.release
    assert release.url.startswith("https://") and len(bytes.fromhex(release.sha256)) == 32


def test_without_timm_dinov2_says_what_to_install(dinov2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'dia-diffusion\[features\]'"):
        build_features("dinov2-vit-s-14", weights=dinov2_file)


def test_a_distance_is_called_by_its_features(
    clip_files: dict[str, Path], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEATURES._rows, "clip-vit-b-32", partial(SMALL_CLIP.load, "clip-vit-b-32"))
    np.save(tmp_path / "noise.npy", images(6).permute(0, 2, 3, 1).numpy())
    noise = str(tmp_path / "noise.npy")
    fid = ["fid", noise, "--reference", noise, "--features", "clip-vit-b-32", "--record", str(tmp_path / "r.jsonl")]
    assert main([*fid, "--weights", str(clip_files["half"])]) == 0
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record.metric == "FD(clip-vit-b-32)"
    assert record.protocol.features == "clip-vit-b-32"
    assert record.protocol.features_hash == SMALL_CLIP.load("clip", clip_files["half"], None)[2]
