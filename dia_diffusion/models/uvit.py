"""U-ViT (Bao et al., CVPR 2023) with a shared attention unit between Norm and MLP of every block.

The unit is placed as in arXiv 2210.16101, Fig. 7. Without a unit this is U-ViT itself: the same function and parameters
as the official network.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn

from dia_diffusion.attention.units import UNITS, build_attention, forked_rng
from dia_diffusion.errors import InputError
from dia_diffusion.models.registry import BACKBONES, Backbone
from dia_diffusion.models.uvit_blocks import Block, SkipCalibration

# Table 1 of the U-ViT paper, and a size that a CPU trains in minutes.
UVIT_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_layers": 5, "num_attention_heads": 4},
    "S": {"hidden_size": 512, "num_layers": 13, "num_attention_heads": 8},
    "S-deep": {"hidden_size": 512, "num_layers": 17, "num_attention_heads": 8},
    "M": {"hidden_size": 768, "num_layers": 17, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 21, "num_attention_heads": 16},
    "H": {"hidden_size": 1152, "num_layers": 29, "num_attention_heads": 16},
}
INITIALIZATIONS = ("uvit", "xavier")
POOLINGS = ("all", "patch")
SKIP_SCALINGS = ("none", "constant", "power", "learned")
SET_BY_MODEL = {"name", "channels", "num_blocks"}  # arguments of build_attention


@dataclass
class UViTOutput(BaseOutput):
    """sample: (B, C, H, W), the prediction, of the noise process's prediction type."""

    sample: Tensor


def blocks_with_unit(chosen: list[int] | None, num_layers: int, attention: str | None) -> list[int]:
    """The blocks that carry the unit, in execution order; `chosen` None is all.

    Raises InputError: no block, an unknown one, a duplicate, or blocks without a unit.
    """
    if chosen is None:
        return list(range(num_layers))
    if attention in (None, "none"):
        raise InputError(f"`attention_blocks` must be null without attention, got {chosen}")
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(num_layers)):
        raise InputError(
            f"`attention_blocks` must be one or more of 0 to {num_layers - 1}, each once, or null for all, got {chosen}"
        )
    return sorted(chosen)


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (B, dim), cosines first, of times (B,), which may be fractional."""
    half = dim // 2
    exponents = torch.arange(half, dtype=timestep.dtype, device=timestep.device) / half
    angles = timestep[:, None] * torch.exp(-math.log(max_period) * exponents)  # (B, dim/2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class UViT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """U-ViT with a shared attention unit. The defaults are U-ViT-S/2 for CIFAR-10 with DIA-LSTM.

    Args:
        sample_size: height and width of the images; a multiple of patch_size.
        patch_size: height and width of a patch.
        in_channels: channels of the images.
        hidden_size: width N of the tokens.
        num_layers: transformer blocks, an odd number: in blocks, one middle block, and as many out blocks.
        num_attention_heads: heads; must divide hidden_size.
        mlp_ratio: hidden width of the MLPs over hidden_size.
        qkv_bias: a bias on queries, keys and values.
        time_embed_mlp: an MLP on the sinusoidal time embedding.
        num_classes: classes of a class-conditional model, not counting the null label; None is unconditional.
        final_conv: a 3x3 convolution on the image assembled from the patches.
        long_skips: long skips from in blocks to out blocks.
        residual_skips: residual connections around attention and MLP.
        layer_norm: LayerNorms in the blocks and before the decoder.
        attention: the shared unit by name (see build_attention), None or "none" for plain U-ViT.
        attention_kwargs: further arguments of the unit, such as {"reduction": 16}.
        attention_blocks: the blocks that carry the unit, counted from 0 in execution order (in, middle, out blocks);
            None is all.
        pool_tokens: the tokens that the unit pools over, "all" or "patch".
        initialization: "uvit" (all normal with standard deviation 0.02), or "xavier" (Xavier-uniform linear layers,
            position embeddings of unit variance), with which narrow networks learn patch positions early.
        skip_scaling: the factor of the long skips (ScaleLong, arXiv 2310.13545): "none", "constant" (1/sqrt(2)),
            "power" (kappa^(i-1) for the i-th long skip, counted from the outermost, which is unscaled), or "learned"
            (see SkipCalibration).
        skip_kappa: kappa of skip_scaling "power", above 0 and at most 1; ScaleLong suggests 0.5 to 0.95.
        qk_norm: RMSNorm with learned scales on the queries and keys of each head.
        drop_path: stochastic depth (Huang et al. 2016): the probability that training drops a residual branch of the
            last block for an image. It rises linearly from 0 in the first block.

    Raises:
        InputError: inconsistent sizes, or an unknown unit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        hidden_size: int = 512,
        num_layers: int = 13,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        time_embed_mlp: bool = False,
        num_classes: int | None = None,
        final_conv: bool = True,
        long_skips: bool = True,
        residual_skips: bool = True,
        layer_norm: bool = True,
        attention: str | None = "dia-lstm",
        attention_kwargs: dict[str, Any] | None = None,
        attention_blocks: list[int] | None = None,
        pool_tokens: str = "all",
        initialization: str = "uvit",
        skip_scaling: str = "none",
        skip_kappa: float | None = None,
        qk_norm: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if min(hidden_size, in_channels) < 1 or mlp_ratio <= 0 or (num_classes is not None and num_classes < 1):
            raise InputError(
                "`hidden_size`, `in_channels`, `mlp_ratio` and `num_classes` must be above 0, got "
                f"{hidden_size}, {in_channels}, {mlp_ratio} and {num_classes}"
            )
        if num_layers < 1 or num_layers % 2 == 0:
            raise InputError(f"`num_layers` must be odd (in, middle and out blocks), got {num_layers}")
        if patch_size < 1 or sample_size < 1 or sample_size % patch_size:
            raise InputError(f"`sample_size` must be a multiple of patch_size {patch_size}, got {sample_size}")
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise InputError(f"`num_attention_heads` must divide hidden_size {hidden_size}, got {num_attention_heads}")
        if pool_tokens not in POOLINGS:
            raise InputError(f"`pool_tokens` must be one of {', '.join(POOLINGS)}, got {pool_tokens!r}")
        if initialization not in INITIALIZATIONS:
            raise InputError(f"`initialization` must be one of {', '.join(INITIALIZATIONS)}, got {initialization!r}")
        if skip_scaling not in SKIP_SCALINGS:
            raise InputError(f"`skip_scaling` must be one of {', '.join(SKIP_SCALINGS)}, got {skip_scaling!r}")
        if skip_scaling != "none" and not (long_skips and num_layers > 1):
            raise InputError(f"`skip_scaling` must be none for a network without long skips, got {skip_scaling!r}")
        if skip_scaling != "power" and skip_kappa is not None:
            raise InputError(f"`skip_kappa` must be null unless skip_scaling is power, got {skip_kappa}")
        if skip_scaling == "power" and (skip_kappa is None or not 0 < skip_kappa <= 1):
            raise InputError(f"`skip_kappa` must be above 0 and at most 1 for skip_scaling power, got {skip_kappa}")
        if not 0 <= drop_path < 1:
            raise InputError(f"`drop_path` must be 0 or more and below 1, got {drop_path}")
        if drop_path and not (residual_skips and num_layers > 1):
            raise InputError(f"`drop_path` must be 0 without residual_skips or with one block, got {drop_path}")
        if decided := SET_BY_MODEL & (attention_kwargs or {}).keys():
            raise InputError(f"`attention_kwargs` must not have {min(decided)}, which the model sets")

        self.attention_blocks = blocks_with_unit(attention_blocks, num_layers, attention)

        self.gradient_checkpointing = False
        self.sample_size, self.patch_size, self.in_channels = sample_size, patch_size, in_channels
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.num_prefix_tokens = 1 if num_classes is None else 2
        self.num_unpooled_tokens = self.num_prefix_tokens if pool_tokens == "patch" else 0
        num_patches = (sample_size // patch_size) ** 2
        half = num_layers // 2
        # Factors of the long skips, from the outermost to the innermost.
        factors = {"constant": [2**-0.5] * half, "power": [(skip_kappa or 1.0) ** index for index in range(half)]}
        self.skip_factors: list[float] | None = factors.get(skip_scaling)
        self.drop_path = drop_path

        def block(index: int) -> Block:
            return Block(
                hidden_size,
                num_attention_heads,
                mlp_ratio,
                qkv_bias,
                long_skip=long_skips and index > half,
                residual=residual_skips,
                layer_norm=layer_norm,
                carries_unit=index in self.attention_blocks,
                qk_norm=qk_norm,
                drop_path=drop_path * index / max(1, num_layers - 1),
            )

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.time_embed: nn.Module = nn.Identity()
        if time_embed_mlp:
            self.time_embed = nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size)
            )
        # The last row is the null label, which stands for "no class".
        self.label_embed = None if num_classes is None else nn.Embedding(num_classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + num_patches, hidden_size))
        self.in_blocks = nn.ModuleList(block(index) for index in range(half))
        self.mid_block = block(half)
        self.out_blocks = nn.ModuleList(block(index) for index in range(half + 1, num_layers))
        self.norm = nn.LayerNorm(hidden_size) if layer_norm else nn.Identity()
        self.decoder = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.output_conv: nn.Module = nn.Identity()
        if final_conv:
            self.output_conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)
        self._initialize(initialization)

        # Last and from a separate generator, so that the backbone starts the same with and without it.
        with forked_rng():
            num_blocks = len(self.attention_blocks)
            unit = build_attention(attention, hidden_size, num_blocks=num_blocks, **(attention_kwargs or {}))
        self.skip_calibration = None
        if skip_scaling == "learned":
            with forked_rng():  # after the unit, so that it starts the same with and without it
                self.skip_calibration = SkipCalibration(self.num_prefix_tokens + num_patches)
        self.unit = unit
        self.unit_needs_time = attention is not None and attention in UNITS and UNITS[attention].needs_time

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "UViT":
        """A published size by name, with its patch size: "S/2", "S-deep/2", "M/4", "L/4", "H/2", "tiny/2"."""
        name, _, patch = size.partition("/")
        if name not in UVIT_SIZES or not patch.isdecimal():
            names = ", ".join(UVIT_SIZES)
            raise InputError(f"size must be SIZE/PATCH with SIZE one of {names}, such as S/2, got {size!r}")
        return cls(**{**UVIT_SIZES[name], "patch_size": int(patch), **kwargs})

    def _initialize(self, initialization: str) -> None:
        xavier = initialization == "xavier"
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if xavier:
            nn.init.normal_(self.pos_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if xavier:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        depth_draws: Tensor | None = None,
    ) -> UViTOutput | tuple[Tensor]:
        """Predicts from a noisy sample.

        Args:
            sample: (B, C, H, W), x_t.
            timestep: (B,) or a number, 0..999, fractions allowed.
            class_labels: (B,) int64, 0..num_classes - 1, or num_classes for the null label; None means the null label
                for every image. Only for class-conditional models.
            return_dict: False returns a tuple.
            depth_draws: (B, num_layers, 2), uniform in [0, 1), for stochastic depth: a block's attention or MLP branch
                is dropped if its number is below the block's rate. None draws them from torch's generator. Used only
                in training with `drop_path`.
        """
        channels, size = self.in_channels, self.sample_size
        if tuple(sample.shape[1:]) != (channels, size, size):
            raise InputError(f"`sample` must have shape (B, {channels}, {size}, {size}), got {tuple(sample.shape)}")
        x = rearrange(self.patch_embed(sample), "B N h w -> B (h w) N")  # (B, L, N)
        embedding = self._sinusoidal_embedding(timestep, x)
        tokens = [self.time_embed(embedding.to(self.pos_embed.dtype))[:, None], x]
        if self.label_embed is not None:
            tokens.insert(0, self._label_token(class_labels, x))
        elif class_labels is not None:
            raise InputError("`class_labels` must be None for an unconditional model, got labels")
        x = torch.cat(tokens, dim=1) + self.pos_embed  # (B, prefix + L, N)

        unit: Any = self.unit
        state: Any = unit.first_state(embedding) if self.unit_needs_time else None
        draws: list[Tensor | None] = [None] * (2 * len(self.in_blocks) + 1)
        if self.training and self.drop_path:
            if depth_draws is None:
                depth_draws = torch.rand(len(x), len(draws), 2, device=x.device)
            draws = list(depth_draws.unbind(dim=1))

        half, skips = len(self.in_blocks), []
        for index, block in enumerate(self.in_blocks):
            x, state = self._run(block, x, state, draws[index])
            skips.append(x)
        x, state = self._run(self.mid_block, x, state, draws[half])
        for index, block in enumerate(self.out_blocks, start=half + 1):
            skip = skips.pop()
            x, state = self._run(block, x, state, draws[index], skip, self._skip_scale(skip, len(skips)))

        patches = self.decoder(self.norm(x[:, self.num_prefix_tokens :]))  # (B, L, p p C)
        p, h = self.patch_size, self.sample_size // self.patch_size
        image = rearrange(patches, "B (h w) (p q C) -> B C (h p) (w q)", h=h, p=p, q=p)
        prediction = self.output_conv(image)
        return UViTOutput(sample=prediction) if return_dict else (prediction,)

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        state: Any,
        draws: Tensor | None,
        skip: Tensor | None = None,
        skip_scale: Tensor | float | None = None,
    ) -> tuple[Tensor, Any]:
        unit = None if self.unit is None else self._recalibrate
        arguments = (x, unit, state, skip, skip_scale, draws)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def _skip_scale(self, skip: Tensor, index: int) -> Tensor | float | None:
        """The factor of the long skip from in block `index`; None leaves it unscaled."""
        if self.skip_calibration is not None:
            return self.skip_calibration(skip)
        return None if self.skip_factors is None else self.skip_factors[index]

    def _recalibrate(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert self.unit is not None
        return self.unit(features, state, self.num_unpooled_tokens, self.num_prefix_tokens)

    def _sinusoidal_embedding(self, timestep: Tensor | float | int, x: Tensor) -> Tensor:
        """Embedding (B, N) of the time."""
        # Sines of times up to 999 need float32, whatever the model's precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        timestep = torch.as_tensor(timestep, dtype=dtype, device=x.device).expand(x.shape[0])
        return timestep_embedding(timestep, self.hidden_size)

    def _label_token(self, class_labels: Tensor | None, x: Tensor) -> Tensor:
        assert self.label_embed is not None and self.num_classes is not None
        if class_labels is None:
            class_labels = torch.full((x.shape[0],), self.num_classes, device=x.device)
        return self.label_embed(class_labels)[:, None].to(x.dtype)  # (B, 1, N)


BACKBONES.register("uvit", Backbone(UViT, units_at="before every MLP"))
