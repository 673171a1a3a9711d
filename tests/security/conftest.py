"""Hostile files and what watches their readers.

Every reader is tried with every kind of file, which are two thousand cases: of each test's many, the default run takes
one in eight, and `pytest -m "long or not long" tests/security` all.
"""

from collections import defaultdict

import pytest

from tests.evaluation.conftest import extractor
from tests.pipelines.conftest import save
from tests.security.watch import sandbox

__all__ = ["extractor", "sandbox", "save"]

MANY, ONE_IN = 12, 8


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks most cases of the tests of this room that have many as long."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "tests/security/" in item.nodeid and "test_fuzzing" not in item.nodeid:
            cases[item.nodeid.partition("[")[0]].append(item)
    for group in cases.values():
        for index, item in enumerate(group if len(group) > MANY else []):
            if index % ONE_IN:
                item.add_marker(pytest.mark.long)
