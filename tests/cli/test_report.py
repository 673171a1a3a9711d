"""The command `report`."""

from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import append_record
from tests.evaluation.conftest import _record
from tests.report.conftest import parse, write_run

__all__ = ["write_run"]


def test_a_page_is_written_and_stays_if_the_next_one_fails(
    tmp_path: Path, write_run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", records=[_record(7.5, 6, 8)])
    assert main(["report", str(run)]) == 0
    written = (run / "report.html").read_bytes()
    assert str(run / "report.html") in capsys.readouterr().out
    assert "7.500" in parse(written.decode()).text

    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"source": "run"')
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (run / "report.html").read_bytes() == written
    assert sorted(path.name for path in run.glob("*.html")) == ["report.html"]

    (run / "evaluations.jsonl").unlink()
    append_record(run / "evaluations.jsonl", _record(6.25, 6, 8))
    assert main(["report", str(run), "--out", str(tmp_path / "pages" / "page.html")]) == 0
    assert "6.250" in parse((tmp_path / "pages" / "page.html").read_text()).text
    assert (run / "report.html").read_bytes() == written
