"""The rows of a study as tables, and the notes below them."""

from collections.abc import Sequence

from dia_diffusion.sweeps.stats import LEVEL, Comparison, Estimate, Row
from dia_diffusion.tables import Table

NOTHING = "-"
_LEVEL = f"{LEVEL * 100:g} %"


def notes(rows: Sequence[Row]) -> list[str]:
    """Explains the tables' p values and the number of tests they are adjusted for; empty if there are none."""
    compared = [row.comparison for row in rows if row.comparison]
    student = sum(comparison.p_student is not None for comparison in compared)
    paired = sum(comparison.p_paired is not None for comparison in compared)
    if not student and not paired:
        return []
    return [
        "p: Student's two-sample t-test with equal variances over all seeds of the two, and the t-test paired by seed; "
        f"in brackets adjusted by Holm's method for the study's {student} and {paired} tests."
    ]


def tables(rows: Sequence[Row], curve: str, final: str) -> list[Table]:
    """A table of distances and costs and, if there are twins to compare, one of differences.

    curve, final: titles of the distances along the curve and at its end, such as "FID, 10,000 samples (fid10k-dpm50)".
    """
    compared = any(row.comparison for row in rows)
    return [_reached(rows, curve, final), *([_differences(rows, final)] if compared else [])]


def _reached(rows: Sequence[Row], curve: str, final: str) -> Table:
    columns = ["batch size", "unit", "seeds", "images seen", "final", "best", "along the curve"]
    columns += ["training", "time / twin's", "memory"]
    text = [
        [
            f"{row.batch_size}",
            row.unit,
            _seeds(row),
            f"{row.images_seen:,}",
            _mean(row.final),
            _mean(row.best),
            _mean(row.mean_along),
            NOTHING if row.seconds is None else format_time(row.seconds.mean),
            NOTHING if row.time_ratio is None else f"{row.time_ratio:.2f}",
            NOTHING if row.peak_memory_mib is None else f"{row.peak_memory_mib:,} MiB",
        ]
        for row in rows
    ]
    measured = final if final == curve else f"Final {final}, best and along the curve {curve}"
    return Table(columns, text, f"{measured}: mean over seeds ± half of its {_LEVEL} interval")


def _differences(rows: Sequence[Row], final: str) -> Table:
    compared = [(row, row.comparison) for row in rows if row.comparison]
    columns = ["batch size", "unit", "pairs", "difference from none", f"{_LEVEL} interval"]
    columns += ["p (Holm)", "p paired by seed (Holm)"]
    text = [
        [
            f"{row.batch_size}",
            row.unit,
            f"{len(comparison.seeds)}",
            f"{comparison.difference.mean:+.3f}",
            _interval(comparison),
            _p(comparison.p_student, comparison.p_student_holm),
            _p(comparison.p_paired, comparison.p_paired_holm),
        ]
        for row, comparison in compared
    ]
    return Table(columns, text, f"Final {final}, unit minus no unit: negative means the unit is better")


def _seeds(row: Row) -> str:
    """The seeds with a final distance, and how many are still missing or have only a curve."""
    text = f"{len(row.seeds)}"
    if len(row.curve_seeds) != len(row.seeds):
        text += f" (curve {len(row.curve_seeds)})"
    return text if len(row.seeds) == len(row.planned_seeds) else f"{text} of {len(row.planned_seeds)}"


def _mean(value: Estimate | None) -> str:
    if value is None:
        return NOTHING
    return f"{value.mean:.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


def _interval(comparison: Comparison) -> str:
    low, high = comparison.difference.low, comparison.difference.high
    return NOTHING if low is None else f"[{low:+.3f}, {high:+.3f}]"


def _p(raw: float | None, adjusted: float | None) -> str:
    return NOTHING if raw is None or adjusted is None else f"{_probability(raw)} ({_probability(adjusted)})"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_time(seconds: float) -> str:
    """Text such as "1.6 h", "24.0 min" or "40 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
