"""bench/gpu.py on a CPU with tiny settings: pieces that resume, and the page that they write."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
from gpu import write_page

ROOT = gpu.ROOT
STUDY = """
output: unused
recipe: {recipe}
overrides: {{train.compile: false}}
runs:
  - {{units: [none, dia-lstm, se], batch_sizes: [8], seeds: [0, 1]}}
steps: 4
points: 2
protocol: {protocol}
"""
PROTOCOL = "{features: digits, num_samples: 8, sampler: dpmsolver++, steps: 2, reference_split: test}"


def options(out: Path, **changes: Any) -> Any:
    given = {"out": out, "units": "none,dia-lstm", "batch_sizes": "32,128", "suites": gpu.SUITES, "no_tests": False}
    given |= {"steps": None, "training_minutes": 20.0, "data": None, "study": "cifar10_fig8_short"}
    return SimpleNamespace(**given | changes)


def test_tasks_resume_in_order_and_only_a_study_takes_more_than_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    codes: dict[str, list[int | None]] = {
        "fid": [1],
        "sample": [None, None],
        "study": [None, None, 0],
    }  # None: too slow

    def run(task: gpu.Task, *_: Any) -> tuple[float, int | None]:
        ran.append(task.name)
        left = codes.get(task.name.removeprefix("before-"), [])
        return 1.0, left.pop(0) if left else 0

    monkeypatch.setattr(gpu, "_task", lambda name, *_: gpu.Task(name, [], resumable=name == "study"))
    monkeypatch.setattr(gpu, "_run", run)
    given, state = options(tmp_path, suites="train,sample,fid"), gpu.State()
    for next_task in ("study", "study", "before-sample", "before-fid", ""):
        assert gpu._work(given, state, 0.0).partition(",")[0] == next_task
        state = gpu._read(tmp_path)
    before = ["test_processes", "test_sampling", "test_training", "before-train-b32", "before-train-b128"]
    tried = ["study", "study", "study", "before-sample", "before-sample", "before-fid"]
    assert ran == [*before, *tried, "after-train-b32", "after-train-b128", "after-sample"]
    assert state.done["before-fid"]["code"] == 1 and state.done["before-sample"]["code"] is None


STOPS_WELL = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
def stop(*_):
    print("checkpoint written", child.pid, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(300)
"""


def test_a_task_is_stopped_by_a_signal_when_its_time_is_over(tmp_path: Path) -> None:
    task = gpu.Task("study", [sys.executable, "-c", STOPS_WELL], resumable=True)
    seconds, code = gpu._run(task, tmp_path, time.monotonic() + 3)
    assert code is None and seconds < 10
    begun, *written, child = (tmp_path / "study.log").read_text().split()
    assert (begun, written) == ("begun", ["checkpoint", "written"])
    with pytest.raises(ProcessLookupError):  # its child process has ended, too
        for _ in range(50):
            os.kill(int(child), 0)
            time.sleep(0.1)


def test_steps_fit_into_the_minutes_that_training_is_given(tmp_path: Path) -> None:
    """Two runs at 0.03 s per step in 20 minutes: 20,000 steps, in whole hundreds at each of 5 points."""
    rows = [{"what": "dia-diffusion", "seconds": 9.0}, {"what": "dia-diffusion, DIA-LSTM, compiled", "seconds": 0.0305}]
    (tmp_path / "before-train-b32.json").write_text(json.dumps({"tables": [{"figures": rows}]}))
    state = gpu.State()
    place = gpu._write_study(options(tmp_path, data="images.zip"), state)
    study = gpu.read_study(str(place))
    assert state.steps == 19_500 and [run.name for run in study.runs] == ["none-b32-s0", "dia-lstm-b32-s0"]
    assert {run.experiment.data.source for run in study.runs} == {"images.zip"}
    assert study.runs[0].steps == [3900, 7800, 11_700, 15_600, 19_500]


def test_the_page_compares_after_with_before(tmp_path: Path) -> None:
    about = {"processor": "p", "precision": "bfloat16 (it has it)", "environment": {"device": "Card"}}
    for name, seconds in (("before-train-b32", 0.02), ("after-train-b32", 0.025)):
        timing = {"name": "ours", "seconds": [seconds, 2 * seconds, seconds], "block": 20}
        row = {"what": "ours", "seconds": seconds, "images/s": 32 / seconds, "% of peak": 41.0}
        table = {"title": "A step", "figures": [row], "timings": [timing], "note": "products reach 600 TFLOP/s"}
        (tmp_path / f"{name}.json").write_text(json.dumps({**about, "tables": [table]}))
    done = {name: {"seconds": 1.5, "code": 0} for name in ("before-train-b32", "after-train-b32")}
    page = write_page(tmp_path, done).read_text()
    assert page.startswith("# Measured on Card") and "products reach 600 TFLOP/s" in page
    assert "| ours | 20 | 20 to 40 | 3 x 20 | 1600 | 41 |" in page
    assert "| ours | 25 | 25 to 50 | 3 x 20 | 1280 | 41 | 1.25 |" in page


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_pieces_on_a_cpu_end_with_all_tables_and_figures(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(PROTOCOL)
    recipe = ROOT / "train" / "configs" / "digits_uvit_cpu.yaml"
    (tmp_path / "tiny.yaml").write_text(STUDY.format(recipe=recipe, protocol=tmp_path / "small.yaml"))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(out), "--device", "cpu", "--no-tests"]
    command += ["--suites", "train,memory", "--batch-sizes", "8", "--study", str(tmp_path / "tiny.yaml")]
    command += ["--bench-options", "--recipe digits_uvit_cpu --no-compile --rounds 2", "--minutes", "5"]
    environment = {**os.environ, "DIA_DIFFUSION_CACHE": str(tmp_path / "cache")}
    for _ in range(4):
        code = subprocess.run(command, env=environment, timeout=400).returncode
        if code == 0:
            break
        assert code == gpu.MORE_TO_DO
    done = json.loads((out / "state.json").read_text())["done"]
    assert {name: task["code"] for name, task in done.items()} == dict.fromkeys(
        ("before-train-b8", "before-memory", "study", "after-train-b8"), 0
    )
    page = (out / "gpu.md").read_text()
    assert "time / before's" in page and "![curves.png](study/curves.png)" in page
    assert (out / "study" / "curves.png").is_file() and (out / "after-train-b8.png").is_file()
    assert {run.name for run in (out / "study").glob("*-b8-s*")} == {"none-b8-s0", "dia-lstm-b8-s0"}
