"""Curves of runs: what is drawn, what is returned, and which runs can't share a figure."""

import pytest
from PIL import Image

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import curve_panel, draw_curves, points_of
from dia_diffusion.figures import Series


@pytest.fixture
def run(record):
    """Builds a run: a label, and one record every 100 steps."""

    def build(label, distances, batch_size=32, **changes):
        return label, [record(d, 100 * i, batch_size, **changes) for i, d in enumerate(distances, start=1)]

    return build


def panel_of(*runs, floor=None):
    return curve_panel([points_of(*run) for run in runs], "FD(digits), 500 samples", floor=floor, title="Fig. 8")


def test_points_are_returned_and_drawn(tmp_path, run):
    runs = [run("plain", [9, 5, 4]), run("DIA-LSTM", [8, 4, 3])]
    points = draw_curves(runs, tmp_path / "curves.png", floor=1.5)
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert len(points) == 6
    about = {"label": "DIA-LSTM", "unit": "dia-lstm", "batch_size": 32, "seed": 0, "low": None, "high": None}
    assert points[4] == about | {"step": 200, "images_seen": 6400, "distance": 4}

    panel = panel_of(*runs, floor=1.5)
    lines = [item for item in panel.items if isinstance(item, Series)]
    assert [(line.label, list(line.x), list(line.y)) for line in lines] == [
        ("plain", [3200, 6400, 9600], [9, 5, 4]),
        ("DIA-LSTM", [3200, 6400, 9600], [8, 4, 3]),
    ]
    assert (panel.items[-1].value, panel.items[-1].label) == (1.5, "floor: real images, 1.5")
    assert (panel.title, panel.y.label, panel.y.scale, panel.y.low) == (
        "Fig. 8",
        "FD(digits), 500 samples",
        "linear",
        0,
    )


def test_a_wide_range_is_drawn_logarithmically_and_equal_batches_get_steps(run):
    wide, mixed = panel_of(run("a", [300, 20, 4])), panel_of(run("b", [3, 2]), run("b", [3, 2], batch_size=8))
    assert (wide.y.scale, wide.x.step_images) == ("log", 32)
    assert (mixed.y.scale, mixed.x.step_images) == ("linear", None)
    assert len(mixed.items) == 2, "runs of one label stay two lines"


def test_records_in_any_order_and_the_later_of_two_counts(tmp_path, run, record):
    label, (first, second) = run("a", [9, 5])
    points = draw_curves([(label, [second, first, record(8, step=100)])], tmp_path / "a.svg")
    assert [point["distance"] for point in points] == [8, 5]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_mixed_protocols_are_refused_by_what_differs(tmp_path, run):
    other = run("b", [3, 2], num_samples=1000, sampler="ddpm")
    differences = "num_samples 500 vs. 1000, sampler dpmsolver\\+\\+ vs. ddpm"
    with pytest.raises(InputError, match=f"a \\(step 100\\) and b \\(step 100\\).*{differences}"):
        draw_curves([run("a", [3, 2]), other], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_bad_input(tmp_path, run):
    with pytest.raises(InputError, match="no runs"):
        draw_curves([], tmp_path / "a.png")
    with pytest.raises(InputError, match="b has no evaluations"):
        draw_curves([run("a", [3, 2]), ("b", [])], tmp_path / "a.png")
