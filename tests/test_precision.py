"""Which precision is chosen on which device, which setting decides, and what a run keeps."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from dia_diffusion import precision
from dia_diffusion.cli.console import RecentRate
from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.precision import best_precision, slow_warning, training_precision
from dia_diffusion.sweeps.collect import in_one_precision
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import TINY, Recorder, tiny, train

__all__ = ["tiny", "train"]

CPU = torch.device("cpu")
FLAGS = {
    "amx": "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile",
    "avx512_bf16": "flags\t\t: fpu avx2 avx512f avx512_bf16",
    "avx512": "flags\t\t: fpu avx2 avx512f avx512bw avx512vl",
    "avx2": "flags\t\t: fpu avx avx2 f16c fma",
    "arm": "Features\t: fp asimd evtstrm aes atomics fphp asimdhp bf16 i8mm",
    "old arm": "Features\t: fp asimd evtstrm aes",
}


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """cpu("avx2", limit) makes this CPU appear as that kind, with ONEDNN_MAX_CPU_ISA set to the limit or unset."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def make(kind: str, limit: str | None = None) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{FLAGS[kind]}\n\nprocessor\t: 1\n{FLAGS[kind]}\n")
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return make


@pytest.mark.parametrize(
    ("kind", "limit", "name", "reason"),
    [
        ("amx", None, "bf16", "this CPU has bfloat16 arithmetic, AMX"),
        ("avx512_bf16", None, "bf16", "this CPU has bfloat16 arithmetic, AVX512_BF16"),
        ("arm", None, "bf16", "this CPU has bfloat16 arithmetic, Arm BF16"),
        ("avx512", None, "none", "this CPU has no bfloat16 arithmetic"),
        ("avx2", None, "none", "this CPU has no bfloat16 arithmetic"),
        ("old arm", None, "none", "this CPU has no bfloat16 arithmetic"),
        ("amx", "AVX512_CORE_BF16", "bf16", "AMX"),
        ("amx", "all", "bf16", "AMX"),
        ("amx", "avx2", "none", "ONEDNN_MAX_CPU_ISA=AVX2 rules out"),
        ("amx", "AVX512_CORE_VNNI", "none", "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI rules out"),
    ],
)
def test_bf16_is_chosen_where_a_cpu_multiplies_it(cpu, kind: str, limit: str | None, name: str, reason: str) -> None:
    cpu(kind, limit)
    chosen = best_precision(CPU)
    assert chosen.name == name and reason in chosen.reason
    assert chosen.dtype == {"bf16": "bfloat16", "none": "float32"}[name] and chosen.dtype in str(chosen)


def test_without_onednn_or_linux_a_cpu_gets_float32(cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu("amx")
    (tmp_path / "cpuinfo").unlink()
    assert best_precision(CPU).name == "none"
    cpu("amx")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert best_precision(CPU).name == "none"


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "none"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_from_compute_capability_8_on_get_bf16(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    assert best_precision(torch.device("cuda", 0)).name == name


@pytest.mark.parametrize(
    ("recipe", "launcher", "began_in", "name", "reason"),
    [
        ("auto", None, None, "none", "no bfloat16"),
        ("auto", "no", None, "none", "no bfloat16"),
        ("auto", "bf16", None, "bf16", "as accelerate launch says"),
        ("auto", "no", "bf16", "bf16", "as this run began"),
        ("auto", "bf16", "none", "bf16", "as accelerate launch says"),
        ("bf16", "no", None, "bf16", "as train.mixed_precision says"),
        ("none", "bf16", None, "none", "not bf16 as accelerate launch says"),
    ],
)
def test_which_setting_decides(cpu, recipe, launcher, began_in, name, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu("avx2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    chosen = training_precision(recipe, CPU, began_in)
    assert chosen.name == name and reason in chosen.reason


@pytest.mark.parametrize(
    ("recipe", "launcher", "line"),
    [
        ("fp16", "no", "must be auto, none or bf16 on a CPU, got fp16"),
        ("auto", "fp16", "got fp16 (as accelerate launch says), which needs a CUDA GPU"),
        ("auto", "fp8", "must be no, bf16 or fp16, got fp8"),
    ],
)
def test_what_a_cpu_can_not_do_is_refused(recipe, launcher, line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(InputError) as refused:
        training_precision(recipe, CPU)
    assert line in str(refused.value)


def test_the_warning_about_slow_bf16_gives_measured_rates(cpu) -> None:
    cpu("avx2")
    warning = slow_warning(training_precision("bf16", CPU), CPU)
    assert warning is not None and "times slower" in warning and warning.count("GFLOP/s") == 2
    assert slow_warning(training_precision("none", CPU), CPU) is None
    cpu("amx")
    assert slow_warning(training_precision("bf16", CPU), CPU) is None


def test_a_run_keeps_the_precision_it_chose(cpu, tiny, train, tmp_path: Path) -> None:
    cpu("amx")
    auto = ("--train.mixed_precision", "auto", "--train.max_steps")
    trainer = train(tiny("run", *auto, "3"))
    assert "bfloat16 (this CPU has bfloat16 arithmetic, AMX)" in trainer.progress.messages[0]
    kept = [
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()),
        *(
            json.loads((tmp_path / "run" / kind / "step-00000003" / name).read_text())["recipe"]
            for kind, name in (("checkpoints", "state.json"), ("pipelines", "training.json"))
        ),
    ]
    assert [recipe["train"]["mixed_precision"] for recipe in kept] == ["bf16"] * 3

    cpu("avx2")  # on another machine
    trainer = train(tiny("run", *auto, "6"))
    assert trainer.config.mixed_precision == "bf16" and "as this run began" in trainer.progress.messages[0]
    assert "times slower" in trainer.progress.messages[1]
    AcceleratorState._reset_state(True)
    with pytest.raises(InputError, match=r"train\.mixed_precision: bf16 -> none"):
        Trainer(tiny("run", "--train.max_steps", "9"), Recorder())


def test_a_study_resolves_its_precision_once(cpu, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("mixed_precision: none, ", ""))
    (tmp_path / "mine.yaml").write_text(
        f"output: {tmp_path}/out\nrecipe: {tmp_path}/tiny.yaml\nprotocol: fd-digits\nsteps: 3\npoints: 1\n"
        "runs: [{units: [none, dia-lstm], batch_sizes: [8], seeds: [0]}]\n"
    )
    cpu("amx")
    study, chosen = in_one_precision(read_study(str(tmp_path / "mine.yaml")))
    assert chosen is not None and {run.experiment.train.mixed_precision for run in study.runs} == {"bf16"}
    Trainer(study.runs[0].experiment, Recorder()).run()
    cpu("avx2")
    study, chosen = in_one_precision(read_study(str(tmp_path / "mine.yaml")))
    assert chosen is not None and {run.experiment.train.mixed_precision for run in study.runs} == {"bf16"}


def test_sampling_takes_auto_when_asked(cpu, tiny, train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny("run", "--train.max_steps", "3"))
    for kind, dtype in (("avx2", "float32"), ("amx", "bfloat16")):
        cpu(kind)
        sample = ["sample", str(tmp_path / "run"), "--seeds", "0-1", "--steps", "2", "--out", str(tmp_path / dtype)]
        assert main([*sample, "--precision", "auto"]) == 0
        assert f"sampling in {dtype} (" in capsys.readouterr().out
        assert json.loads((tmp_path / dtype / "samples.json").read_text())["precision"] == dtype


def test_the_time_left_uses_the_recent_rate() -> None:
    recent = RecentRate()
    assert recent.rate() is None
    recent.note(10, 50)  # after ten seconds of imports
    recent.note(12, 70)
    assert recent.rate() is None
    for second in range(13, 40):
        recent.note(second, 10 * (second - 5))
    assert recent.rate() == pytest.approx(10)
    for second in range(40, 140):  # it slows down to 4 a second
        recent.note(second, 350 + 4 * (second - 40))
    assert recent.rate() == pytest.approx(4, rel=0.05)
