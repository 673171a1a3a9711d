"""The model card of a pipeline folder: recipe, data, unit, samples and evaluations, for a person who finds it."""

import json
from pathlib import Path
from typing import Any

import yaml

from dia_diffusion.errors import InputError
from dia_diffusion.files import write_text

TRAINING_FILE = "training.json"  # what a run leaves beside the weights: run, step, images, weights, recipe, data


def read_training(folder: str | Path) -> dict[str, Any] | None:
    """What a pipeline folder says of its training; None where it says nothing.

    Raises:
        InputError: the file is cut short or none of a run's.
    """
    path = Path(folder) / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
        whole = {"run", "step", "images", "weights", "recipe", "data"} <= training.keys()
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is cut short or altered; remove it, or make the pipeline again")
    return training


def write_card(folder: str | Path, evaluations: list[dict[str, Any]] | None = None) -> None:
    """Writes README.md into a pipeline folder that a run has made.

    Args:
        folder: the pipeline folder, with training.json.
        evaluations: rows for the table of distances: metric, distance, num_samples, reference, sampler, steps.
    """
    folder = Path(folder)
    training = read_training(folder)
    if training is None:
        raise InputError(f"{folder} has no {TRAINING_FILE}, which its card would be written from")
    recipe, data = training["recipe"], training["data"]
    model, unit = recipe["model"], recipe["model"]["attention"]
    described = "no attention unit" if unit == "none" else f"the shared attention unit `{unit}`"
    kind = "An unconditional" if model["num_classes"] is None else f"A {model['num_classes']}-class"
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags: [dia-diffusion, uvit, diffusion]",
        "---",
        f"# UViT, step {training['step']:,}",
        "",
        f"{kind} UViT ({model['hidden_size']} wide, {model['num_layers']} blocks, "
        f"{model['sample_size']}x{model['sample_size']} images) with {described}, "
        f"trained with [dia-diffusion](https://arxiv.org/abs/2210.16101) on {data['count']:,} images of "
        f"`{data['name']}` for {training['step']:,} steps at batch size {recipe['train']['batch_size']} "
        f"({training['images']:,} images seen). The weights are the exponential moving average.",
        "",
    ]
    if (folder / "samples.png").is_file():
        lines += ["![Samples of seeds 0, 1, 2, ..., not picked](samples.png)", ""]
    lines += [
        "## Use",
        "```python",
        "import torch",
        "from dia_diffusion import UViTPipeline",
        "",
        "pipe = UViTPipeline.from_pretrained(FOLDER)",
        "images = pipe(batch_size=4, generator=[torch.Generator().manual_seed(seed) for seed in range(4)]).images",
        "```",
        "",
        "## Evaluations",
    ]
    if evaluations:
        lines += ["| metric | distance | images | reference | sampler | steps |", "| --- |" + " --- |" * 5]
        lines += [
            f"| {e['metric']} | {e['distance']:.3f} | {e['num_samples']:,} | {e['reference']} | {e['sampler']} "
            f"| {e['steps']} |"
            for e in evaluations
        ]
    else:
        lines.append("None yet; `dia-diffusion fid` makes them.")
    lines += ["", "## Recipe", "```yaml", yaml.safe_dump(recipe, sort_keys=False).strip(), "```", ""]
    write_text(folder / "README.md", "\n".join(lines))
