"""The command line as a person meets it: every way it can end is a line and an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from dia_diffusion import __version__
from dia_diffusion.cli.curves import floor_of
from dia_diffusion.cli.main import COMMANDS, main
from dia_diffusion.evaluation.record import read_records
from tests.training.conftest import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def error_of(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert error.startswith("dia-diffusion ")
    return error


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"dia-diffusion {__version__}"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "cifar10_uvit_s2_dia" in shown and "--optimizer.learning_rate" in shown


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train"}))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"dia-diffusion {name}" in capsys.readouterr().out


def test_train_sample_fid_curves(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out, npz = tmp_path / "grid.png", tmp_path / "images", tmp_path / "images.npz"
    few = ["--steps", "5", "--batch-size", "3"]
    assert main(["sample", str(run), "--seeds", "0-4,9", *few, "--grid", str(grid), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.glob("*.png")) == [f"{seed:08d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    assert Image.open(grid).size[0] > 100
    pipeline = run / "pipelines" / "step-00000006"
    assert main(["sample", str(pipeline), "--seeds", "9,4", "--steps", "5", "--out", str(npz)]) == 0
    arrays = np.load(npz)
    assert arrays["seeds"].tolist() == [4, 9]
    for seed, image in zip((4, 9), arrays["images"], strict=True):
        png = np.asarray(Image.open(out / f"{seed:08d}.png")).astype(int)
        assert np.abs(png - image[..., 0]).max() <= 1

    reference = ["--reference", "digits", "--reference-split", "test"]
    assert main(["fid", str(run), *reference, "--num", "80", "--steps", "3", "--every-step"]) == 0
    records = read_records(run / "evaluations.jsonl")
    assert [record.step for record in records] == [3, 6]
    assert {record.metric for record in records} == {"FD(digits)"}
    assert (records[0].unit, records[0].batch_size, records[0].images_seen) == ("dia-lstm", 8, 24)
    assert main(["fid", str(run), *reference, "--num", "80", "--steps", "3", "--every-step"]) == 0
    assert len(read_records(run / "evaluations.jsonl")) == 2, "what is on record is not measured again"
    assert f"{records[1].distance:.3f}" in (pipeline / "README.md").read_text()

    figure = tmp_path / "curve.png"
    assert main(["curves", str(run), "--out", str(figure), "--floor", "1.0"]) == 0
    assert Image.open(figure).size[0] > 500
    points = json.loads((tmp_path / "curve.json").read_text())
    assert [point["step"] for point in points] == [3, 6]

    floor = tmp_path / "floor.jsonl"
    real = ["fid", "digits", "--size", "8", "--channels", "1", *reference, "--record", str(floor)]
    assert main([*real, "--num", "70"]) == 0
    drawn = ["curves", str(run), "--out", str(figure), "--floor", str(floor)]
    assert "num_samples 70 there, 80 here" in error_of(drawn, capsys)
    assert main([*real, "--num", "80"]) == 0
    assert main(drawn) == 0
    assert floor_of(str(floor), records[0]) == read_records(floor)[1].distance
    samples = error_of([*drawn[:-1], run / "evaluations.jsonl"], capsys)
    assert "only samples" in samples

    assert main(["fid", str(run), *reference, "--num", "70", "--steps", "3"]) == 0
    assert "num_samples 80 against 70" in error_of(["curves", run, "--out", figure], capsys)
    chosen = records[0].protocol_hash()[:12]
    assert main(["curves", str(run), "--out", str(figure), "--protocol", chosen]) == 0


def test_sampling_goes_on_in_a_folder_and_refuses_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images"
    assert main(["sample", str(run), "--seeds", "0-2", "--steps", "2", "--out", str(out)]) == 0
    first = (out / "00000001.png").stat().st_mtime_ns
    assert main(["sample", str(run), "--seeds", "1-4", "--steps", "2", "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 5 and (out / "00000001.png").stat().st_mtime_ns == first
    assert "another steps" in error_of(["sample", run, "--steps", "3", "--out", out], capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "not empty" in error_of(["sample", run, "--steps", "2", "--out", tmp_path / "mine"], capsys)


def test_fid_of_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance of the files that `sample` writes is that of the stream that `fid` measures."""
    out, record = tmp_path / "images", tmp_path / "records.jsonl"
    assert main(["sample", str(run), "--seeds", "0-79", "--steps", "3", "--out", str(out)]) == 0
    assert main(["fid", str(out), "--reference", "digits", "--record", str(record)]) == 0
    assert main(["fid", str(run), "--reference", "digits", "--num", "80", "--steps", "3", "--record", str(record)]) == 0
    files, stream = read_records(record)
    assert files.protocol.num_samples == 80 and files.distance == pytest.approx(stream.distance, rel=1e-3)
    monkeypatch.chdir(tmp_path)
    assert main(["fid", str(out), "--reference", "digits", "--num", "10"]) == 0
    assert "covariance is singular" in capsys.readouterr().out
    assert len(read_records(tmp_path / "evaluations.jsonl")) == 1


def bad_arguments(run: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """name -> (arguments, what the line must say)"""
    torn = folder / "torn"
    pickled = folder / "pickled"
    for copy in (torn, pickled):
        subprocess.run(["cp", "-r", run / "pipelines" / "step-00000006", copy], check=True)
    weights = torn / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    empty, plain = folder / "empty", folder / "plain"
    empty.mkdir()
    subprocess.run(["cp", "-r", run, plain], check=True)
    config = (plain / "config.yaml").read_text()
    (plain / "config.yaml").write_text(config.replace("attention: dia-lstm", "attention: none"))
    corrupt = folder / "corrupt"
    corrupt.mkdir()
    (corrupt / "a.png").write_bytes(b"no image")
    (folder / "there.json").write_text("{}")
    stored, pickled_moments = folder / "stored.safetensors", folder / "pickled_moments.npz"
    assert main(["stats", "make", "digits", str(stored), "--size", "16", "--channels", "1"]) == 0
    np.savez(pickled_moments, mu=np.array([print, None]), sigma=np.eye(2))
    np.savez(folder / "statistics.npz", mu=np.zeros(4), sigma=np.zeros((4, 4)))
    np.savez(folder / "objects.npz", arr_0=np.array([print, None]))
    np.savez(folder / "other.npz", weights=np.zeros(4))
    saved = folder / "saved"
    saved.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (saved / name).write_text("{}")
    torn_run = folder / "torn_run"
    torn_run.mkdir()
    for name, text in (("config.yaml", (run / "config.yaml").read_text()), ("evaluations.jsonl", '{"source": "ru')):
        (torn_run / name).write_text(text)
    config = ["train", "--config", run.parent / "tiny.yaml", "--output", folder / "new"]
    reference = ["--reference", "digits"]
    of_digits = ["fid", run, "--features", "digits", "--reference"]
    inception = [*reference, "--features", "inception"]
    return {
        "unknown command": (["trian"], "accepted: quickstart, train"),
        "unknown recipe": (["train", "--config", "nothing"], "no recipe 'nothing'"),
        "unknown key": ([*config, "--train.batchsize", "8"], "did you mean 'train.batch_size'"),
        "wrong type": ([*config, "--train.batch_size", "many"], "many"),
        "batch not divisible": ([*config, "--train.accumulation", "3"], "accepted: a multiple of 3"),
        "missing dataset": ([*config, "--data.source", folder / "none"], str(folder / "none")),
        "empty dataset": ([*config, "--data.source", empty], str(empty)),
        "corrupt dataset": ([*config, "--data.source", corrupt], "a.png"),
        "statistics as images": ([*config, "--data.source", folder / "statistics.npz"], "holds statistics"),
        "objects as images": ([*config, "--data.source", folder / "objects.npz"], "can't be read as an .npz"),
        "npz of other arrays": ([*config, "--data.source", folder / "other.npz"], "accepted: an .npz file with images"),
        "torn saved dataset": ([*config, "--data.source", saved], str(saved)),
        "no name of a dataset": ([*config, "--data.source", "hf:"], "accepted: hf:NAME"),
        "more classes than the model": ([*config, "--model.num_classes", "9"], "has 10 classes"),
        "guidance without classes": ([*config, "--samples.guidance_scale", "2"], "needs a null label"),
        "grid's guidance": ([*config, "--samples.guidance_scale", "0.5"], "accepted: 1, which is none, or more"),
        "start from an empty name": ([*config, "--init-from="], "init_from is empty"),
        "start from nothing": ([*config, "--init-from", folder / "none"], "none does not exist"),
        "start from images": ([*config, "--init-from", corrupt], "neither a pipeline folder"),
        "start from torn weights": ([*config, "--init-from", torn], "cut short"),
        "start from another unit": ([*config, "--init-from", run, "--model.attention", "lstm"], "the same unit"),
        "start from another width": ([*config, f"--init-from={run}", "--model.hidden_size", "32"], "(1, 5, 32) here"),
        "start of a run under way": (
            [*config[:3], "--output", run, "--init-from", run],
            f"started with init_from: None, and is given init_from: {run}",
        ),
        "fp16 without GPU": ([*config, "--train.mixed_precision", "fp16"], "needs a CUDA GPU"),
        "even layers": ([*config, "--model.num_layers", "4"], "num_layers is 4"),
        "patch": ([*config, "--model.patch_size", "3"], "patch_size 3"),
        "reduction": ([*config, "--model.attention_kwargs.reduction", "3"], "reduction 3"),
        "unit": ([*config, "--model.attention", "dia"], "'dia'; accepted: none, dia-lstm"),
        "clip": ([*config, "--train.clip_grad_norm", "-1"], "accepted: above 0"),
        "betas": ([*config, "--optimizer.betas", "[1.5, 2]"], "optimizer.betas"),
        "width": ([*config, "--model.hidden_size", "0"], "hidden_size 0"),
        "no output": ([*config, "--output", ""], "output is empty"),
        "unit's cell": ([*config, "--model.attention_kwargs.cell", "lstm"], "decides its cell itself"),
        "unit's dropout": ([*config, "--model.attention_kwargs.dropout", "2"], "can't be built"),
        "tracker": ([*config, "--trackers", "[paper]"], "'paper' is not installed"),
        "grid's sampler": ([*config, "--samples.sampler", "plms"], "'plms'; accepted: ddpm"),
        "grid's steps": ([*config, "--samples.steps", "2000"], "2000 steps"),
        "changed recipe": ([*config[:3], "--output", run, "--seed", "3"], "seed: 0 -> 3"),
        "no config": (["train", "--output", folder / "new"], "--config is missing"),
        "batch size": (["sample", run, "--batch-size", "0", "--out", folder / "out"], "--batch-size is 0"),
        "config without value": (["train", "--config"], "--config needs"),
        "nothing to write": (["sample", run], "give --grid"),
        "grid is a folder": (["sample", run, "--grid", folder / "empty"], "file ending in .png"),
        "unknown sampler": (["sample", run, "--sampler", "plms", "--grid", "g.png"], "'plms'; accepted: ddpm"),
        "no such pipeline": (["sample", folder / "none", "--grid", "g.png"], "does not exist"),
        "no such step": (["sample", run, "--step", "4", "--grid", "g.png"], "accepted: 3, 6"),
        "bad seeds": (["sample", run, "--seeds", "5-1", "--grid", "g.png"], "5-1"),
        "weights cut short": (["sample", torn, "--grid", "g.png"], "cut short"),
        "weights pickled": (["sample", pickled, "--grid", "g.png"], "a pickle"),
        "classes": (["sample", run, "--classes", "1", "--grid", "g.png"], "unconditional"),
        "guidance": (["sample", run, "--guidance-scale", "2", "--grid", "g.png"], "unconditional"),
        "zero steps": (["sample", run, "--steps", "0", "--grid", "g.png"], "0 steps"),
        "unknown option": (["sample", run, "--samplr", "ddim"], "did you mean --sampler"),
        "unknown features": (["fid", run, *reference, "--features", "vgg"], "'vgg'; there are: digits"),
        "no reference": (["fid", run], "--reference"),
        "unknown protocol": (["fid", run, "--protocol", "fd1"], "no protocol 'fd1'; accepted: a YAML file or one of"),
        "recipe as protocol": (["fid", run, "--protocol", run / "config.yaml"], "config.yaml: unknown key 'output'"),
        "beside a protocol": (["fid", run, "--protocol", "fd-digits", "--steps", "25"], "fd-digits says 25; leave it"),
        "images by a protocol": (["fid", "digits", "--protocol", "fd-digits"], "--reference is missing"),
        "few images": (["fid", "digits", *reference, "--num", "5000"], "has 1201 images"),
        "sampler of images": (["fid", "digits", *reference, "--sampler", "ddpm"], "digits is no pipeline"),
        "steps for images": (["fid", "digits", *reference, "--steps", "9"], "--steps 9: digits is no pipeline"),
        "classes of images": (["fid", "digits", *reference, "--classes", "1"], "--classes 1: digits is no pipeline"),
        "size of a run": (["fid", run, *reference, "--size", "16"], "draws images of its own; leave it out"),
        "channels of a run": (["fid", run, *reference, "--channels", "1"], "draws images of its own; leave it out"),
        "split of a run": (["fid", run, *reference, "--split", "train"], "draws images of its own; leave it out"),
        "record in a folder": (["fid", run, *reference, "--record", empty], "empty can't be written"),
        "record under a file": (["fid", run, *reference, "--record", stored / "a" / "b"], "b can't be written"),
        "num": (["fid", run, *reference, "--num", "1"], "--num is 1"),
        "unknown metric": (["fid", run, *reference, "--metrics", "fid,lpips"], "'lpips'; accepted: fid, kid, isc, prc"),
        "few resamples": (["fid", run, *reference, "--bootstrap", "5"], "accepted: 10 or more"),
        "few for KID": (["fid", run, *reference, "--num", "999", "--metrics", "kid"], "kid of 999 images"),
        "few references": (["fid", run, *reference, "--reference-split", "test", "--metrics", "kid"], "596 reference"),
        "few for precision": (["fid", run, *reference, "--num", "3", "--metrics", "prc"], "prc of 3 images"),
        "few for IS": (["fid", run, *reference, "--num", "9", "--metrics", "isc"], "isc of 9 images"),
        "few in a folder": (["fid", "digits", *reference, "--num", "3", "--metrics", "prc"], "prc of 3 images"),
        "KID's subset": (["fid", run, *reference, "--kid-subset-size", "0"], "KID subset of 0"),
        "steps of images": (["fid", "digits", *reference, "--every-step"], "no run folder"),
        "no evaluations": (["curves", folder], "no evaluations.jsonl"),
        "no study": (["curves", folder / "none"], "none'; accepted: a YAML file, the folder of a study, or one of"),
        "recipe as study": (["curves", run / "config.yaml"], "config.yaml: "),
        "study's jobs": (["curves", "digits", "--output", folder / "new", "--jobs", "0"], "--jobs is 0"),
        "study's protocol": (["curves", "digits", "--output", folder / "new", "--protocol", "x"], "no protocol 'x'"),
        "study's images": (["curves", "digits", "--output", folder / "out", "--data", corrupt], "a.png"),
        "figure of a study": (["curves", "digits", "--out", "x.png"], "--out x.png says nothing of a study"),
        "jobs of runs": (["curves", run, "--jobs", "2"], "--jobs 2 says nothing of run folders"),
        "no analysis": (["analyze", "map", run], "maps"),
        "analysis of no run": (["analyze", "maps", folder], "is no run folder"),
        "analysis of a pipeline": (["analyze", "maps", torn], "is no run folder"),
        "analysis' step": (["analyze", "maps", run, "--steps", "4"], "accepted: 3, 6"),
        "analysis' steps": (["analyze", "maps", run, "--steps", "last"], "last are no steps"),
        "analysis' times": (["analyze", "maps", run, "--times", "1"], "--times is 1; accepted: 2 or more"),
        "analysis' images": (["analyze", "maps", run, "--data", folder / "other.npz"], "an .npz file with images"),
        "analysis' folder": (["analyze", "maps", run, "--out", stored], "stored.safetensors is no folder"),
        "ablations of no unit": (["analyze", "ablations", plain], "was trained without attention unit"),
        "ablations' images": (["analyze", "ablations", run, "--images", "5000"], "accepted: 600 or fewer"),
        "linearity's images": (["analyze", "linearity", run, "--images", "1"], "--images is 1; accepted: 2 or more"),
        "batches": (["analyze", "gradient-noise", run, "--batches", "1"], "--batches is 1; accepted: 2 or more"),
        "analysis' batch": (["analyze", "gradient-noise", run, "--batch-size", "0"], "--batch-size is 0"),
        "report of nothing": (["report", folder / "none"], "none is no run's folder, which has a config.yaml"),
        "report of a folder": (["report", empty], "nor a study's, which has a study.yaml"),
        "report of no study": (["report", run / "config.yaml"], "config.yaml"),
        "report of a torn record": (["report", torn_run], "evaluations.jsonl, line 1: not a whole evaluation record"),
        "page's name": (["report", run, "--out", folder / "page.txt"], "page.txt is no name of a page"),
        "convert": (["convert", folder / "none.pth", folder / "out"], "none.pth"),
        "export's target": (["export", run, empty, "--with-code"], "empty exists"),
        "export of torn weights": (["export", torn, folder / "out"], "cut short"),
        "export of no pipeline": (["export", corrupt, folder / "out"], "neither a pipeline folder"),
        "push of torn weights": (["push", torn, "me/model", "--yes"], "cut short"),
        "push to no repository": (["push", run, "model", "--yes"], "accepted: OWNER/NAME"),
        "push of paths": (["push", run, "me/model", "--yes"], "a path of this machine"),
        "other network": (["fid", run, *inception, "--inception-weights", weights], "6726825d0af5"),
        "weights of others": (["fid", run, *reference, "--inception-weights", weights], "--features inception"),
        "no module": (["fid", run, *reference, "--features", "nothing:Here"], "no module 'nothing'"),
        "no extractor": (["fid", run, *reference, "--features", "pathlib:Path"], "Path in pathlib isn't one"),
        "sizes of reference": (["fid", run, "--reference", stored], "16x16 with 1 channel, measured are images of 8x8"),
        "other dimensions": ([*of_digits, folder / "statistics.npz"], "4 features; digits has 64"),
        "part of reference": ([*of_digits, folder / "other.npz"], "has the keys weights"),
        "statistics of nothing": (["stats", "show", folder / "none.npz"], "no file here"),
        "statistics' objects": (["stats", "compare", stored, pickled_moments], "holds objects"),
        "statistics' file": (["stats", "make", "digits", folder / "x.bin"], ".safetensors"),
        "statistics' size": (["stats", "make", "digits", folder / "x.safetensors", "--size", "0"], "size 0"),
        "statistics' seed": (["stats", "make", "digits", folder / "x.safetensors", "--seed", "1"], "with --num"),
        "statistics' number": (["stats", "make", "digits", folder / "x.safetensors", "--num", "5000"], "has 1201"),
        "no action": (["stats", "mak"], "make"),
        "features' seed": (["train-features", "digits", "--out", folder / "x.safetensors", "--seed", -1], "--seed is"),
        "features' file": (["train-features", "digits", "--out", folder / "x.bin"], ".safetensors"),
        "features' weights": (["train-features", "digits", "--out", stored], "stored.safetensors exists already"),
        "features' card": (["train-features", "digits", "--out", folder / "there.safetensors"], "there.json exists"),
        "distortions' file": (["distortions", "digits", *reference, "--out", folder / "z.png"], "ending in .json"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(str(path) for path in run.rglob("*"))
    for name, (arguments, said) in bad_arguments(run, tmp_path).items():
        error = error_of(arguments, capsys)
        assert said in error, f"{name}: {error}"
    assert sorted(str(path) for path in run.rglob("*")) == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_and_exit_code_1(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        # What safetensors raises, seen on a full tmpfs.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dia_diffusion.training.checkpoint.save_file", full)
    resume = ["train", "--config", run.parent / "tiny.yaml", "--output", run, "--train.max_steps", "7"]
    error = error_of(resume, capsys, code=1)
    assert f"No space left on device: {run / 'checkpoints' / 'step-00000007'}" in error
    assert (run / "checkpoints" / "step-00000006" / "state.json").is_file()


def test_too_much_for_the_memory_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    huge = ["stats", "make", "digits", out, "--size", "100000000"]
    assert "Unable to allocate" in error_of(huge, capsys, code=1)
    assert not out.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_training_with_a_checkpoint(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]
    arguments += ["--train.max_steps", "100000", "--train.checkpoint_every", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dia_diffusion", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    stopped = re.search(r"stopped after step ([\d,]+); the same command goes on", error)
    assert stopped is not None, error
    step = int(stopped[1].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
