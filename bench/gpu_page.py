"""The page that bench/gpu.py leaves: card, medians, spreads, utilisation, and what the study has found."""

import json
from pathlib import Path
from typing import Any

from dia_diffusion.io import write_text

ENDS = {0: "done", None: "took more than a whole piece", 5: "no tests"}
FIGURES = ("curves.png", "final.png")


def write_page(out: Path, done: dict[str, dict[str, Any]]) -> Path:
    """OUT/gpu.md, from what the tasks have left in OUT.

    done: a task's name -> its seconds and exit code.
    """
    measured = {name: json.loads(file.read_text()) for name in done if (file := out / f"{name}.json").is_file()}
    parts = [_machine(measured), _tasks(out, done)]
    for name, suite in measured.items():
        for table in suite["tables"]:
            parts.append(f"## {name}: {table['title']}")
            parts.append(_timings(name, table, measured) if table["timings"] else _rows(table["figures"]))
            parts += [table["note"]] if table["note"] else []
        if (out / f"{name}.png").is_file():
            parts.append(f"![{name}]({name}.png)")
    results = out / "study" / "results.md"
    if results.is_file():
        parts += ["## Study", results.read_text().strip()]
        parts += [f"![{name}](study/{name})" for name in FIGURES if (out / "study" / name).is_file()]
    write_text(out / "gpu.md", "\n\n".join(parts) + "\n")
    return out / "gpu.md"


def _machine(measured: dict[str, Any]) -> str:
    if not measured:
        return "# Measured on a GPU\n\nNothing yet."
    suite = list(measured.values())[-1]
    rows = {"processor": suite["processor"], "precision": suite["precision"], **suite["environment"]}
    if "gpu" in suite:
        rows |= {"CUDA": suite["gpu"]["cuda"], "clocks": " / ".join(suite["gpu"]["clocks"].splitlines())}
    lines = [f"- {name}: {value}" for name, value in rows.items()]
    return "\n".join([f"# Measured on {suite['environment']['device']}", "", *lines])


def _tasks(out: Path, done: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, task in done.items():
        log = out / f"{name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        ended = ENDS.get(task["code"], f"exit code {task['code']}")
        said = "".join(last).replace(f"{out.resolve()}/", "")  # paths are this machine's own
        rows.append({"task": name, "seconds": task["seconds"], "ended": ended, "last line": said})
    return _rows(rows) if rows else "No task has been done."


def _timings(name: str, table: dict[str, Any], measured: dict[str, Any]) -> str:
    """Of each contender the median and the spread of its seconds, and what the suite has made of them."""
    earlier = _medians(measured.get(name.replace("after-", "before-"))) if name.startswith("after-") else {}
    rows = []
    for timing, figures in zip(table["timings"], table["figures"], strict=True):
        seconds = sorted(timing["seconds"])
        row = {
            "what": timing["name"],
            "median, ms": 1000 * figures["seconds"],
            "lowest to highest": f"{1000 * seconds[0]:.4g} to {1000 * seconds[-1]:.4g}",
            "rounds x runs": f"{len(seconds)} x {timing['block']}",
        }
        row |= {key: value for key, value in figures.items() if key not in ("what", "seconds")}
        if before := earlier.get((table["title"], timing["name"])):
            row["time / before's"] = figures["seconds"] / before
        rows.append(row)
    return _rows(rows)


def _medians(suite: dict[str, Any] | None) -> dict[tuple[str, str], float]:
    tables = [] if suite is None else [table for table in suite["tables"] if table["timings"]]
    return {(table["title"], row["what"]): row["seconds"] for table in tables for row in table["figures"]}


def _rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; numbers to four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
