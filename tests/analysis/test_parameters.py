"""Parameters that units add, against the paper's counts and savings, closed forms and built networks."""

import pytest

from dia_diffusion import UViT
from dia_diffusion.analysis.paper_parameters import PAPER_TABLES, Cell
from dia_diffusion.analysis.parameters import added_parameters, count_parameters, model_named, unit_parameters
from dia_diffusion.analysis.stages import Stage, stages_of
from dia_diffusion.cli.main import main
from dia_diffusion.cli.params import paper_count
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import build_classifier

RESNET164, RESNET83 = ([Stage(n, ("",) * blocks) for n in (64, 128, 256)] for blocks in (18, 9))


def sizes(stages: list[Stage]) -> list[tuple[int, int]]:
    return [(stage.channels, len(stage.blocks)) for stage in stages]


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_printed_counts(number: str) -> None:
    def off(cell: Cell) -> float:
        return round(paper_count(cell) / 1e6, 2) - cell.printed

    assert {(cell.backbone, cell.model): off(cell) for cell in PAPER_TABLES[number] if abs(off(cell)) > 1e-9} == {}


@pytest.mark.parametrize("unit", ["se", "eca", "cbam", "spa", "sem", "spem", "sge"])
def test_savings_match_the_paper(unit: str) -> None:
    assert f"{100 * added_parameters(RESNET164, unit).saving:.1f}" == "94.4"
    assert f"{100 * added_parameters(RESNET83, unit).saving:.1f}" == "88.9"


def test_srm_saving_excludes_its_batch_norms() -> None:
    for stages, blocks in ((RESNET164, 18), (RESNET83, 9)):
        channels = 64 + 128 + 256
        added = added_parameters(stages, "srm")
        assert added.individual == blocks * 4 * channels
        assert added.shared == 2 * channels + blocks * 2 * channels
    assert added_parameters(RESNET164, "srm").saving == pytest.approx(17 / 36)
    assert added_parameters(RESNET164, "srm", share_norm=False).saving == pytest.approx(17 / 36)


@pytest.mark.parametrize("unit", ["dia-lstm", "srm", "block-channels"])
def test_counts_match_built_networks(unit: str) -> None:
    name = "cifar-resnet20-basic"
    stages = stages_of(model_named(name))
    assert sizes(stages) == [(16, 3), (32, 3), (64, 3)]
    plain, with_unit = (
        build_classifier(BackboneConfig(backbone=name, num_classes=100, attention=a)) for a in ("none", unit)
    )
    assert count_parameters(with_unit) - count_parameters(plain) == unit_parameters(stages, unit)

    (stage,) = stages_of(model_named("tiny/2"))
    assert sizes([stage]) == [(128, 5)]
    plain, with_unit = (UViT.from_size("tiny/2", attention=a) for a in (None, unit))
    assert count_parameters(with_unit) - count_parameters(plain) == unit_parameters([stage], unit)


def test_models_by_name() -> None:
    # Counts of the official U-ViT-S/2, of torchvision's networks and of a recipe.
    expected = {"S/2": 44_255_328, "resnet50": 25_557_032, "vit_b_16": 86_567_656, "cifar10_uvit_s2_dia": 44_255_328}
    assert {name: count_parameters(model_named(name)) for name in expected} == expected
    # ResNet-20 with projections, from a recipe of `classify`.
    assert count_parameters(model_named("cifar10_resnet20_cpu")) == 272_474
    assert sizes(stages_of(model_named("resnet50"))) == [(256, 3), (512, 4), (1024, 6), (2048, 3)]


def test_the_command_prints_one_row_per_unit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["params", "--model", "tiny/2", "--unit", "se", "dia-lstm", "--kwargs", "{reduction: 8}"]
    assert main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    se = 2 * 128 * 128 // 8 + 128 // 8 + 128
    assert rows[1][:2] == ["tiny/2", "5x128"]
    assert rows[1][3:] == ["se", f"{se:,}", f"{5 * se:,}", "80.0", "%"]
    assert rows[2] == ["dia-lstm", f"{10 * 128 * 128 // 8 + 2 * 16 + 8 * 128:,}", "-", "-"]


def test_the_command_compares_with_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--table", "XII"]) == 0
    out = capsys.readouterr().out
    r_1 = "XII ResNet164 DIA-LSTM, r = 1 2.59 2.59 0 2,591,924 r 1"
    assert r_1.split() in [line.split() for line in out.splitlines()]
    assert "4 of 4 printed counts are reproduced to the digit" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "resnet9000"], "or a recipe, got 'resnet9000'"),
        (["--model", "S/x"], "got 'S/x'"),
        (["--model", "tiny/2", "--unit", "sea"], "attention unit must be none or one of"),
        (["--model", "tiny/2", "--unit", "eca", "--kwargs", "{reduction: 8}"], "attention unit 'eca' can't be built"),
        (["--model", "tiny/2", "--kwargs", "[8]"], "`--kwargs` must be a mapping, got [8]"),
        (
            ["--model", "tiny/2", "--unit", "se", "--kwargs", "{sharing: individual}"],
            "must be without `sharing`",
        ),
        (["--table", "V"], "`--table` must be one of IV"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", *arguments]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
