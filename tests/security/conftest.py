"""Hostile files and a sandbox that watches their readers.

Every reader is tried with every kind of file, two thousand cases in all. Of each test with many cases, the default run
takes one in eight; `pytest -m "long or not long" tests/security` runs all.
"""

from collections import defaultdict

import pytest

from tests.evaluation.conftest import extractor
from tests.pipelines.conftest import save
from tests.security.watch import sandbox

__all__ = ["extractor", "sandbox", "save"]

MANY, ONE_IN = 12, 8


@pytest.hookimpl(tryfirst=True)  # before pytest evaluates marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks most cases of this folder's tests as long where a test has many."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "tests/security/" in item.nodeid and "test_fuzzing" not in item.nodeid:
            cases[item.nodeid.partition("[")[0]].append(item)
    for group in cases.values():
        for index, item in enumerate(group if len(group) > MANY else []):
            if index % ONE_IN:
                item.add_marker(pytest.mark.long)
