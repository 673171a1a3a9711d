"""Bad input of every kind gives one line that names it and exit code 2, and changes nothing on disk."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.cli.main import main
from tests.cli.one_line import error_of

IMAGES_ONLY = "digits is neither a pipeline nor a run; leave it out"
TORN = "not a complete evaluation record; remove that line"


def bad_arguments(run: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """name -> (arguments, a part of the error line)"""
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
        "unknown command": (["trian"], "COMMAND must be one of quickstart, train"),
        "unknown recipe": (["train", "--config", "nothing"], "got 'nothing'"),
        "unknown key": ([*config, "--train.batchsize", "8"], "did you mean `train.batch_size`?"),
        "wrong type": ([*config, "--train.batch_size", "many"], "many"),
        "batch not divisible": ([*config, "--train.accumulation", "3"], "must be a multiple of 3"),
        "missing dataset": ([*config, "--data.source", folder / "none"], str(folder / "none")),
        "empty dataset": ([*config, "--data.source", empty], str(empty)),
        "corrupt dataset": ([*config, "--data.source", corrupt], "a.png"),
        "statistics as images": ([*config, "--data.source", folder / "statistics.npz"], "got statistics"),
        "objects as images": ([*config, "--data.source", folder / "objects.npz"], "can't be read as an .npz"),
        "npz of other arrays": ([*config, "--data.source", folder / "other.npz"], "must hold images or arr_0"),
        "torn saved dataset": ([*config, "--data.source", saved], str(saved)),
        "no name of a dataset": ([*config, "--data.source", "hf:"], "must be given as hf:NAME"),
        "more classes than the model": ([*config, "--model.num_classes", "9"], "has 10 classes"),
        "guidance without classes": ([*config, "--samples.guidance_scale", "2"], "guidance_scale` must be 1 without"),
        "grid's guidance": ([*config, "--samples.guidance_scale", "0.5"], "guidance_scale` must be 1 or more, got 0.5"),
        "start from an empty name": ([*config, "--init-from="], "`init_from` must be text of 1 or more"),
        "start from nothing": ([*config, "--init-from", folder / "none"], "none does not exist"),
        "start from images": ([*config, "--init-from", corrupt], "neither a pipeline folder"),
        "start from torn weights": ([*config, "--init-from", torn], "truncated"),
        "start from another unit": ([*config, "--init-from", run, "--model.attention", "se"], "shared unit"),
        "start from another width": ([*config, f"--init-from={run}", "--model.hidden_size", "32"], "(1, 5, 32) here"),
        "start of a run under way": (
            [*config[:3], "--output", run, "--init-from", run],
            f"`init_from` must be None, as when the run started, got {run}",
        ),
        "fp16 without GPU": ([*config, "--train.mixed_precision", "fp16"], "on a CPU, got fp16"),
        "even layers": ([*config, "--model.num_layers", "4"], "`num_layers` must be odd"),
        "patch": ([*config, "--model.patch_size", "3"], "patch_size 3"),
        "reduction": ([*config, "--model.attention_kwargs.reduction", "3"], "must divide the 16"),
        "unit": ([*config, "--model.attention", "dia"], "attention unit must be none or one of dia-lstm"),
        "clip": ([*config, "--train.clip_grad_norm", "-1"], "`train.clip_grad_norm` must be above 0, got -1"),
        "betas": ([*config, "--optimizer.betas", "[1.5, 2]"], "each of `optimizer.betas` must be below 1, got 1.5"),
        "width": ([*config, "--model.hidden_size", "0"], "must be above 0, got 0, 1, 4.0 and None"),
        "no output": ([*config, "--output", ""], "`output` must be text of 1 or more"),
        "unit's cell": ([*config, "--model.attention_kwargs.cell", "lstm"], "`cell` is set by"),
        "unit's dropout": ([*config, "--model.attention_kwargs.dropout", "2"], "can't be built"),
        "unit's channels": (["params", "--unit", "se", "--kwargs", "{channels: 3}"], "must not have channels"),
        "unit to place": (["analyze", "placement", *config[1:3], "--unit", "none"], "an attention unit, got none"),
        "tracker": ([*config, "--trackers", "[paper]"], "`trackers` must be installed"),
        "grid's sampler": ([*config, "--samples.sampler", "plms"], "`sampler` must be one of ddpm"),
        "grid's steps": ([*config, "--samples.steps", "2000"], "`steps` must be 1 to 1000"),
        "changed recipe": ([*config[:3], "--output", run, "--seed", "3"], "seed: 0 -> 3"),
        "seed of more bits": ([*config, "--seed", 2**63], "`seed` must be below 9223372036854775808"),
        "no config": (["train", "--output", folder / "new"], "`--config` is missing"),
        "batch size": (["sample", run, "--batch-size", "0", "--out", folder / "out"], "must be 1 or more, got 0"),
        "config without value": (["train", "--config"], "`--config` needs one argument"),
        "nothing to write": (["sample", run], "give --grid"),
        "out is a file": (["sample", run, "--out", corrupt / "a.png"], "got a file"),
        "grid is a folder": (["sample", run, "--grid", folder / "empty"], "must be a file ending in .png"),
        "unknown sampler": (["sample", run, "--sampler", "plms", "--grid", "g.png"], "`sampler` must be one of ddpm"),
        "no such pipeline": (["sample", folder / "none", "--grid", "g.png"], "does not exist"),
        "no such step": (["sample", run, "--step", "4", "--grid", "g.png"], "must be one of 3, 6, got 4"),
        "bad seeds": (["sample", run, "--seeds", "5-1", "--grid", "g.png"], "5-1"),
        "weights cut short": (["sample", torn, "--grid", "g.png"], "truncated"),
        "weights pickled": (["sample", pickled, "--grid", "g.png"], "a pickle"),
        "classes": (["sample", run, "--classes", "1", "--grid", "g.png"], "unconditional"),
        "guidance": (["sample", run, "--guidance-scale", "2", "--grid", "g.png"], "unconditional"),
        "zero steps": (["sample", run, "--steps", "0", "--grid", "g.png"], "`steps` must be 1 to 1000"),
        "unknown option": (["sample", run, "--samplr", "ddim"], "did you mean `--sampler`?"),
        "unknown features": (["fid", run, *reference, "--features", "vgg"], "must be one of digits, cifar10"),
        "no reference": (["fid", run], "`--reference` is missing"),
        "nothing to measure": (["fid", folder / "no", "--protocol", "fd-digits"], "a pipeline, a run or images"),
        "held-out images of no metric": (["fid", run, *reference, "--held-out", run], "left out without metric fdr"),
        "KID's subsets alone": (["fid", run, *reference, "--kid-subset-size", "9"], "left out without metric kid"),
        "unknown protocol": (["fid", run, "--protocol", "fd1"], "a protocol must be a YAML file or one of"),
        "recipe as protocol": (["fid", run, "--protocol", run / "config.yaml"], "config.yaml: `features` is missing"),
        "beside a protocol": (["fid", run, "--protocol", "fd-digits", "--steps", "25"], "fd-digits says 25; leave it"),
        "images by a protocol": (["fid", "digits", "--protocol", "fd-digits"], "`--reference` is missing"),
        "few images": (["fid", "digits", *reference, "--num", "5000"], "`--num` must be 1201 or less"),
        "sampler of images": (["fid", "digits", *reference, "--sampler", "ddpm"], f"--sampler ddpm: {IMAGES_ONLY}"),
        "steps for images": (["fid", "digits", *reference, "--steps", "9"], f"--steps 9: {IMAGES_ONLY}"),
        "classes of images": (["fid", "digits", *reference, "--classes", "1"], f"--classes 1: {IMAGES_ONLY}"),
        "size of a run": (["fid", run, *reference, "--size", "16"], "generates its own images; leave it out"),
        "channels of a run": (["fid", run, *reference, "--channels", "1"], "generates its own images; leave it out"),
        "split of a run": (["fid", run, *reference, "--split", "train"], "generates its own images; leave it out"),
        "record in a folder": (["fid", run, *reference, "--record", empty], "that can be written, got /"),
        "record under a file": (["fid", run, *reference, "--record", stored / "a" / "b"], "that can be written, got /"),
        "num": (["fid", run, *reference, "--num", "1"], "`--num` must be 2 or more, got 1"),
        "unknown metric": (["fid", run, *reference, "--metrics", "fid,lpips"], "must be one of fid, sfid, "),
        "few resamples": (["fid", run, *reference, "--bootstrap", "5"], "must be 10 or more"),
        "few for KID": (["fid", run, *reference, "--num", "999", "--metrics", "kid"], "as `kid_subset_size`, got 999"),
        "few references": (["fid", run, *reference, "--reference-split", "test", "--metrics", "kid"], "got 596"),
        "few for precision": (["fid", run, *reference, "--num", "3", "--metrics", "prc"], "4 or more, got 3"),
        "few for IS": (["fid", run, *reference, "--num", "9", "--metrics", "isc"], "must be 10 or more, got 9"),
        "few in a folder": (["fid", "digits", *reference, "--num", "3", "--metrics", "prc"], "4 or more, got 3"),
        "KID's subset": (["fid", run, *reference, "--kid-subset-size", "0"], "`--kid-subset-size` must be 2"),
        "steps of images": (["fid", "digits", *reference, "--every-step"], f"--every-step: {IMAGES_ONLY}"),
        "no evaluations": (["curves", folder], "no evaluations.jsonl"),
        "no study": (["curves", folder / "none"], "a study must be a YAML file, the folder of a study, or one of"),
        "recipe as study": (["curves", run / "config.yaml"], "config.yaml: "),
        "study's jobs": (["curves", "digits", "--output", folder / "new", "--jobs", "0"], "`--jobs` must be 1 or more"),
        "study's protocol": (["curves", "digits", "--output", folder / "new", "--protocol", "x"], "got 'x'"),
        "study's images": (["curves", "digits", "--output", folder / "out", "--data", corrupt], "a.png"),
        "figure of a study": (["curves", "digits", "--out", "x.png"], "--out x.png: not an option of a study"),
        "jobs of runs": (["curves", run, "--jobs", "2"], "--jobs 2: not an option of run folders"),
        "no analysis": (["analyze", "map", run], "maps"),
        "analysis of no run": (["analyze", "maps", folder], "a run must be a folder that"),
        "analysis of a pipeline": (["analyze", "maps", torn], "a run must be a folder that"),
        "analysis' step": (["analyze", "maps", run, "--steps", "4"], "`--steps` must be among 3, 6, the"),
        "analysis' steps": (["analyze", "maps", run, "--steps", "last"], "must be a whole number, got 'last'"),
        "analysis' times": (["analyze", "maps", run, "--times", "1"], "`--times` must be 2 or more, got 1"),
        "analysis' images": (["analyze", "maps", run, "--data", folder / "other.npz"], "must hold images or arr_0"),
        "analysis' folder": (["analyze", "maps", run, "--out", stored], "`--out` must be a folder, got"),
        "ablations of no unit": (["analyze", "ablations", plain], "was trained without attention unit"),
        "maps' images": (["analyze", "maps", run, "--images", "5000"], "`--images` must be 1,201 or fewer, the"),
        "ablations' images": (["analyze", "ablations", run, "--images", "1000"], "must be 600 or fewer, half of the"),
        "linearity's images": (["analyze", "linearity", run, "--images", "1"], "`--images` must be 2 or more, got 1"),
        "batches": (["analyze", "gradient-noise", run, "--batches", "1"], "`--batches` must be 2 or more, got 1"),
        "analysis' batch": (["analyze", "gradient-noise", run, "--batch-size", "0"], "must be 1 or more, got 0"),
        "report of nothing": (["report", folder / "none"], "must be a run's folder, which has a config.yaml"),
        "report of a folder": (["report", empty], "a study's folder, which has a study.yaml"),
        "report of no study": (["report", run / "config.yaml"], "config.yaml"),
        "report of a torn record": (["report", torn_run], f"evaluations.jsonl, line 1: {TORN}"),
        "page's name": (["report", run, "--out", folder / "page.txt"], "`--out` must be a file ending in .html, got"),
        "convert": (["convert", folder / "none.pth", folder / "out"], "none.pth"),
        "export's target": (["export", run, empty, "--with-code"], "empty exists"),
        "export of torn weights": (["export", torn, folder / "out"], "truncated"),
        "export of no pipeline": (["export", corrupt, folder / "out"], "neither a pipeline folder"),
        "push of torn weights": (["push", torn, "me/model", "--yes"], "truncated"),
        "push to no repository": (["push", run, "model", "--yes"], "must be OWNER/NAME"),
        "push of paths": (["push", run, "me/model", "--yes"], "a path of this machine"),
        "other network": (["fid", run, *inception, "--inception-weights", weights], "6726825d0af5"),
        "weights of others": (["fid", run, *reference, "--inception-weights", weights], "--features inception"),
        "no weights": (["fid", run, *reference, "--features", "clip-vit-b-32"], "`--weights` must be given"),
        "torn VGG-16": (["fid", run, *reference, "--features", "vgg16", "--weights", weights], "vgg16-397923af.pth"),
        "weights twice": (["fid", run, *inception, "--weights", weights, "--inception-weights", weights], "left out"),
        "weights of own": (["fid", run, *reference, "--features", "a:B", "--weights", weights], "which loads its own"),
        "no module": (["fid", run, *reference, "--features", "nothing:Here"], "no module 'nothing'"),
        "no extractor": (["fid", run, *reference, "--features", "pathlib:Path"], "Path in pathlib isn't one"),
        "sizes of reference": (["fid", run, "--reference", stored], "16x16 with 1 channel, but those measured are 8x8"),
        "other dimensions": ([*of_digits, folder / "statistics.npz"], "4 features; digits has 64"),
        "part of reference": ([*of_digits, folder / "other.npz"], "got weights"),
        "statistics of nothing": (["stats", "show", folder / "none.npz"], "no such file"),
        "statistics' objects": (["stats", "compare", stored, pickled_moments], "holds objects"),
        "statistics' file": (["stats", "make", "digits", folder / "x.bin"], ".safetensors"),
        "statistics' size": (["stats", "make", "digits", folder / "x.safetensors", "--size", "0"], "positive number"),
        "statistics' seed": (["stats", "make", "digits", folder / "x.safetensors", "--seed", "1"], "with --num"),
        "statistics' number": (["stats", "make", "digits", folder / "x.safetensors", "--num", "5000"], "1 to 1201"),
        "no action": (["stats", "mak"], "make"),
        "a script's name": (["train-features", "digits"], "run `python tools/train_features.py`"),
        "another script's name": (["distortions", "--help"], "run `python tools/distortions.py`"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(str(path) for path in run.rglob("*"))
    wrong = {}
    for name, (arguments, said) in bad_arguments(run, tmp_path).items():
        if said not in (error := error_of(arguments, capsys)):
            wrong[name] = error
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())
    assert sorted(str(path) for path in run.rglob("*")) == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
