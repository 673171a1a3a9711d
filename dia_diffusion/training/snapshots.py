"""Snapshots of a run's power-function averages: from them averages of other widths are made after training.

snapshots/step-00001000/width-0.05.safetensors   the average of that relative width, after that step
                        width-0.1.safetensors
                        state.json               step, recipe, data, sha256 of the other files, own checksum
"""

from typing import TYPE_CHECKING

from dia_diffusion.distributed import on_rank_zero
from dia_diffusion.io import step_name
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.checkpoint import Checkpoint, write_checkpoint
from dia_diffusion.training.config import EmaConfig

if TYPE_CHECKING:
    from dia_diffusion.training.trainer import StepResult, Trainer


class SaveSnapshots(Callback):
    """Writes snapshots, before the checkpoint of the step."""

    def __init__(self, config: EmaConfig):
        self.config = config

    def due(self, step: int) -> bool:
        return step % self.config.snapshot_every == 0

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        on_rank_zero(trainer.accelerator, lambda: self._save(trainer))

    def _save(self, trainer: "Trainer") -> None:
        names = [f"width-{width}" for width in self.config.power_widths]
        tensors = {name: trainer.state_with(trainer.averages[name]) for name in names}
        place = trainer.folder.snapshots / step_name(trainer.step)
        write_checkpoint(place, trainer.step, Checkpoint(tensors, trainer.origin()))
