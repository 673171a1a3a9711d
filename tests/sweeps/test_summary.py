import pytest

from dia_diffusion.sweeps.collect import measured, training_cost
from dia_diffusion.sweeps.stats import curve_of, summarize
from dia_diffusion.sweeps.table import notes, tables
from dia_diffusion.training.run_folder import RunFolder
from tests.sweeps.measured_studies import add_metrics, add_records, make_study, points_of


def distance(run, step):
    """Falls with steps; DIA-LSTM is better by 0.5 + 0.1 seed."""
    better = (0.5 + 0.1 * run.seed) if run.unit == "dia-lstm" else 0
    return 2 + 600 / step + 0.3 * run.seed - better


def rows_of(study):
    points = points_of(study)
    ends = [one.point for one in measured(study.runs, study.protocol) if one.is_last]
    costs = {run.name: cost for run in study.runs if (cost := training_cost(run))}
    return {(row.batch_size, row.unit): row for row in summarize(study, points, ends, costs)}


def test_a_row_holds_what_the_records_say(tmp_path):
    study = make_study(tmp_path)
    add_records(study, distance)
    add_metrics(study, lambda run: 30 if run.unit == "dia-lstm" else 20)
    row = rows_of(study)[32, "dia-lstm"]
    assert row.images_seen == 19_200
    assert row.seeds == row.planned_seeds == row.curve_seeds == [0, 1, 2]
    # Last steps: 2 + 1 + 0.3 s - 0.5 - 0.1 s, for s = 0, 1, 2.
    assert row.final.mean == pytest.approx(2.7)
    assert row.best.mean == row.final.mean
    # Distances at 200, 400, 600 steps are 2, 0.5 and 0 above the last: their mean along the curve is 0.75 above it.
    assert row.mean_along.mean == pytest.approx(2.7 + ((2 + 0.5) / 2 + (0.5 + 0) / 2) / 2)
    assert row.comparison.difference.mean == pytest.approx(-0.6)
    assert row.comparison.seeds == [0, 1, 2]
    # Differences -0.5, -0.6, -0.7: a standard deviation of 0.1; the t quantile for two degrees of freedom is 4.302653.
    assert row.comparison.difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert row.comparison.p_paired_holm == pytest.approx(2 * row.comparison.p_paired)
    assert row.seconds.mean == pytest.approx(30)
    assert row.time_ratio == pytest.approx(1.5)
    assert row.peak_memory_mib == 1500


def test_a_twin_has_the_same_seed(tmp_path):
    study = make_study(tmp_path, batch_sizes=[8], seeds=[0, 1, 2, 3])
    add_records(
        study, lambda run, step: None if (run.unit, run.seed) in {("none", 0), ("dia-lstm", 3)} else distance(run, step)
    )
    comparison = rows_of(study)[8, "dia-lstm"].comparison
    assert comparison.seeds == [1, 2]
    assert comparison.difference.mean == pytest.approx(-0.65)


def test_one_seed_has_a_difference_and_no_p(tmp_path):
    study = make_study(tmp_path, seeds=[4], batch_sizes=[8])
    add_records(study, distance)
    rows = rows_of(study)
    comparison = rows[8, "dia-lstm"].comparison
    assert comparison.difference.mean == pytest.approx(-0.9)
    assert (comparison.difference.half_width, comparison.p_student, comparison.p_paired) == (None, None, None)
    reached, differences = tables(list(rows.values()), "FD(digits)", "FD(digits)")
    assert differences.rows[0][2:] == ["1", "-0.900", "-", "-", "-"]
    assert reached.rows[0][3:] == ["4,800", "4.200", "4.200", "4.950", "-", "-", "-"]
    assert notes(list(rows.values())) == []


def test_a_study_without_the_twin_compares_nothing(tmp_path):
    study = make_study(tmp_path, units=["dia-lstm", "dia-lstm-light"], batch_sizes=[8])
    add_records(study, distance)
    rows = list(rows_of(study).values())
    assert all(row.comparison is None for row in rows)
    assert len(tables(rows, "FD(digits)", "FD(digits)")) == 1


def test_a_mean_curve_is_over_the_same_seeds_at_every_point(tmp_path):
    """Seed 2 has only begun, and seed 1 lacks a point in the middle."""
    study = make_study(tmp_path, units=["none"], batch_sizes=[8], points=4)
    gone = {(2, 300), (2, 450), (2, 600), (1, 300)}
    add_records(study, lambda run, step: None if (run.seed, step) in gone else distance(run, step))
    points = points_of(study)
    curve = curve_of(points, "none", 8)
    assert len(points) == 8
    assert list(curve.by_seed) == [0, 1]
    assert curve.images_seen == [1200, 3600, 4800]
    assert [value.mean for value in curve.mean] == pytest.approx([6.15, 2 + 600 / 450 + 0.15, 3.15])
    row = rows_of(study)[8, "none"]
    assert (row.seeds, row.curve_seeds, row.planned_seeds) == ([0, 1], [0, 1], [0, 1, 2])
    assert tables([row], "FD(digits)", "FD(digits)")[0].rows[0][2] == "2 of 3"


def test_runs_that_have_only_begun_have_a_curve_and_no_final_distance(tmp_path):
    study = make_study(tmp_path, units=["none", "dia-lstm"], batch_sizes=[8])
    add_records(study, lambda run, step: distance(run, step) if step == 200 and run.unit == "none" else None)
    rows = rows_of(study)
    assert rows[8, "none"].final is None
    assert rows[8, "none"].best.mean == pytest.approx(5.3)
    assert tables([rows[8, "none"]], "a", "a")[0].rows[0][2] == "0 (curve 3) of 3"
    assert rows[8, "dia-lstm"].best is None


@pytest.mark.parametrize(("steps", "last"), [(600, 600), (620, 600)])
def test_a_training_has_a_cost_from_its_last_logged_line_on(steps, last, tmp_path):
    study = make_study(tmp_path, units=["none"], batch_sizes=[8], seeds=[0], steps=steps)
    (run,) = study.runs
    assert run.experiment.train.log_every == 50
    assert training_cost(run) is None
    RunFolder(run.folder).log_metrics({"step": 300, "images": 2400, "images_per_second": 100.0})
    assert training_cost(run) is None
    RunFolder(run.folder).log_metrics({"step": last, "images": 4800, "images_per_second": 200.0})
    assert training_cost(run).seconds == pytest.approx(24 + 12)
    assert training_cost(run).peak_memory_mib is None
