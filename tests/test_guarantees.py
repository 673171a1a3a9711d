"""docs/guarantees.md names tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_promise_names_tests_that_there_are() -> None:
    rows = [
        line.strip()[1:-1].split("|")
        for line in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| ---", "| what"))
    ]
    assert len(rows) > 25
    functions = " ".join(re.findall(r"def (test_\w+)", " ".join(FILES.values())))
    for row in rows:
        assert len(row) == 3, f"three columns: {row[0]}"
        named = re.findall(r"(test_\w+\*?)(\.py)?", row[2])
        assert named or "tests/" in row[2], row[0]
        for name, ending in named:
            found = f"{name}.py" in FILES if ending else re.search(rf"\b{name.replace('*', '[a-z]')}", functions)
            assert found, f"{row[0]}: there is no {name}{ending}"
