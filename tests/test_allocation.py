"""Freed memory is used again: the kernel has no new pages to give where larger ones were freed before."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from dia_diffusion.allocation import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
blocks = [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(3)]
del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    words = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_blocks_are_used_again() -> None:
    pages = (64 << 20) // 4096
    if page_faults("usual") < pages // 2:
        pytest.skip("this C library, or huge pages, keep blocks anyway")
    assert page_faults("kept") < pages // 100
