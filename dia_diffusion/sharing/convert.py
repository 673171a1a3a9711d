"""Official U-ViT weights (github.com/baofff/U-ViT) as a UViT and as a pipeline folder."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dia_diffusion.errors import InputError, first_line
from dia_diffusion.io import atomic_dir, refuse_existing, sha256_of_file, write_json
from dia_diffusion.models.uvit import UViT
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.folder import CONVERTED_FILE
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline
from dia_diffusion.reading import NotTensors, load_pickled_tensors
from dia_diffusion.sharing.card import write_card

# The published sizes; the number of heads can't be inferred from the weights.
HEADS_OF_WIDTH = {512: 8, 768: 12, 1024: 16, 1152: 16}
# Official models for guidance have 1,001 rows, the last for the null label; with other counts all rows are classes.
ROWS_WITH_NULL_LABEL = 1001
# Prefixes of our names, and the official ones; all other names are the same.
OFFICIAL_PREFIXES = {
    "patch_embed.": "patch_embed.proj.",
    "label_embed.": "label_emb.",
    "decoder.": "decoder_pred.",
    "output_conv.": "final_layer.",
}


def convert_official(path: str | Path, heads: int | None = None) -> UViT:
    """Reads official U-ViT weights (.pth) into a UViT without an attention unit, in float32.

    Nothing in the file is executed. Sizes are inferred from tensor shapes. If class-conditional weights have no null
    label (ImageNet 64), it becomes the mean of the class embeddings.

    Args:
        path: a state dict saved by the official code.
        heads: attention heads; None is the published number for the width.

    Raises:
        InputError: the file isn't such weights, or a tensor is missing, unexpected or of the wrong shape.
    """
    official = _read(Path(path))
    with torch.device("meta"):
        model = UViT(**_infer_config(official, heads), attention=None)
    rows = official.get("label_emb.weight")
    if rows is not None and len(rows) != ROWS_WITH_NULL_LABEL:
        official["label_emb.weight"] = torch.cat([rows, rows.mean(dim=0, keepdim=True)])

    state = {}
    for ours, parameter in model.state_dict().items():
        name, shape = _official_name(ours), tuple(parameter.shape)
        if name not in official:
            raise InputError(f"{path} has no tensor {name}, which a U-ViT of its sizes has")
        tensor = official.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"tensor {name} of {path} must have shape {shape}, got {tuple(tensor.shape)}")
        state[ours] = tensor.float().contiguous()
    if official:
        raise InputError(f"{path} has tensor {min(official)}, which no U-ViT of its sizes has")
    model.load_state_dict(state, assign=True)
    return model.eval()


def convert_to_pipeline(path: str | Path, folder: str | Path, heads: int | None = None) -> None:
    """Writes official U-ViT weights as a pipeline folder with a card, and DPM-Solver++ over the continuous VP process.

    Raises:
        InputError: see `convert_official`; or the folder exists; or the model is a latent one.
    """
    refuse_existing(Path(folder))
    model = convert_official(path, heads)
    if model.in_channels not in (1, 3):
        raise InputError(
            f"{path} must be a model of images with 1 or 3 channels, got one of latents with {model.in_channels}"
        )
    # Even steps in log-SNR, as in the sampler dpmsolver++; with even steps in time, diffusers gives NaN at 1,000 steps.
    scheduler = DPMSolverMultistepScheduler(**NoiseProcess().scheduler_config(), use_lu_lambdas=True)
    with atomic_dir(folder, replace=False) as temporary:
        UViTPipeline(unet=model, scheduler=scheduler).save_pretrained(temporary)
        write_json(temporary / CONVERTED_FILE, {"source": Path(path).name, "sha256": sha256_of_file(path)})
        write_card(temporary)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path} must be a file of official U-ViT weights (.pth), got {got}")
    try:
        state = load_pickled_tensors(path)
    except NotTensors as error:
        raise InputError(f"{path} must be a state dict of official U-ViT weights, but it {error}") from None
    except Exception as error:  # unpickling an untrusted file can raise almost anything
        raise InputError(f"{path} can't be read as weights alone, or is truncated: {first_line(error)}") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            what = "values that aren't finite" if tensor.is_floating_point() else f"the type {tensor.dtype}"
            raise InputError(f"tensor {name} of {path} must be finite floating point numbers, got {what}")
    return state


def _infer_config(official: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    def shape(name: str, dims: int) -> torch.Size:
        if name not in official or official[name].dim() != dims:
            raise InputError(f"the weights have no tensor {name} with {dims} dimensions, which every U-ViT has")
        return official[name].shape

    _, num_tokens, hidden_size = shape("pos_embed", 3)
    _, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    mlp_size, _ = shape("mid_block.mlp.fc1.weight", 2)
    num_classes = None
    if "label_emb.weight" in official:
        rows, _ = shape("label_emb.weight", 2)
        num_classes = rows - 1 if rows == ROWS_WITH_NULL_LABEL else rows
    num_patches = num_tokens - (1 if num_classes is None else 2)
    side = math.isqrt(max(num_patches, 0))
    if side == 0 or side**2 != num_patches:
        raise InputError(f"pos_embed has {num_tokens} tokens, which leaves {num_patches} patches: not a square image")
    if heads is None and hidden_size not in HEADS_OF_WIDTH:
        widths = ", ".join(map(str, HEADS_OF_WIDTH))
        raise InputError(f"width {hidden_size} is none of the published ({widths}): give the number of heads (--heads)")
    in_blocks = {match[1] for name in official if (match := re.match(r"in_blocks\.(\d+)\.", name))}
    return {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "num_layers": 2 * len(in_blocks) + 1,
        "num_attention_heads": heads if heads is not None else HEADS_OF_WIDTH[hidden_size],
        "mlp_ratio": mlp_size / hidden_size,
        "qkv_bias": "mid_block.attn.qkv.bias" in official,
        "time_embed_mlp": "time_embed.0.weight" in official,
        "num_classes": num_classes,
        "final_conv": "final_layer.weight" in official,
        "long_skips": "out_blocks.0.skip_linear.weight" in official,
    }


def _official_name(ours: str) -> str:
    for prefix, official in OFFICIAL_PREFIXES.items():
        if ours.startswith(prefix):
            return official + ours.removeprefix(prefix)
    return ours
