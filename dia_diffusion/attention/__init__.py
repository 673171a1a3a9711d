"""The paper's attention units, their controls, and how a network gets one."""

from dia_diffusion.attention.dia_lstm import DIALSTM
from dia_diffusion.attention.units import UNITS, Unit, build_attention

__all__ = ["DIALSTM", "UNITS", "Unit", "build_attention"]
