"""A study's inventory, refusals and plan, with one run that the trainer really trained."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.protocol import EvalProtocol, renamed
from dia_diffusion.evaluation.record import append_record
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.evaluation.statistics_file import write_statistics
from dia_diffusion.locks import FolderLock
from dia_diffusion.sweeps.checks import check_images, check_measuring, check_randomness, check_recipes, check_runs
from dia_diffusion.sweeps.collect import Inventory, scan
from dia_diffusion.sweeps.launcher import Job, commands, run_study
from dia_diffusion.sweeps.plan import make_plan
from dia_diffusion.sweeps.sweep import Run, Study, read_study
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.trainer import Trainer
from tests.sweeps.measured_studies import a_record
from tests.training.conftest import TINY, Recorder
from tests.training.run_files import make_version_1

STUDY = """
output: {folder}/out
recipe: {folder}/tiny.yaml
runs: [{{units: [none, dia-lstm], batch_sizes: [8], seeds: [0]}}]
steps: 4
points: 2
protocol: fd-digits
final_protocol: fd2k-dpm25
"""
Read = Callable[..., Study]
NO_FINAL = {"final_protocol": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study and its first run, complete."""
    folder = tmp_path_factory.mktemp("inventory")
    (folder / "tiny.yaml").write_text(TINY + "samples: {count: 2, steps: 2}\n")
    (folder / "mine.yaml").write_text(STUDY.format(folder=folder))
    Trainer(read_study(str(folder / "mine.yaml")).runs[0].experiment, Recorder()).run()
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Read:
    """study(("old", "new")) reads the study with its text changed, next to a copy of the run."""
    shutil.copytree(trained / "out", tmp_path / "out")

    def read(*changes: tuple[str, str], **options: dict[str, object]) -> Study:
        text = (trained / "mine.yaml").read_text()
        for old, new in changes:
            text = text.replace(old, new)
        (tmp_path / "mine.yaml").write_text(text)
        return read_study(str(tmp_path / "mine.yaml"), str(tmp_path / "out"), **options)  # type: ignore[arg-type]

    return read


def check(study: Study) -> Inventory:
    """All checks that are made before images are opened."""
    check_recipes(study.runs, study.protocols)
    inventory = scan(study)
    check_runs(inventory.states)
    return inventory


def record(run: Run, *steps: int, randomness: int | None = None, **changes: Any) -> None:
    """Adds records of a run at these steps under fd-digits."""
    for step in steps:
        one = replace(a_record(run, step, 1.5, **changes), randomness=randomness)
        append_record(RunFolder(run.folder).evaluations, renamed(one, EvalProtocol.read("fd-digits")))


def test_what_is_missing(study: Read) -> None:
    here = study()
    first, second = check(here).states
    assert (first.trained, first.steps_left, first.unmeasured, first.final_unmeasured) == (True, 0, [2, 4], True)
    assert (second.trained, second.steps_left, second.unmeasured) == (False, 4, [2, 4])
    folder = str(first.run.folder)
    measure = [["fid", folder, "--every-step", "--protocol", "fd-digits"], ["fid", folder, "--protocol", "fd2k-dpm25"]]
    assert commands(here, first) == measure
    assert commands(here, second)[0] == ["train", "--config", f"{second.run.folder}/config.yaml"]
    with_reference = study(changes={"reference": "digits", **NO_FINAL})
    assert commands(with_reference, scan(with_reference).states[0]) == [[*measure[0], "--reference", "digits"]]


def test_a_run_without_checkpoints_is_complete_while_its_pipelines_are(study: Read) -> None:
    folder = RunFolder(study().runs[0].folder)
    shutil.rmtree(folder.checkpoints)
    assert check(study()).states[0].trained
    shutil.rmtree(folder.pipelines / "step-00000002")
    with pytest.raises(InputError, match="pipelines and no checkpoint"):
        check(study())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("steps: 4", "steps: 2"), "trained for 4 steps; now its training ends after 2"),
        (("points: 2", "points: 4"), "is past step 1 and has no pipeline to measure"),
        (("protocol: fd-digits", "protocol: fd-digits\noverrides: {ema.decay: 0.9}"), "ema.decay: 0.9999 -> 0.9"),
    ],
)
def test_a_study_that_disagrees_with_its_runs(changes: tuple[str, str], said: str, study: Read) -> None:
    with pytest.raises(InputError) as refused:
        check(study(changes))
    assert said in str(refused.value) and "none-b8-s0" in str(refused.value)


def test_nothing_is_trained_beside_a_run_of_randomness_1(study: Read) -> None:
    here = study(changes=NO_FINAL)
    first = here.runs[0]
    check_randomness(scan(here))
    record(first, *first.steps, randomness=2)
    make_version_1(here.folder)
    check(here)  # drawing is allowed
    check_randomness(scan(replace(here, runs=[first])))  # and so is measuring
    with pytest.raises(InputError, match=r"none-b8-s0 was trained with randomness 1"):
        check_randomness(scan(here))
    # Once the run's weights are removed, its newest record decides.
    shutil.rmtree(RunFolder(first.folder).checkpoints)
    shutil.rmtree(RunFolder(first.folder).pipelines)
    check_randomness(scan(here))
    record(first, 4)
    with pytest.raises(InputError, match=r"none-b8-s0 was trained with randomness 1"):
        check_randomness(scan(here))


def test_other_images_are_refused(study: Read, tmp_path: Path) -> None:
    np.save(tmp_path / "others.npy", np.zeros((40, 8, 8), np.uint8))
    others = study(overrides={"data.source": str(tmp_path / "others.npy")})
    with pytest.raises(InputError, match=r"none-b8-s0 was trained on other images than data.source .*others.npy has"):
        check_images(check(others))
    check_images(scan(study()))


def test_another_reference_is_refused_before_anything_is_trained(study: Read, tmp_path: Path) -> None:
    here = study(changes=NO_FINAL)
    run, extractor = here.runs[0], build_features("digits")
    held_out = open_images("digits", size=8, channels=1, split="test")
    reference = reference_statistics(held_out, extractor).hash
    hashes = {"features_hash": extractor.weights_hash, "reference_hash": reference, "reference_count": len(held_out)}
    record(run, *run.steps, **hashes)
    check_images(scan(here))

    for part in ("train", "test"):
        (tmp_path / "mine" / part).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), index).save(tmp_path / "mine" / part / f"{index}.png")
    for other, said in (
        ("mine", "would have reference mine, the existing ones have digits"),
        ("none.zip", "is not a file"),
    ):
        again = study(changes={**NO_FINAL, "reference": str(tmp_path / other)})
        for runs in (again.runs, again.runs[:1]):  # the first run is complete
            with pytest.raises(InputError, match=said):
                check_images(scan(replace(again, runs=runs)))

    RunFolder(run.folder).evaluations.unlink()
    record(run, 2, **hashes | {"features_hash": "f"})
    with pytest.raises(
        InputError, match=r"features digits: new records .* features_hash [0-9a-f]+, the existing ones have f; use"
    ):
        check_images(scan(here))


def test_one_reference_for_all_runs_in_the_protocols_features(study: Read, tmp_path: Path) -> None:
    """The first run was trained on the digits, by its own record; the second would be trained on a file of them."""
    digits, extractor = open_images("digits", size=8, channels=1), build_features("digits")
    np.save(tmp_path / "copy.npy", digits.images[:, 0])
    (tmp_path / "open.yaml").write_text("{features: digits, num_samples: 70, sampler: ddim, steps: 2}")
    moved, keys = {"data.source": str(tmp_path / "copy.npy")}, {"protocol": str(tmp_path / "open.yaml")}
    here = study(overrides=moved, changes={**keys, **NO_FINAL})
    with pytest.raises(InputError, match=r"got none-b8-s0 against digits and dia-lstm-b8-s0 against .*copy.npy; use"):
        check_measuring(
            scan(here), here.runs, lambda source, size, channels, split: open_images(source, size=size, channels=1)
        )

    write_statistics(tmp_path / "of.safetensors", reference_statistics(digits, extractor), extractor)
    keys["reference"] = str(tmp_path / "of.safetensors")
    check_images(scan(study(changes={**keys, **NO_FINAL})))
    with pytest.raises(InputError, match="statistics in features digits; protocol fd2k-dpm25 measures in cifar10"):
        check_images(scan(study(changes=keys)))


def test_a_run_that_is_on_record_needs_no_pipelines(study: Read) -> None:
    """They may have been removed to save disk space."""
    here = study(changes=NO_FINAL)
    run, folder = here.runs[0], RunFolder(here.runs[0].folder)
    record(run, *run.steps)
    shutil.rmtree(folder.pipelines / "step-00000002")
    check(here)
    shutil.rmtree(folder.checkpoints)
    shutil.rmtree(folder.pipelines)
    states = check(here).states
    assert states[0].complete and not states[1].trained
    assert not scan(study()).states[0].trained, "the last one is still to be measured by the final protocol"


def test_references_of_runs_are_compared_when_each_run_ends(study: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    here = study(changes=NO_FINAL)

    def run_jobs(jobs: list[Job], max_parallel: int, progress: object, check: Callable[[Job], None]) -> None:
        for reference_hash, job in zip("ab", jobs, strict=True):
            record(next(run for run in here.runs if run.folder == job.folder), 4, reference_hash=reference_hash)
            check(job)

    monkeypatch.setattr("dia_diffusion.sweeps.launcher.run_jobs", run_jobs)
    with pytest.raises(InputError, match=r"reference_hash a vs\. b"):
        run_study(scan(here), 1, lambda *_: None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("steps: 2, classes: [3]", "protocol fd-digits: `classes` must be left out for an unconditional model"),
        ("steps: 2, guidance_scale: 2", "protocol fd-digits: `guidance_scale` must be 1 for an unconditional model"),
        ("steps: 2, guidance_scale: 2, guide: nowhere", "nowhere does not exist"),
        ("steps: 2", "both called fd-digits and differ"),
    ],
)
def test_protocols_that_can_not_be_used(settings: str, said: str, study: Read, tmp_path: Path) -> None:
    file = tmp_path / "fd-digits.yaml"
    file.write_text(f"{{features: digits, num_samples: 70, sampler: ddim, {settings}}}")
    key = "final_protocol" if "differ" in said else "protocol"
    with pytest.raises(InputError, match=said):
        check(study(changes={key: str(file)}))


def test_records_that_can_not_be_read(study: Read) -> None:
    RunFolder(study().runs[0].folder).evaluations.write_text('{"distance": 1.0')
    with pytest.raises(InputError, match=r"evaluations.jsonl, line 1: not a complete evaluation record"):
        scan(study())


def test_a_run_in_use_is_refused_before_anything_is_started(study: Read) -> None:
    here = study()
    with FolderLock(here.runs[1].folder), pytest.raises(InputError, match=r"dia-lstm-b8-s0 is in use by process \d+"):
        run_study(scan(here), 1, lambda *_: None)
    assert not list(here.folder.glob("*/*.log"))


def test_the_plan_adds_up(study: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of 4 steps with 2 points, one of them trained; times per step are given."""
    for name, seconds in (("step", 3.0), ("sampler_step", 0.125)):
        monkeypatch.setattr(f"dia_diffusion.sweeps.plan.seconds_of_{name}", lambda *_, seconds=seconds: seconds)
    here = study()
    none, unit = make_plan(scan(here), torch.get_num_threads())
    assert [state.trained for group in (none, unit) for state in group.states] == [True, False]
    measuring = (2 * 596 + 2000) * 25 * 0.125  # points and the final protocol
    grids = 2 * 2 * 2 * 0.125  # points, images and steps
    assert none.seconds_left == [(0, measuring)]
    assert unit.seconds_left == [pytest.approx((4 * 3 + grids, measuring))]
    files = [
        path for kind in ("pipelines", "checkpoints") for path in (here.runs[0].folder / kind).rglob("*.safetensors")
    ]
    tensors = sum(tensor.nbytes for path in files for name, tensor in load_file(path).items() if "/step" not in name)
    with_unit = sum(p.numel() for p in build_model(here.runs[1].experiment.model).parameters()) * 4 * (4 + 2)
    assert none.bytes + unit.bytes == tensors + with_unit
