"""The model card of a pipeline folder: recipe, data, unit, samples and evaluations."""

import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dia_diffusion.errors import InputError, one_line
from dia_diffusion.io import write_text
from dia_diffusion.models.factory import BACKBONES
from dia_diffusion.pipelines.folder import CONVERTED_FILE, TRAINING_FILE, read_record, read_training
from dia_diffusion.reading import read_json_object

PAPER = "https://arxiv.org/abs/2210.16101"
CONVERTED = {"source": str, "sha256": str}


def write_card(folder: str | Path, evaluations: list[dict[str, Any]] | None = None) -> None:
    """Writes README.md into a pipeline folder: what is known about its training, how to load it, and its evaluations.

    Args:
        folder: the pipeline folder. Without training.json, as for converted weights, the card describes only the model.
        evaluations: rows for the table of distances, from `evaluation_rows`.
    """
    folder = Path(folder)
    training = read_training(folder)
    model = training["recipe"]["model"] if training else read_json_object(folder / "unet" / "config.json")
    unit, num_classes = model.get("attention"), model.get("num_classes")
    backbone = model.get("backbone", "uvit")
    if backbone not in BACKBONES:
        accepted = ", ".join(BACKBONES)
        raise InputError(f"the backbone in {folder / TRAINING_FILE} must be one of {accepted}, got {backbone!r}")
    name, place = BACKBONES[backbone].name, BACKBONES[backbone].units_at
    sizes = f"{_text(model['hidden_size'])} wide, {_text(model['num_layers'])} blocks, " if backbone == "uvit" else ""
    sizes += f"{_text(model['sample_size'])}x{_text(model['sample_size'])} images"
    if model.get("attention_at") or model.get("attention_blocks"):
        place = "in some blocks"
    described = "no attention unit" if unit in (None, "none") else f"the unit {_code(unit)} {place}"
    kind = "An unconditional" if num_classes is None else f"A {model['num_classes']}-class"
    lines = [
        "---",
        "library_name: diffusers",
        *(["pipeline_tag: unconditional-image-generation"] if num_classes is None else []),
        f"tags: [dia-diffusion, {backbone}, diffusion]",
        "---",
        f"# {name}, step {training['step']:,}" if training else f"# {name}",
        "",
        f"{kind} {name} ({sizes}) with {described}{_training(training)}",
        "",
    ]
    if (folder / CONVERTED_FILE).is_file():
        source = read_record(folder / CONVERTED_FILE, CONVERTED)
        lines += [
            f"Converted from the official U-ViT weights {_code(source['source'])} (sha256 {_code(source['sha256'])}).",
            "",
        ]
    if training and training.get("init_from"):
        first = training["init_from"]
        name, sha256 = Path(first["path"]).name, first["weights_sha256"]
        lines += [f"It started from the weights of {_code(name)} (sha256 {_code(sha256)}).", ""]
    if (folder / "samples.png").is_file():
        lines += ["![Samples of seeds 0, 1, 2, ..., not picked](samples.png)", ""]
    if training and num_classes is not None and training["data"].get("class_names"):
        names = ", ".join(f"{number} {_text(name)}" for number, name in enumerate(training["data"]["class_names"]))
        in_grid = training["recipe"]["samples"]["count"] >= num_classes  # else some classes are missing
        lines += [f"Its classes{', and the columns of the grid in their order' if in_grid else ''}: {names}.", ""]
    # Guidance needs the null label, which is only trained with label dropout.
    guided = training is not None and bool(training["recipe"]["data"].get("label_dropout"))
    lines += ["## Use", *_use(folder, num_classes, guided), "", "## Evaluations"]
    if evaluations:
        lines += ["| metric | distance | images | reference | sampler | steps | protocol |", "| --- |" + " --- |" * 6]
        lines += [
            f"| {_text(e['metric'])} | {e['distance']:.3f} | {e['num_samples']:,} | {_text(e['reference'])} "
            f"| {_text(e['sampler'])} | {_text(e['steps'])} | {_text(e['protocol'])} |"
            for e in evaluations
        ]
    else:
        lines.append("None yet; `dia-diffusion fid` makes them.")
    if training:
        recipe = yaml.safe_dump(training["recipe"], sort_keys=False).strip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))  # longer than any in the recipe
        lines += ["", "## Recipe", f"{fence}yaml", recipe, fence]
    lines.append("")
    write_text(folder / "README.md", "\n".join(lines))


def evaluation_rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a card: the newest record of each protocol, from records as in an evaluations file.

    Raises:
        KeyError, TypeError or ValueError: a record is incomplete.
    """
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        protocol, earlier = record["protocol"], rows.get(record["protocol_hash"], {})
        name, split = protocol["reference"], protocol["reference_split"]  # None: no splits, or unknown
        rows[record["protocol_hash"]] = {
            "metric": record["metric"],
            "distance": float(record["distance"]),
            "num_samples": int(protocol["num_samples"]),
            "reference": name if split is None else f"{name} ({split})",
            "sampler": protocol["sampler"],
            "steps": protocol["num_inference_steps"],
            "protocol": record.get("protocol_name") or earlier.get("protocol", ""),  # older records lack the name
        }
    return list(rows.values())


def _text(value: object) -> str:
    """Escapes a name or value from a file for Markdown, so that it can't become HTML, a link, or another table cell."""
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", html.escape(one_line(str(value)), quote=False))


def _code(value: object) -> str:
    """The same as inline code."""
    return "`" + one_line(str(value)).replace("`", "'") + "`"


def _training(training: dict[str, Any] | None) -> str:
    if training is None:
        return f", for [dia-diffusion]({PAPER})."
    return (
        f", trained with [dia-diffusion]({PAPER}) on {training['data']['count']:,} images of "
        f"{_code(training['data']['name'])} for {training['step']:,} steps at batch size "
        f"{training['recipe']['train']['batch_size']} ({training['images']:,} images seen). The weights are the "
        f"{_average(training)}."
    )


def _average(training: dict[str, Any]) -> str:
    average = training.get("average", {})
    if "width" in average:
        paper = "[EDM2](https://arxiv.org/abs/2312.02696)"
        return f"power-function average of relative width {_text(average['width'])}, made of snapshots as in {paper}"
    return "exponential moving average" + (f" of decay {_text(average['decay'])}" if "decay" in average else "")


def _use(folder: Path, num_classes: int | None, guided: bool) -> list[str]:
    """How to load the folder, which depends on whether it contains code, and how to call the pipeline."""
    count = 4 if num_classes is None else min(4, num_classes)
    labels = "" if num_classes is None else f"class_labels={list(range(count))}, "
    labels += "guidance_scale=1.5, " if labels and guided else ""
    carries_code = isinstance(read_json_object(folder / "model_index.json").get("_class_name"), list)
    if carries_code:
        before = [
            "This folder carries code: its `.py` files are generated from the package's modules (Apache-2.0), so that "
            "it loads with torch, diffusers and einops alone. `trust_remote_code=True` runs them; read them first.",
            "",
        ]
        imported, call = "from diffusers import DiffusionPipeline", "DiffusionPipeline.from_pretrained"
    else:
        before, imported, call = [], "from dia_diffusion import UViTPipeline", "UViTPipeline.from_pretrained"
    return [
        *before,
        "```python",
        "import torch",
        imported,
        "",
        f"pipe = {call}(FOLDER{', trust_remote_code=True' if carries_code else ''})",
        f"generators = [torch.Generator().manual_seed(seed) for seed in range({count})]",
        f"images = pipe(batch_size={count}, {labels}generator=generators).images",
        "```",
    ]
