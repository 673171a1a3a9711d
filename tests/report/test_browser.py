"""Pages in a real browser without network: what plotly draws and what the script adds, with no console messages."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.report.page import render
from dia_diffusion.report.subjects import run_page
from tests.report.conftest import parse

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path], tuple[str, list[str]]]:
    """Opens a page; returns the document after its scripts have run, and the browser's console messages."""

    def open_page(path: Path) -> tuple[str, list[str]]:
        command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return ended.stdout, re.findall(r"CONSOLE.*", ended.stderr)

    return open_page


def test_a_browser_draws_the_page_without_console_messages(tmp_path: Path, write_run, record, opened) -> None:
    hostile = "</script><img src=x onerror=console.log('in')>"
    records = [record(9, 3, 8, features=hostile), record(8, 6, 8, features=hostile)]
    page = tmp_path / "report.html"
    page.write_text(render(run_page(write_run(tmp_path / "<img src=x onerror=console.log('in')>", records=records))))
    written = parse(page.read_text())
    shown, said = opened(page)
    assert said == []
    assert shown.count('class="main-svg"') >= len(written.plots) == 2
    # Two evaluations give two markers; loss, gradient norm and learning rate have two lines each, the distance has one.
    assert len(re.findall(r'class="point"', shown)) == 2
    assert len(re.findall(r'class="js-line"', shown)) == 7
    tags = parse(shown).tags
    (slider,) = [attributes for tag, attributes in tags if tag == "input"]
    assert (slider["type"], slider["aria-valuetext"]) == ("range", "step 6, 48 images")
    moments = [attributes for tag, attributes in tags if attributes.get("class") == "frame"]
    assert ["hidden" in attributes for attributes in moments] == [True, False]


def test_a_page_that_loads_or_throws_is_noticed(tmp_path: Path, write_run, opened) -> None:
    """Proves that the test above can fail: the browser reports both, and the page's policy blocks the first."""
    page = tmp_path / "report.html"
    page.write_text(render(run_page(write_run(tmp_path / "run"))))
    added = "<img src='https://example.org/x.png'><script>nothing()</script>"
    page.write_text(page.read_text().replace("</body>", f"{added}</body>"))
    _, said = opened(page)
    assert len(said) == 2
    assert "Content Security Policy" in " ".join(said) and "nothing is not defined" in " ".join(said)
