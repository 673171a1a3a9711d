"""Nothing grows with time, or faster than the images: a short version of the load test in docs/results/load.md."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from load import ROOT, Seen, ends_of

INDEXED = 1500
"""Bytes of an image's name, place and stamp, at most."""


def test_a_process_that_grows_is_seen() -> None:
    seen = Seen()
    process = subprocess.Popen([sys.executable, "-c", "input(); kept = b'1' * 2**26; input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        for second in range(100):
            seen.look(process.pid, second)
            if second == 40:
                process.stdin.write(b"\n")
                process.stdin.flush()
            if second > 40:
                process.poll()
                if seen.memory[-1] > seen.memory[0] + 60:
                    break
                time.sleep(0.05)
        assert seen.memory[-1] > seen.memory[0] + 60 and min(seen.files) >= 3 and min(seen.threads) == 1
    finally:
        process.kill()
        process.wait()
    seen.look(process.pid, 100)
    assert seen.seconds[-1] < 100, "a process that has ended is not looked at"
    assert ends_of([9.0, 1.0, 1.0, 2.0, 4.0]) == (1.0, 4.0)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_nothing_grows(tmp_path: Path) -> None:
    options = ["--minutes", "3", "--images", "20000", "--index", "100000", "--out", str(tmp_path / "load")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "load.py"), *options], check=True)
    training, fid, folders, zips = (
        table["rows"] for table in json.loads((tmp_path / "load.json").read_text())["tables"]
    )
    changes = {row["what"]: row["change, %"] for row in training}
    for what in ("memory, MiB", "open files", "threads"):
        for process in (0, 1):
            assert abs(changes[f"process {process}: {what}"]) < (5 if "memory" in what else 1), changes
    assert abs(changes["checkpoints on disk, MiB"]) < 1 and abs(changes["a pipeline on disk, MiB"]) < 1
    for rows in (folders, zips):
        assert rows[-1]["bytes an image more"] < INDEXED
        assert rows[-1]["µs an image more"] < 2 * rows[-2]["µs an image more"]
    assert fid[-1]["bytes an image more"] < 32 * 32 * 3 + INDEXED, (
        "decoded once, as bytes, and a place in the zip's index"
    )
