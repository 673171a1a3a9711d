"""What keeps a run from starting: another folder on some rank, another recipe, other images, or results in the way."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dia_diffusion.distributed import broadcast_from_rank_zero, on_all_ranks
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders
from dia_diffusion.pipelines.folder import TRAINING_FILE
from dia_diffusion.reading import read_json_object
from dia_diffusion.training.randomness import RANDOMNESS
from dia_diffusion.training.recipe import changed_keys
from dia_diffusion.training.run_folder import RunFolder

SECONDS_TO_SEE_A_FILE = 90.0
"""Until one machine sees what another wrote to a shared disk. NFS caches for 30 to 60 s (acdirmax) that a file doesn't
exist."""
SECONDS_UNTIL_MESSAGE = 10.0


def check_shared(folder: RunFolder, accelerator: Accelerator, message: Callable[[str], None]) -> None:
    """Raises InputError, on all ranks, if one sees another folder than rank 0, which holds its lock.

    message: shows a line of a rank that has to wait for a slow shared disk.
    """
    lock = broadcast_from_rank_zero(accelerator, folder.lock_text)

    def check() -> None:
        started, reported = time.monotonic(), False
        while folder.lock_text() != lock:
            waited = time.monotonic() - started
            if waited > SECONDS_TO_SEE_A_FILE:
                raise InputError(f"output {folder.path} is not one folder; all machines must share it")
            if waited > SECONDS_UNTIL_MESSAGE and not reported:
                seconds = round(SECONDS_TO_SEE_A_FILE)
                message(f"waiting up to {seconds} s for {folder.path} to appear on {socket.gethostname()}")
                reported = True
            time.sleep(0.5)

    on_all_ranks(accelerator, check)


def check_resumed_run(path: Path, experiment: Any, fingerprint: str, state: dict[str, Any]) -> None:
    """Raises InputError if a run can't resume with this recipe and these images from a checkpoint with this state."""
    refuse_changes(state["recipe"], experiment, path)
    if state["step"] < experiment.train.max_steps:
        refuse_other_randomness(state, path)
    if state["data"]["fingerprint"] != fingerprint:
        raise InputError(f"data.source {experiment.data.source} has other images than {path} was trained on")


def refuse_changes(old: dict[str, Any], experiment: Any, path: Path) -> None:
    """Raises InputError if a run's recipe has changed in more than may change on resuming."""
    if ("noise" in old) != hasattr(experiment, "noise"):
        kind = "train" if "noise" in old else "classify"
        raise InputError(f"{path} holds a run of dia-diffusion {kind}; choose another output")
    changed = changed_keys(old, experiment)
    if changed:
        raise InputError(
            f"{path} holds a run of another recipe ({'; '.join(changed)}); "
            "resume it with its own recipe, or choose another output"
        )


def refuse_other_randomness(origin: dict[str, Any], path: Path) -> None:
    """Raises InputError if a run began with other random streams than this version's.

    origin: a checkpoint's state, a pipeline's training.json or a trial's result; version 1 is not named in them.
    """
    version = origin.get("randomness", 1)
    if version != RANDOMNESS:
        raise InputError(
            f"{path} was trained with randomness {version}, and this version of dia-diffusion trains with randomness "
            f"{RANDOMNESS} (other image order, noise and augmentation); finish it with the version that began it, or "
            "choose another output (dia-diffusion train --init-from starts from its weights)"
        )


def check_new_run(folder: RunFolder, experiment: Any) -> None:
    """Raises InputError if a new run would overwrite pipelines or classifiers of another, whose checkpoints are gone.

    A run that was killed between its first pipeline and its first checkpoint starts again and makes the same one.
    """
    first = min(experiment.train.checkpoint_every, experiment.train.max_steps)
    for made in (folder.pipelines, folder.classifiers):
        places = step_folders(made)
        if places and not (places.keys() == {first} and _is_recipe_of(experiment, places[first])):
            raise InputError(
                f"{folder.path} has {made.name} and no checkpoint to resume from, and a new run would overwrite them; "
                "choose another output"
            )


def _is_recipe_of(experiment: Any, place: Path) -> bool:
    """Whether a new run of this recipe makes this pipeline or classifier again; an older one lacks newer keys."""
    try:
        training = read_json_object(place / TRAINING_FILE)
        same_recipe = not changed_keys(training["recipe"], experiment, may_change=frozenset())
        return same_recipe and training.get("randomness", 1) == RANDOMNESS
    except (OSError, ValueError, KeyError, AttributeError):
        return False
