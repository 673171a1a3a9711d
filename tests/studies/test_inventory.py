"""What is there of a study, beside runs that were trained by the trainer itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dia_diffusion.errors import InputError
from dia_diffusion.lock import FolderLock
from dia_diffusion.studies.inventory import check_images, check_study, inventory
from dia_diffusion.studies.plan import make_plan
from dia_diffusion.studies.runner import commands, run_study
from dia_diffusion.studies.study import Study, read_study
from dia_diffusion.training.loop import Trainer
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.snapshot import build_model
from tests.training.conftest import TINY, Recorder

STUDY = """
output: {folder}/out
recipe: {folder}/tiny.yaml
runs: [{{units: [none, dia-lstm], batch_sizes: [8], seeds: [0]}}]
steps: 4
points: 2
protocol: fd-digits
final_protocol: fd2k-dpm25
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study and its first run, whole."""
    folder = tmp_path_factory.mktemp("inventory")
    (folder / "tiny.yaml").write_text(TINY + "samples: {count: 2, steps: 2}\n")
    (folder / "mine.yaml").write_text(STUDY.format(folder=folder))
    Trainer(read_study(str(folder / "mine.yaml")).runs[0].experiment, Recorder()).run()
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Callable[..., Study]:
    """study(("old", "new")) is the study with its text changed, beside a copy of the run."""
    shutil.copytree(trained / "out", tmp_path / "out")

    def read(*changes: tuple[str, str], **options: dict[str, object]) -> Study:
        text = (trained / "mine.yaml").read_text()
        for old, new in changes:
            text = text.replace(old, new)
        (tmp_path / "mine.yaml").write_text(text)
        return read_study(str(tmp_path / "mine.yaml"), str(tmp_path / "out"), **options)  # type: ignore[arg-type]

    return read


def test_what_is_missing(study: Callable[..., Study]) -> None:
    here = study()
    check_study(here)
    first, second = inventory(here)
    assert (first.trained, first.steps_left, first.unmeasured, first.final_unmeasured) == (True, 0, [2, 4], True)
    assert (second.trained, second.steps_left, second.unmeasured) == (False, 4, [2, 4])
    folder = str(first.run.folder)
    measure = [["fid", folder, "--every-step", "--protocol", "fd-digits"], ["fid", folder, "--protocol", "fd2k-dpm25"]]
    assert commands(here, first) == measure
    assert commands(here, second)[0] == ["train", "--config", f"{second.run.folder}/config.yaml"]
    with_reference = study(changes={"reference": "digits", "final_protocol": None})
    assert commands(with_reference, inventory(with_reference)[0]) == [[*measure[0], "--reference", "digits"]]


def test_a_run_without_checkpoints_is_whole_while_its_pipelines_are(study: Callable[..., Study]) -> None:
    here = study()
    shutil.rmtree(RunFolder(here.runs[0].folder).checkpoints)
    check_study(here)
    assert inventory(here)[0].trained
    shutil.rmtree(RunFolder(here.runs[0].folder).pipelines / "step-00000002")
    with pytest.raises(InputError, match="pipelines and no checkpoint"):
        check_study(here)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("steps: 4", "steps: 2")], "trained for 4 steps; the study's runs end after 2"),
        ([("points: 2", "points: 4")], "passed step 1 without leaving a pipeline"),
        ([("protocol: fd-digits", "protocol: fd-digits\noverrides: {ema.decay: 0.9}")], "ema.decay: 0.9999 -> 0.9"),
    ],
)
def test_a_study_that_disagrees_with_its_runs(
    changes: list[tuple[str, str]], said: str, study: Callable[..., Study]
) -> None:
    with pytest.raises(InputError) as refused:
        check_study(study(*changes))
    assert said in str(refused.value) and "none-b8-s0" in str(refused.value)


def test_other_images_are_refused(study: Callable[..., Study], tmp_path: Path) -> None:
    np.save(tmp_path / "others.npy", np.zeros((40, 8, 8), np.uint8))
    others = study(overrides={"data.source": str(tmp_path / "others.npy")})
    check_study(others)
    with pytest.raises(InputError, match=r"none-b8-s0 was trained on other images than data.source .*others.npy has"):
        check_images(others)
    check_images(study())


def test_records_that_can_not_be_gone_on_with(study: Callable[..., Study]) -> None:
    here = study()
    file = RunFolder(here.runs[0].folder).evaluations
    file.write_text('{"distance": 1.0')
    with pytest.raises(InputError, match=r"evaluations.jsonl, line 1: not a whole evaluation record"):
        check_study(here)


def test_a_run_in_use_is_refused_before_anything_is_started(study: Callable[..., Study]) -> None:
    here = study()
    with FolderLock(here.runs[1].folder), pytest.raises(InputError, match=r"dia-lstm-b8-s0 is in use by process \d+"):
        run_study(here, 1, lambda progress: None)
    assert not list(here.folder.glob("*/*.log"))


def test_the_plan_adds_up(study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs of 4 steps with 2 points one is trained; all times are given."""
    for name, seconds in (("start", 5.0), ("step", 3.0), ("pass", 0.01), ("features", 0.1)):
        monkeypatch.setattr(f"dia_diffusion.studies.plan.seconds_of_{name}", lambda *_, seconds=seconds: seconds)
    here = study()
    plan = make_plan(here, 2)
    none, unit = plan.groups
    grids = 2 * 2 * 2 * 0.01  # points, images, sampler steps
    point, final = 596 * (25 * 0.01 + 0.1), 2000 * (25 * 0.01 + 0.1)
    assert (none.trained, none.steps_left, none.training_seconds_left, none.evaluations_left) == (1, 0, 0, 3)
    assert (unit.trained, unit.steps_left, unit.evaluations_left) == (0, 4, 3)
    assert unit.training_seconds == unit.training_seconds_left == pytest.approx(4 * 3 + grids)
    measuring = 2 * point + final
    assert none.evaluation_seconds_left == pytest.approx(measuring)
    assert plan.seconds_left == pytest.approx(12 + grids + 2 * measuring + (2 + 3) * 5)
    assert plan.wall_seconds_left == pytest.approx(12 + grids + measuring + 3 * 5), (
        "the run with the training is longer"
    )
    files = [
        path for kind in ("pipelines", "checkpoints") for path in (here.runs[0].folder / kind).rglob("*.safetensors")
    ]
    tensors = sum(tensor.nbytes for path in files for name, tensor in load_file(path).items() if "/step" not in name)
    with_unit = sum(p.numel() for p in build_model(here.runs[1].experiment.model).parameters()) * 4 * (4 + 2)
    assert plan.bytes == tensors + with_unit + 2 * 2000 * 256 * 4, "and the features of two measurements at once"
