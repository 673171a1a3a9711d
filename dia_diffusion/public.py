"""The public names, all imported, and UViTPipeline where diffusers looks for it."""

import diffusers

from dia_diffusion.attention import DIALSTM, build_attention
from dia_diffusion.attention.attach import attach
from dia_diffusion.attention.insertion_points import Position
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.pipelines.pipeline_uvit import UViTPipeline

__all__ = ["DIALSTM", "AttachedModel", "Position", "UViT", "UViTPipeline", "attach", "build_attention"]

# DiffusionPipeline.from_pretrained looks a pipeline's class up by name on the diffusers package.
diffusers.UViTPipeline = UViTPipeline
