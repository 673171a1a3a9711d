import pytest
from matplotlib.figure import Figure
from PIL import Image

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import draw_curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look inside."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


@pytest.fixture
def run(record):
    """Builds a run: a label and a record every 100 steps."""

    def build(label, distances, batch_size=32, **changes):
        return label, [record(d, 100 * i, batch_size, **changes) for i, d in enumerate(distances, start=1)]

    return build


def test_draws_what_it_returns(drawn, tmp_path, run):
    points = draw_curves([run("plain", [9, 5, 4]), run("DIA-LSTM", [8, 4, 3])], tmp_path / "curves.png", floor=1.5)
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert len(points) == 6
    assert points[4] == {
        "label": "DIA-LSTM",
        "unit": "dia-lstm",
        "batch_size": 32,
        "seed": 0,
        "step": 200,
        "images_seen": 6400,
        "distance": 4,
        "low": None,
        "high": None,
    }
    (axes,) = drawn[0].axes
    first, second, floor = axes.get_lines()
    assert first.get_xydata().tolist() == [[3200, 9], [6400, 5], [9600, 4]]
    assert second.get_xydata().tolist() == [[3200, 8], [6400, 4], [9600, 3]]
    assert list(floor.get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "plain",
        "DIA-LSTM",
        "floor: real images, 1.5",
    ]
    assert axes.get_ylabel() == "FD(digits), 500 samples"
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0


def test_a_wide_range_is_drawn_logarithmically_and_equal_batches_get_steps(drawn, tmp_path, run):
    draw_curves([run("a", [300, 20, 4])], tmp_path / "a.png")
    draw_curves([run("a", [3, 2]), run("b", [3, 2], batch_size=8)], tmp_path / "b.svg")
    assert drawn[0].axes[0].get_yscale() == "log"
    (steps,) = drawn[0].axes[0].child_axes
    assert steps.get_xlabel() == "steps of 32 images"
    assert not drawn[1].axes[0].child_axes
    assert (tmp_path / "b.svg").read_text().startswith("<?xml")


def test_records_in_any_order_and_the_later_of_two_counts(tmp_path, run, record):
    label, (first, second) = run("a", [9, 5])
    again = record(8, step=100)
    points = draw_curves([(label, [second, first, again])], tmp_path / "a.png")
    assert [point["distance"] for point in points] == [8, 5]


def test_runs_of_one_label_stay_two_lines(drawn, tmp_path, run):
    draw_curves([run("a", [9, 5]), run("a", [8, 4])], tmp_path / "a.png")
    assert [line.get_ydata().tolist() for line in drawn[0].axes[0].get_lines()] == [[9, 5], [8, 4]]


def test_mixed_protocols_are_refused_by_what_differs(tmp_path, run):
    other = run("b", [3, 2], num_samples=1000, sampler="ddpm")
    with pytest.raises(
        InputError, match="num_samples 500 against 1000, sampler dpmsolver\\+\\+ against ddpm"
    ) as caught:
        draw_curves([run("a", [3, 2]), other], tmp_path / "a.png")
    assert "a (step 100) and b (step 100)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_bad_input(tmp_path, run):
    with pytest.raises(InputError, match="no runs"):
        draw_curves([], tmp_path / "a.png")
    with pytest.raises(InputError, match="b has no evaluations"):
        draw_curves([run("a", [3, 2]), ("b", [])], tmp_path / "a.png")
