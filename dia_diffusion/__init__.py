"""Diffusion transformers with Dense-and-Implicit Attention (arXiv 2210.16101)."""

import diffusers

from dia_diffusion.attention import DIALSTM, build_attention
from dia_diffusion.attention.attach import attach
from dia_diffusion.attention.places import Position
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline

__version__ = "0.1.0"

__all__ = ["DIALSTM", "AttachedModel", "Position", "UViT", "UViTPipeline", "attach", "build_attention"]

# DiffusionPipeline.from_pretrained looks a pipeline's class up by name on the diffusers package.
diffusers.UViTPipeline = UViTPipeline
