"""`sample` and `fid` on two connected processes give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from tests.training.conftest import TINY
from tests.training.test_processes import free_port

ROOT = Path(__file__).parents[2]


def launch(script: str | Path, *arguments: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # Without the dashes torchrun takes --num for a shortened option of its own.
        [*torchrun, "--", str(ROOT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_sample_and_measure_as_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--output", run]) == 0

    sample = ["sample", run, "--seeds", "3-9", "--steps", "4", "--sampler", "dpmsolver++sde", "--out"]
    assert main([*sample, str(tmp_path / "one.npz")]) == 0
    launch("sample/sample.py", *sample[1:], str(tmp_path / "two.npz"))
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["seeds"].tolist() == two["seeds"].tolist() == list(range(3, 10))
    assert np.abs(one["images"].astype(int) - two["images"]).max() <= 1

    # A folder that holds some of the images already is filled up, whoever made them.
    folder = tmp_path / "images"
    assert main(["sample", run, "--seeds", "4-6", "--steps", "4", "--out", str(folder)]) == 0
    launch("sample/sample.py", run, "--seeds", "0-9", "--steps", "4", "--out", str(folder))
    assert sorted(path.stem for path in folder.glob("*.png")) == [f"{seed:08d}" for seed in range(10)]

    record = str(tmp_path / "records.jsonl")
    fid = [run, "--reference", "digits", "--num", "81", "--steps", "3", "--record"]
    assert main(["fid", *fid, record]) == 0
    launch("eval/fid.py", *fid, str(tmp_path / "two.jsonl"))
    (one_record,), (two_record,) = read_records(record), read_records(tmp_path / "two.jsonl")
    assert one_record.protocol == two_record.protocol
    assert two_record.distance == pytest.approx(one_record.distance, rel=1e-6)


def test_records_that_one_process_does_not_see_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines whose shared disk is slow: nobody waits for the other, all measure again."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--output", run]) == 0
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "fid.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.chdir('elsewhere')\n"
        "from dia_diffusion.cli.main import main\n"
        "sys.exit(main(['fid', *sys.argv[1:]]))\n"
    )
    monkeypatch.chdir(tmp_path)
    fid = [run, "--reference", "digits", "--num", "70", "--steps", "2", "--record", "records.jsonl"]
    assert main(["fid", *fid]) == 0
    launch(script, *fid)
    first, second = read_records("records.jsonl")
    assert second.distance == pytest.approx(first.distance, rel=1e-6)
