"""kill -9 of all processes or one of them at any moment: the same command resumes and ends with identical files."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.io import atomic_dir, remove_partial
from dia_diffusion.training.checkpoint import check_checkpoint
from dia_diffusion.training.run_folder import logged_step as steps
from tests.faults.harness import Launched, being_written, checkpoints, leftovers
from tests.processes import FORKED, Forked, hold_checkpoints, hold_steps, start_connected, wait_for
from tests.training.run_files import assert_same_run

KILLS = 30
LENGTH = 1500  # steps, more than can be done between that many kills


def test_killed_within_a_checkpoint_and_within_a_step(recipe: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    lasting = ["--train.max_steps", 12, "--train.checkpoint_every", 4]
    command = ["train", "--config", recipe, *lasting, "--output", run]

    first = Forked(*command, log=log, prepare=partial(hold_checkpoints, 5))
    first.until(lambda: checkpoints(run) == [4] and len(being_written(run)) == 2)
    first.kill()
    assert checkpoints(run) == [4] and leftovers(run)

    second = Forked(*command, log=log, prepare=partial(hold_steps, 6))
    second.until(lambda: checkpoints(run) == [4, 8] and steps(run / "metrics.jsonl") == 9)
    second.kill()

    third = Forked(*command, log=log)
    assert third.wait() == 0
    assert "resuming from step 8" in third.text()
    assert main(["train", "--config", str(recipe), *map(str, lasting), "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(run, tmp_path / "whole", 12)
    assert not leftovers(run)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_thirty_kills_of_two_processes(recipe: Path, tmp_path: Path) -> None:
    lasting = ["--train.max_steps", LENGTH, "--train.checkpoint_every", 20, "--train.log_every", 5]
    whole = Launched("train", "--config", recipe, *lasting, "--output", tmp_path / "whole", log=tmp_path / "whole.log")
    assert whole.process.wait() == 0, (tmp_path / "whole.log").read_text()

    run, log = tmp_path / "run", tmp_path / "log"
    command = ["train", "--config", recipe, *lasting, "--output", run]
    file, draw = run / "metrics.jsonl", random.Random(0)
    within, starting, lost, reached = 0, 0, 0, 0
    for _ in range(KILLS):
        kept, before = max(checkpoints(run), default=0), file.stat().st_ino if file.is_file() else None
        running = Launched(*command, log=log, seconds_between_files=0.2)
        if draw.random() < 0.15:
            starting += 1
            time.sleep(draw.uniform(0, 6))
            running.kill()
        else:
            # When training resumes, the metrics of steps after the checkpoint are dropped by writing a new file.
            wait_for(lambda old=before, kept=kept: file.is_file() and file.stat().st_ino != old and steps(file) > kept)
            time.sleep(draw.uniform(0, 2))
            running.kill()
            within += bool(being_written(run))
        reached, newest = steps(file), max(checkpoints(run), default=0)
        assert newest >= kept and (newest == 0 or check_checkpoint(run / "checkpoints" / f"step-{newest:08d}"))
        lost = max(lost, reached - newest)
    assert Launched(*command, log=log).process.wait() == 0, log.read_text()[-3000:]
    print(
        f"{KILLS} kills: {within} within the write of a checkpoint, {starting} while it started; at most {lost} steps "
        f"were to be done again, of 20 between checkpoints; step {reached:,} at the last kill"
    )
    assert within >= 5 and 5 * 20 < reached < LENGTH
    assert lost <= 20
    assert_same_run(run, tmp_path / "whole", LENGTH)
    assert not leftovers(run)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_ends_the_other(victim: int, recipe: Path, tmp_path: Path) -> None:
    """The processes are started without a launcher, which would end the other one."""
    run = tmp_path / "run"
    command = ["train", "--config", recipe, "--output", run, "--train.max_steps", 8, "--train.checkpoint_every", 4]
    running = start_connected(*command, logs=tmp_path, prepare=partial(hold_steps, 6, rank=victim))
    running[0].until(lambda: checkpoints(run) and steps(run / "metrics.jsonl") >= 5)
    running[victim].kill()
    survivor = running[1 - victim]
    assert survivor.wait() == 1
    expected = "failed: another process of this launch has ended or can't be reached (Connection "
    assert expected in survivor.last_line() and survivor.last_line().endswith("resumes from what is written")
    assert "Traceback" not in survivor.text()
    assert checkpoints(run) == [4], "nothing is written after"
    if victim == 1:
        again = start_connected(*command, logs=tmp_path)
        assert [process.wait() for process in again] == [0, 0]
        assert "resuming from step 4" in again[0].text()
        assert checkpoints(run) == [4, 8]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_under_a_launcher(victim: int, recipe: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["train", "--config", recipe, "--output", run, "--train.max_steps", 400, "--train.checkpoint_every", 20]
    running = Launched(*command, log=log, seconds_between_files=0.2)
    wait_for(lambda: checkpoints(run), 100)
    running.workers()[victim].kill()
    killed = time.monotonic()
    assert running.process.wait(60) == 1
    print(f"all ended {time.monotonic() - killed:.1f} s after process {victim} was killed")
    kept = checkpoints(run)
    assert kept and "dia_diffusion/cli/main.py" not in log.read_text(), "no traceback of ours beside the launcher's own"
    assert Launched(*command, log=log).process.wait() == 0, log.read_text()
    assert f"resuming from step {max(kept)}" in log.read_text()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    place = tmp_path / "step"
    with atomic_dir(place) as temporary:
        (temporary / "weights").write_text("the only ones")
    killed = FORKED.Process(target=_die_between_the_renames, args=(place,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not place.exists()
    remove_partial(tmp_path)
    assert (place / "weights").read_text() == "the only ones" and list(tmp_path.iterdir()) == [place]


def _die_between_the_renames(place: Path) -> None:
    from dia_diffusion import io

    rename, calls = io.os.rename, []

    def once(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGKILL)
        rename(*paths)

    io.os.rename = once
    with atomic_dir(place) as temporary:
        (temporary / "weights").write_text("new ones")
