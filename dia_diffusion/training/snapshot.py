"""The recipe's network."""

from dataclasses import asdict

from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.training.config import OF_OTHERS, OF_UVIT, ModelConfig


def build_model(config: ModelConfig) -> UViT | AttachedModel:
    """The recipe's backbone and unit, with first weights from torch's default generator."""
    left_out = [*OF_OTHERS, "backbone"] if config.backbone == "uvit" else OF_UVIT
    given = {key: value for key, value in asdict(config).items() if key not in left_out}
    return UViT(**given) if config.backbone == "uvit" else AttachedModel(**given)
