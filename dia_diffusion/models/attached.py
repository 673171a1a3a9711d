"""diffusers' UNet2DModel or DiTTransformer2DModel, with or without attached units, as one model."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from dia_diffusion.attention.insertion_points import Position, insertion_points
from dia_diffusion.attention.units import forked_rng
from dia_diffusion.errors import InputError, first_line
from dia_diffusion.models.attach import Attachment, attach, attachment_in
from dia_diffusion.models.registry import BACKBONES, Backbone, wrapped_networks
from dia_diffusion.models.uvit import UViTOutput

ELSEWHERE = "of dia_diffusion.AttachedModel, which loads this folder"


class AttachedModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A diffusers network in pixel space, with or without units, with UViT's call signature.

    Args:
        backbone: "unet2d" (UNet2DModel) or "dit" (DiTTransformer2DModel).
        backbone_kwargs: further arguments of that class.
        sample_size: height and width of the images.
        in_channels: channels of the images.
        num_classes: classes of a class-conditional model, not counting the null label; None is unconditional.
        has_null_label: whether the backbone embeds a null label after its classes. A wrapped diffusers UNet may have
            none; guidance and sampling without a class are then impossible.
        attention: the units by name (see build_attention), None or "none" for the backbone alone.
        attention_kwargs: further arguments of the units.
        attention_at: names of the network's modules whose outputs the units recalibrate, or lists of a Position's
            fields; None is where attach() puts them by default.
        down_block_types: leave out, like norm_type. They are in the config so that diffusers' own classes, which ignore
            unknown keys and would start with random weights, refuse a saved folder.
        norm_type: see down_block_types.

    Raises:
        InputError: an argument that the backbone or the unit refuses.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        backbone: str = "unet2d",
        backbone_kwargs: dict[str, Any] | None = None,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        num_classes: int | None = None,
        has_null_label: bool = True,
        attention: str | None = "dia-lstm",
        attention_kwargs: dict[str, Any] | None = None,
        attention_at: Sequence[Any] | None = None,
        down_block_types: Sequence[str] = (ELSEWHERE,),
        norm_type: str = ELSEWHERE,
    ):
        super().__init__()
        sides = [sample_size] if isinstance(sample_size, int) else sample_size
        if min(in_channels, *sides) < 1 or (num_classes is not None and num_classes < 1):
            raise InputError(
                "`in_channels`, `sample_size` and `num_classes` must be above 0, got "
                f"{in_channels}, {sample_size} and {num_classes}"
            )
        self.sample_size, self.in_channels = sample_size, in_channels
        self.num_classes, self.has_null_label = num_classes, has_null_label
        row = wrapped_networks().get(backbone)
        if row is None:
            raise InputError(f"`backbone` must be one of {', '.join(wrapped_networks())}, got {backbone!r}")
        embedded = num_classes
        if row.adds_null_label:
            embedded = num_classes or 1
        elif num_classes is not None and has_null_label:
            embedded = num_classes + 1
        self.needs_label = row.adds_null_label
        given = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": in_channels,
            row.classes_argument: embedded,
        }
        self.network = build_network(row.network, backbone_kwargs or {}, given)
        multiple = row.size_multiple(self.network)
        if any(side % multiple for side in sides):
            raise InputError(f"`sample_size` must be a multiple of {multiple} for this {row.name}, got {sample_size}")
        if attention in (None, "none"):
            if attention_kwargs or attention_at is not None:
                key = "attention_kwargs" if attention_kwargs else "attention_at"
                value = attention_kwargs or attention_at
                raise InputError(f"`{key}` must be null without attention, got {value}")
            with forked_rng():  # so that later draws don't depend on the unit
                pass
        else:
            at = None if attention_at is None else [_position(place) for place in attention_at]
            attach(self.network, str(attention), at, **(attention_kwargs or {}))
        self._attachment_of_config = self.attachment
        _without_label_dropout(self.network)

    @classmethod
    def from_backbone(
        cls, model: ModelMixin, attention: str | None = "dia-lstm", at: Any = None, **attention_kwargs: Any
    ) -> "AttachedModel":
        """Wraps a diffusers model with its weights, and attaches units unless it already has some.

        Args:
            model: a UNet2DModel or a DiTTransformer2DModel, which becomes part of the returned model.
            attention: the unit by name; None or "none" attaches none.
            at: see attach().
            attention_kwargs: the unit's arguments.

        Raises:
            InputError: another type of model, one conditioned on something other than classes, or anything that
                attach() refuses.
        """
        name, row = next(
            ((name, row) for name, row in wrapped_networks().items() if type(model) is row.network), ("", None)
        )
        if row is None:
            accepted = " or ".join(row.name for row in wrapped_networks().values())
            raise InputError(f"`model` must be a {accepted}, got a {type(model).__name__}")
        known = inspect.signature(type(model)).parameters  # diffusers' EMAModel adds its own keys
        config = {key: value for key, value in model.config.items() if key in known}
        if config["sample_size"] is None:
            raise InputError("`sample_size` of the model must be the size of its images, got None")
        if config.get("class_embed_type"):
            raise InputError(
                f"`class_embed_type` of the model must be None (class numbers), got {config['class_embed_type']!r}"
            )
        attachment = attachment_in(model)
        if attachment is None and attention not in (None, "none"):
            attachment = attach(model, str(attention), at, **attention_kwargs)
        arguments: dict[str, Any] = {"attention": "none"}
        if attachment is not None:
            places = [[p.module, p.side, p.channels, p.num_prefix_tokens] for p in attachment.positions]
            usual = attachment.positions == insertion_points(model)
            arguments = {
                "attention": attachment.unit_name,
                "attention_kwargs": attachment.unit_kwargs or None,
                "attention_at": None if usual else places,
            }
        own = {"sample_size", "in_channels", row.classes_argument}
        with torch.device("meta"):  # replaced by the given network below
            wrapped = cls(
                backbone=name,
                backbone_kwargs={key: value for key, value in config.items() if key not in own},
                sample_size=config["sample_size"],
                in_channels=config["in_channels"],
                num_classes=config.get(row.classes_argument),
                has_null_label=row.adds_null_label,
                **arguments,
            )
        wrapped.network, wrapped._attachment_of_config = model, attachment
        _without_label_dropout(model)
        return wrapped

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers. Raises InputError: units were attached or detached after the model was created."""
        if self.attachment is not self._attachment_of_config:
            raise InputError(
                f"the units must be those that the model was created with, attention {self.config.attention!r}, got "
                "others; save AttachedModel.from_backbone(model.network) instead"
            )
        super().save_pretrained(*args, **kwargs)

    @property
    def unit(self) -> nn.Module | None:
        """The units, one per stage of the network; None without units."""
        attachment = self.attachment
        return None if attachment is None else attachment.units

    @property
    def attachment(self) -> Attachment | None:
        """The units' stages and positions in the backbone."""
        return attachment_in(self.network)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UViTOutput | tuple[Tensor]:
        """Predicts from a noisy sample.

        Args:
            sample: (B, C, H, W), x_t.
            timestep: (B,) or a number, 0..999, fractions allowed.
            class_labels: (B,) int64, 0..num_classes - 1, or num_classes for the null label; None means the null label
                for every image. Only for class-conditional models.
            return_dict: False returns a tuple.
        """
        if sample.dim() != 4 or sample.shape[1] != self.in_channels:
            raise InputError(f"`sample` must have shape (B, {self.in_channels}, H, W), got {tuple(sample.shape)}")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if self.num_classes is None:
            if class_labels is not None:
                raise InputError("`class_labels` must be None for an unconditional model, got labels")
            if self.needs_label:
                class_labels = torch.zeros(len(sample), dtype=torch.long, device=sample.device)  # its only class
        elif class_labels is None:
            if not self.has_null_label:
                raise InputError(
                    f"`class_labels` must be 0..{self.num_classes - 1} for a model without a null label, got None"
                )
            class_labels = torch.full((len(sample),), self.num_classes, device=sample.device)
        (prediction,) = self.network(sample, timestep, class_labels=class_labels, return_dict=False)
        return UViTOutput(sample=prediction) if return_dict else (prediction,)


def build_network(kind: type[ModelMixin], kwargs: dict[str, Any], given: dict[str, Any]) -> ModelMixin:
    """A newly initialized diffusers network; `kwargs` may repeat arguments in `given` only with the same values.

    Raises InputError: arguments that the class doesn't have or refuses.
    """
    known = sorted(inspect.signature(kind).parameters)
    for key, value in kwargs.items():
        if key not in known:
            raise InputError(f"`backbone_kwargs` must be of {', '.join(known)} for {kind.__name__}, got {key!r}")
        if key in given and value != given[key] and key != "out_channels":
            raise InputError(
                f"`backbone_kwargs` must not have {key}, which the model sets to {given[key]!r}, got {value!r}"
            )
    if embedded := kwargs.get("class_embed_type"):
        raise InputError(f"`backbone_kwargs.class_embed_type` must be null (class numbers), got {embedded!r}")
    try:
        return kind(**{**given, **kwargs})
    except Exception as error:  # diffusers checks its arguments late, or not at all
        raise InputError(f"{kind.__name__} can't be built from backbone_kwargs: {first_line(error)}") from None


def _without_label_dropout(network: Any) -> None:
    """Turns off a DiT's own, unseeded label dropout; a recipe's data.label_dropout is seeded."""
    for module in network.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


def _position(place: Any) -> str | Position:
    """An insertion point from a config."""
    if isinstance(place, str | Position):
        return place
    try:
        return Position(*place)
    except TypeError:
        raise InputError(f"`attention_at` must hold names of the network's modules, got {place!r}") from None


INTERNAL = ("has_null_label", "down_block_types", "norm_type")
BACKBONES.register(
    "unet2d",
    Backbone(
        AttachedModel,
        INTERNAL,
        "after every resnet block",
        UNet2DModel,
        classes_argument="num_class_embeds",
        # diffusers' blocks double an odd side to one more than the long skip has
        size_multiple=lambda network: 2 ** sum(bool(block.downsamplers) for block in network.down_blocks),
    ),
)
BACKBONES.register(
    "dit",
    Backbone(
        AttachedModel,
        INTERNAL,
        "before every MLP",
        DiTTransformer2DModel,
        classes_argument="num_embeds_ada_norm",
        adds_null_label=True,
        size_multiple=lambda network: network.config.patch_size,
    ),
)
