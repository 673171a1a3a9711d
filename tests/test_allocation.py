"""Freed memory is used again: the kernel has no new pages to give where larger ones were freed before."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from dia_diffusion.environment import keep_freed_memory
from tests.processes import FORKED


def page_faults() -> int:
    """Of a tensor of 64 MiB, after larger ones have been freed.

    glibc looks for some bytes more than a tensor takes, to align it, so a freed block of its very size may not do.
    """
    blocks = [torch.ones((64 << 20) + 4096, dtype=torch.uint8) for _ in range(3)]
    del blocks
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count(file: Path) -> None:
    usual = page_faults()
    keep_freed_memory()
    file.write_text(f"{usual} {page_faults()}")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_blocks_are_used_again(tmp_path: Path) -> None:
    process = FORKED.Process(target=count, args=(tmp_path / "faults",))
    process.start()
    process.join()
    usual, kept = map(int, (tmp_path / "faults").read_text().split())
    pages = (64 << 20) // 4096
    if usual < pages // 2:
        pytest.skip("this C library, or huge pages, keep blocks anyway")
    assert kept < pages // 100
