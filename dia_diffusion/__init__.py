"""Diffusion transformers with Dense-and-Implicit Attention (arXiv 2210.16101)."""

import diffusers

from dia_diffusion.attention import DIALSTM, build_attention
from dia_diffusion.attention.insertion_points import Position
from dia_diffusion.environment import __version__ as __version__
from dia_diffusion.models.attach import attach
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline

__all__ = ["DIALSTM", "AttachedModel", "Position", "UViT", "UViTPipeline", "attach", "build_attention"]

# DiffusionPipeline.from_pretrained looks a pipeline's class up by name on the diffusers package.
diffusers.UViTPipeline = UViTPipeline
