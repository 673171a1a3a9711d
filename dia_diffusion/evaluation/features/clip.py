"""The features `clip-vit-b-32` and `clip-vit-l-14`: OpenAI's image embeddings, in torch-fidelity's network."""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual

from dia_diffusion.download import Download
from dia_diffusion.evaluation.features.pretrained import IMAGE_SIZE, PretrainedNetwork, Tensors

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
LARGE = Download(
    f"https://huggingface.co/openai/clip-vit-large-patch14/resolve/{REVISION}/model.safetensors",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    1_710_540_580,
)
"""OpenAI's weights (MIT) as they publish them for transformers."""

RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of names: transformers' -> OpenAI's."""


def clip(
    repository: str, patch: int, width: int, layers: int, embedding: int, release: Download | None = None
) -> PretrainedNetwork:
    """CLIP's image encoder for images of 224x224.

    repository: OpenAI's on the Hugging Face Hub; patch: in pixels; width: of tokens; embedding: width of the features.
    """
    files = f"transformers' model.safetensors of {repository}, or a file of OpenAI's own tensors, visual.*"
    return PretrainedNetwork(
        build=partial(CLIPVisual, embedding, IMAGE_SIZE, layers, width, patch),
        rename=rename,
        finish=_visual,
        files=files,
        release=release,
        mean=MEAN,
        std=STD,
    )


def rename(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The image encoder's tensors under OpenAI's names; the input may have either names."""
    renamed = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    for name, tensor in tensors.items():
        if name == "visual_projection.weight":
            renamed["visual.proj"] = tensor.T.contiguous()
        elif name.startswith("vision_model.") and not name.endswith("position_ids"):
            inner = name.removeprefix("vision_model.")
            for theirs, ours in RENAMED.items():
                inner = inner.replace(theirs, ours)
            renamed[f"visual.{inner}"] = tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in parts):  # OpenAI stores queries, keys and values in one tensor
            joined = re.sub(r"q_proj\.(\w+)$", r"in_proj_\1", name)
            renamed[joined] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _visual(network: CLIPVisual) -> nn.Module:
    return network.visual


CLIP = {
    "clip-vit-b-32": clip("openai/clip-vit-base-patch32", 32, 768, 12, 512),
    "clip-vit-l-14": clip("openai/clip-vit-large-patch14", 14, 1024, 24, 768, LARGE),
}
