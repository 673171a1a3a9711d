"""The runs of a study and their exact recipes."""

from pathlib import Path

import pytest

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import shipped_names
from dia_diffusion.sweeps.checks import check_recipes
from dia_diffusion.sweeps.sweep import Study, read_study, write_study
from dia_diffusion.training.recipe import read_experiment
from tests.training.conftest import TINY

STUDY = """
output: {folder}/out
recipe: {folder}/tiny.yaml
variants: {{slow: {{model.attention: dia-lstm, optimizer.unit_learning_rate: 1.0e-5}}}}
runs:
  - {{units: [none, slow], batch_sizes: [8, 4], seeds: [0, 1]}}
  - {{units: [none, dia-lstm-light], batch_sizes: [8], seeds: [1]}}
images: 90
points: 4
protocol: fd-digits
"""


def written(folder: Path, *changes: tuple[str, str], more: str = "") -> str:
    """Writes the study above with some text replaced; returns its path."""
    (folder / "tiny.yaml").write_text(TINY)
    text = STUDY.format(folder=folder) + more
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_runs_in_order_and_once(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    names = [run.name for run in study.runs]
    of_seed = [f"{unit}-b{size}-s{{}}" for size in (8, 4) for unit in ("none", "slow")]
    assert names == [name.format(seed) for seed in (0, 1) for name in of_seed] + ["dia-lstm-light-b8-s1"]
    assert (study.name, study.units, study.batch_sizes) == ("mine", ["none", "slow", "dia-lstm-light"], [4, 8])
    assert study.runs[0].steps == [3, 6, 9, 11], "90 // 8 steps, as many points as asked for, the last at the end"


def test_a_run_has_the_recipe_that_the_command_line_would_give(tmp_path: Path) -> None:
    study = read_study(written(tmp_path), overrides={"data.source": "images.zip"})
    run = next(run for run in study.runs if run.name == "slow-b4-s1")
    overrides = ["--output", f"{tmp_path}/out/slow-b4-s1", "--seed", "1", "--data.source", "images.zip"]
    overrides += ["--model.attention", "dia-lstm", "--optimizer.unit_learning_rate", "1e-5"]
    overrides += ["--train.batch_size", "4", "--train.max_steps", "22", "--train.keep_last", "1"]
    overrides += ["--train.checkpoint_every", "6", "--train.sample_every", "6"]
    assert run.experiment.to_dict() == read_experiment(f"{tmp_path}/tiny.yaml", overrides).to_dict()


def test_a_variant_without_a_unit_has_the_recipes_unit(tmp_path: Path) -> None:
    study = read_study(
        written(tmp_path, ("model.attention: dia-lstm, optimizer.unit_learning_rate", "optimizer.learning_rate"))
    )
    run = next(run for run in study.runs if run.name == "slow-b4-s1")
    attention = read_experiment(f"{tmp_path}/tiny.yaml").model.attention
    assert (run.experiment.model.attention, run.experiment.optimizer.learning_rate) == (attention, 1e-5)


def test_a_variant_keeps_half_lives_in_images_at_the_studys_batch_sizes(tmp_path: Path) -> None:
    keys = ("slow: {model.attention: dia-lstm,", "slow: {model.attention: dia-lstm, train.reference_batch_size: 32,")
    runs = {run.name: run.experiment.train for run in read_study(written(tmp_path, keys)).runs}
    found = {name: (runs[name].batch_size, runs[name].reference_batch_size) for name in ("slow-b8-s0", "slow-b4-s0")}
    assert found == {"slow-b8-s0": (8, 32), "slow-b4-s0": (4, 32)}
    assert runs["none-b4-s0"].reference_batch_size is None


@pytest.mark.parametrize("name", shipped_names("curves"))
def test_shipped_studies_can_run(name: str, tmp_path: Path) -> None:
    study = read_study(name, output=str(tmp_path))
    assert read_study(f"eval/curves/{name}.yaml", output=str(tmp_path)) == study
    check_recipes(study.runs, study.protocols)  # builds its units and reads its protocols
    assert study.protocol == EvalProtocol.read(study.config.protocol)


def test_a_study_is_read_from_its_folder_wherever_that_is_moved(tmp_path: Path) -> None:
    study = read_study(written(tmp_path), overrides={"optimizer.weight_decay": 0.5}, changes={"final_protocol": None})
    write_study(study)
    (tmp_path / "out").rename(tmp_path / "moved")
    again = read_study(str(tmp_path / "moved"))
    assert again.name == "mine" and again.folder == tmp_path / "moved"

    def recipes(of: Study) -> list[object]:
        return [run.experiment.to_dict() | {"output": None} for run in of.runs]

    assert recipes(again) == recipes(study)


def test_a_study_file_must_not_have_the_name_of_the_file_in_study_folders(tmp_path: Path) -> None:
    Path(written(tmp_path)).rename(tmp_path / "study.yaml")
    with pytest.raises(InputError, match=r"study\.yaml is reserved for the folders of studies"):
        read_study(str(tmp_path / "study.yaml"))


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ([("images: 90", "steps: {4: 3}")], "", "batch size 8"),
        ([("images: 90", "images: 90\nsteps: 3")], "", "either `images` or `steps` must be given"),
        ([("images: 90", "images: 90\nimage: 3")], "", "unknown key `image`; did you mean `images`?"),
        ([("[8, 4]", "[8, 0]")], "", "each of `runs.batch_sizes` must be 1 or more, got 0"),
        ([("[0, 1]", "[-1]")], "", "each of `runs.seeds` must be 0 or more, got -1"),
        ([("points: 4", "points: 0")], "", "`points` must be 1 or more, got 0"),
        ([("slow", "a/b")], "", "`variants` must be of letters, digits and _ . + = -, got 'a/b'"),
        ([("1.0e-5}", "1.0e-5, train.batch_size: 3}")], "", "variant slow sets train.batch_size"),
        ([], "overrides: {train: {max_steps: 3}}", "overrides sets train.max_steps"),
        ([], "overrides: {optimizer.learning: 3}", "did you mean `optimizer.learning_rate`"),
        ([("1.0e-5", "-1")], "", "unit slow: `optimizer.unit_learning_rate` must be above 0, got -1"),
        ([("images: 90", "images: many")], "", "many"),
        ([("images: 90", "images: 7")], "", "`images` must be the largest batch size, 8, or more, got 7"),
        ([("slow: {", "none: {")], "", "`variants` must not be none, which the others are compared with"),
    ],
)
def test_what_a_study_is_refused_for(changes: list[tuple[str, str]], more: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        read_study(written(tmp_path, *changes, more=more))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ([("dia-lstm-light", "dia")], "", "unit dia: attention unit must be none or one of"),
        (
            [("model.attention: dia-lstm,", "model.attention: dia,")],
            "",
            "unit slow: attention unit must be none or one of",
        ),
        ([], "overrides: {train.accumulation: 8}", "`train.batch_size` must be a multiple of 8"),
        ([("1.0e-5}", "1.0e-5, train.accumulation: 8}")], "", "unit slow: `train.batch_size` must be a multiple of 8"),
        ([], "overrides: {model.num_layers: 4}", "`num_layers` must be odd"),
        ([], "final_protocol: fd-letters", "got 'fd-letters'"),
    ],
)
def test_what_can_not_run_is_refused(changes: list[tuple[str, str]], more: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        study = read_study(written(tmp_path, *changes, more=more))
        check_recipes(study.runs, study.protocols)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
