"""Readers of mutated files either succeed or raise a one-line InputError, never anything else.

The quick run tries the same few hundred files each time. `pytest -m long tests/security/test_fuzzing.py` tries others
for ten minutes, or FUZZ_SECONDS, starting at FUZZ_SEED.
"""

import os
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, seed, settings

from dia_diffusion.errors import InputError
from tests.security.fuzzing import JSON, hostile_data, targets
from tests.security.readers import Reader
from tests.security.watch import bounded_memory, check_line, watched

SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "1"))
QUICK, QUICK_WHERE_SLOW, BATCH = 25, 8, 200
NAMES = [
    *(*JSON, "recipe", "classifier's recipe", "protocol", "study"),
    *("checkpoint's weights", "network's weights", "features' weights", "statistics", "statistics in npz"),
    *("PNG image", "JPEG image", "GIF image", "TIFF image", "BMP image", "WEBP image", "PPM image", "zip of images"),
    *("array", "arrays in npz", "binary archive", "python archive", "binary batch", "python batch", "pickled weights"),
]
# Slow to read, so only a few files are tried.
SLOW = ["recipe", "classifier's recipe", "study", "metrics on a page", "pipeline's index", "network's config"]
SLOW += ["network's weights", "classifier's config"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    folder = tmp_path_factory.mktemp("fuzzed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIA_DIFFUSION_CACHE", str(folder / "cache"))
        made = targets(folder)
        assert sorted(made) == sorted(NAMES)
        yield made


def fuzz(name: str, target: Reader, examples: int, number: int) -> None:
    """Tries `examples` files, drawn with seed `number`."""
    original = target.file.read_bytes()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_data(target))
    def reads(data: bytes) -> None:
        target.file.write_bytes(data)
        try:
            target.read()
        except InputError as error:
            check_line(str(error))

    try:
        with warnings.catch_warnings(), bounded_memory(), watched() as seen:
            warnings.simplefilter("ignore")
            reads()
        assert not seen.started and not seen.connected, name
    finally:
        target.file.write_bytes(original)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_whole_and_changed_ones_are_refused(name: str, files: dict[str, Reader]) -> None:
    files[name].read()
    fuzz(name, files[name], QUICK_WHERE_SLOW if name in SLOW else QUICK, 0)


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS + 300)
@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_refused_for_long(name: str, files: dict[str, Reader]) -> None:
    end, number = time.monotonic() + SECONDS / len(NAMES), FIRST_SEED
    while time.monotonic() < end:
        fuzz(name, files[name], BATCH // 10 if name in SLOW else BATCH, number)
        number += 1
    print(f"{name}: batches {FIRST_SEED} to {number - 1}")
