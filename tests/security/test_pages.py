"""Untrusted names and values on cards and pages are shown as text and never become markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dia_diffusion.evaluation.record import append_record
from dia_diffusion.report.page import render
from dia_diffusion.report.subjects import run_page, study_page
from dia_diffusion.sharing.card import evaluation_rows, write_card
from dia_diffusion.sweeps.figures import draw_grids
from tests.evaluation.conftest import _record
from tests.report.conftest import parse
from tests.security import hostile, hostile_images, readers
from tests.security.watch import Sandbox

TEXTS = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "end of script": "</script></style></textarea><script>alert(1)</script>",
    "comment": "<!--<script>",
    "quote": "\" onmouseover=alert(1) x='",
    "link": "[click](javascript:alert(1))",
    "picture": "![x](https://example.com/track.png)",
    "reference": "[x]: https://example.com",
    "fence": "a\n```\n<script>alert(1)</script>\n```yaml\n",
    "long fence": "a\n`````\n<script>alert(1)</script>\n",
    "code": "`<script>alert(1)</script>`",
    "cell": "a | b | <script>alert(1)</script> |",
    "line": "a\n\n# Heading\n<script>alert(1)</script>",
    "front matter": "a\n---\nlicense: mit\n---\n",
    "template": "{{ 7 * 7 }}{% raw %}",
    "entity": "&lt;script&gt;alert(1)&#60;",
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "backslash": "\\`\\|\\[x](y)",
}

NO_FILES = ("pipe", "device", "gigabytes", "folder")


class Tags(HTMLParser):
    """The HTML tags in a Markdown text, as a browser would see them if HTML is passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def outside_of_code(card: str) -> str:
    """A card without its fences and code spans, which Markdown shows literally."""
    kept, fence = [], ""
    for line in card.split("\n"):
        match = re.match(r" {0,3}(`{3,})", line)
        if fence:
            if match and len(match[1]) >= len(fence) and not line.strip("` "):
                fence = ""
        elif match:
            fence = match[1]
        else:
            kept.append(line)
    assert not fence, "a fence is left open"
    return re.sub(r"(?<!\\)(`+).+?\1", "", "\n".join(kept))


@pytest.mark.parametrize("kind", TEXTS)
def test_cards_show_what_they_are_given(kind: str, sandbox: Sandbox) -> None:
    text = TEXTS[kind]
    place = readers.pipeline(sandbox.folder)
    training = json.loads((place / "training.json").read_text())
    training["recipe"]["model"] |= {"num_classes": 2, "attention": text}
    training["recipe"]["data"]["note"] = text
    training["recipe"][text] = text
    training["data"] |= {"name": text, "class_names": [text, "b"]}
    training["init_from"] = {"path": text, "weights_sha256": text}
    (place / "training.json").write_text(json.dumps(training))
    (place / "converted.json").write_text(json.dumps({"source": text, "sha256": text}))
    record = _record(2.5, reference=text, sampler=text, num_inference_steps=text).to_dict()
    rows = evaluation_rows([{**record, "metric": text, "protocol_name": text}])
    sandbox.watch(lambda: write_card(place, rows))
    card = (place / "README.md").read_text()
    shown = outside_of_code(card)
    tags = Tags()
    tags.feed(shown)
    assert tags.found == []
    assert not re.search(r"(?<!\\)\]\((?!samples\.png|https://arxiv\.org/abs/2210\.16101)", shown)
    assert card.count("\n---\n") == 1 and "\x1b" not in card
    (row,) = [line for line in card.split("\n") if line.startswith("| ") and " 2.500 " in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 8  # a table of seven columns


@pytest.mark.parametrize("kind", TEXTS)
def test_pages_show_what_they_are_given(kind: str, sandbox: Sandbox) -> None:
    text = TEXTS[kind]
    run = readers.run(sandbox.folder)
    for step in (3, 6):
        record = _record(2.5, step=step, features=text, reference=text, sampler=text, seeds=text)
        append_record(run / "evaluations.jsonl", record)
    (run / "environment.json").write_text(json.dumps({"python": text, text: text}))
    if "://" not in text:  # an address is refused
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("source: digits", f"source: {json.dumps(text)}"))
    plain = parse(render(run_page(readers.run(_beside(sandbox)))))
    page = parse(render(sandbox.watch(lambda: run_page(run))))
    added = {"table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "div", "script", "p"}
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | added
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert all(place.startswith(("data:image/png;base64,", "data:,", "#")) for place in page.loaded)
    assert "alert(1)" not in "".join(page.styles)


def _beside(sandbox: Sandbox) -> Path:
    (sandbox.folder / "plain").mkdir()
    return sandbox.folder / "plain"


def test_a_studys_page_shows_names_of_variants(sandbox: Sandbox) -> None:
    study = readers.study(sandbox.folder)
    study.folder.mkdir()
    object.__setattr__(study, "name", TEXTS["end of script"])
    html = render(sandbox.watch(lambda: study_page(study)))
    assert TEXTS["end of script"] in parse(html).text and "<script>alert(1)" not in html


@pytest.mark.parametrize("kind", ["huge", "truncated png", "svg", "html", "text bomb", "pickle", *NO_FILES])
def test_grids_that_are_no_pictures(kind: str, sandbox: Sandbox) -> None:
    run = readers.run(sandbox.folder)
    grid = run / "samples" / "step-00000006.png"
    if kind in NO_FILES:
        hostile.put_json(grid, kind)
    else:
        grid.write_bytes(hostile_images.images()[kind])
    page = sandbox.watch(lambda: run_page(run))
    assert len(page.sections) == 5
    sandbox.survived(lambda: draw_grids({"a": grid}, sandbox.folder / "grids.png"))
