"""Weights files: false headers, pickles under other names, invalid numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_diffusion.evaluation.features import PACKAGED
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.features.inception import build_inception
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sharing.convert import convert_official, convert_to_pipeline
from dia_diffusion.sharing.export import export_pipeline
from dia_diffusion.training.checkpoint import load_checkpoint
from tests.pipelines.test_convert import official_weights
from tests.security import hostile
from tests.security.hostile_weights import LYING_WEIGHTS, put_weights
from tests.security.readers import Reader, checkpoint, classifier, export, pipeline, within
from tests.security.watch import Sandbox

WEIGHTS = "diffusion_pytorch_model.safetensors"
digits = PACKAGED["digits"].network


READERS: dict[str, Callable[[Path], Reader]] = {
    "pipeline": within(pipeline, f"unet/{WEIGHTS}", load_pipeline),
    "export": within(pipeline, f"unet/{WEIGHTS}", export),
    "classifier": within(classifier, "model.safetensors", load_classifier),
    "checkpoint": within(checkpoint, "model.safetensors", load_checkpoint),
    "features": within(Path, "x.safetensors", lambda p: load_weights(digits(), p / "x.safetensors")),
    "Inception": within(Path, "x.safetensors", lambda p: build_inception(p / "x.safetensors")),
}


@pytest.mark.parametrize("kind", LYING_WEIGHTS)
@pytest.mark.parametrize("name", READERS)
def test_files_that_hold_no_weights(name: str, kind: str, sandbox: Sandbox) -> None:
    reader = READERS[name](sandbox.folder)
    put_weights(reader.file, kind, sandbox.marker)
    sandbox.refused(reader.read, reader.file.name)


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "zip": hostile.pickled_weights,
    "before the zip": lambda marker: hostile.pickled_weights(marker, wrap=False),
    "bare": hostile.pickled,
    "protocol 0": lambda marker: hostile.pickled(marker, 0),
    "protocol 5": lambda marker: hostile.pickled(marker, 5),
    "numpy objects": lambda marker: hostile.npy(hostile.object_array(marker)),
    "digits": lambda _: b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    "deep": lambda _: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "text of gigabytes": lambda _: b"\x80\x02X" + (0xFFFFFFF0).to_bytes(4, "little") + b"x.",
    "cut short": lambda _: saved(official_weights())[:-3000],
    "a list": lambda _: saved([torch.zeros(2)]),
    "a number": lambda _: saved(3),
    "numbers": lambda _: saved({"pos_embed": 3}),
    "names that are none": lambda _: saved({3: torch.zeros(2)}),
    "sparse": lambda _: saved({"pos_embed": torch.eye(3).to_sparse()}),
    "no numbers": lambda _: saved({"pos_embed": torch.empty(1 << 40, 1 << 10, device="meta")}),
    "one number everywhere": lambda _: saved({"pos_embed": torch.zeros(1).expand(1 << 14, 1 << 16)}),
    "nested": lambda _: saved({"state": {"pos_embed": torch.zeros(2)}}),
    "complex": lambda _: saved({**official_weights(), "pos_embed": torch.zeros(2, dtype=torch.complex64)}),
    "whole numbers": lambda _: saved({**official_weights(), "pos_embed": torch.zeros(2, dtype=torch.int64)}),
    "not finite": lambda _: saved({**official_weights(), "norm.bias": torch.full((16,), torch.nan)}),
    "infinite": lambda _: saved({**official_weights(), "norm.bias": torch.full((16,), -torch.inf)}),
}


def saved(value: Any) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *((kind, ".pth") for kind in PICKLES),
        *((kind, suffix) for kind in ("zip", "bare") for suffix in (".bin", ".ckpt", ".pkl", ".safetensors")),
    ],
)
@pytest.mark.parametrize("name", ["converted", "Inception"])
def test_pickles_are_not_run(name: str, suffix: str, kind: str, sandbox: Sandbox) -> None:
    file = sandbox.folder / f"weights{suffix}"
    file.write_bytes(PICKLES[kind](sandbox.marker))
    if name == "converted":
        sandbox.refused(lambda: convert_to_pipeline(file, sandbox.folder / "out", 4), file)
        assert not (sandbox.folder / "out").exists()
    else:
        sandbox.refused(lambda: build_inception(file), file)


def test_a_zip_bomb_of_weights(sandbox: Sandbox) -> None:
    """torch decompresses records, though it never compresses them; one repeated number can expand to gigabytes."""
    import zipfile

    file, bomb = sandbox.folder / "weights.pth", sandbox.folder / "bomb.pth"
    torch.save({"pos_embed": torch.zeros(1 << 23)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    file.unlink()
    assert bomb.stat().st_size < 1 << 19
    sandbox.refused(lambda: convert_official(bomb), bomb, "compressed more than")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gigabytes"])
def test_pickles_that_are_no_files(kind: str, sandbox: Sandbox) -> None:
    hostile.put_json(sandbox.folder / "weights.pth", kind)
    for read in (convert_official, build_inception):
        sandbox.refused(lambda read=read: read(sandbox.folder / "weights.pth"), "weights.pth")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_in_a_pipelines_folder_is_never_read(name: str, alone: bool, sandbox: Sandbox) -> None:
    place = pipeline(sandbox.folder)
    (place / "unet" / name).write_bytes(hostile.pickled_weights(sandbox.marker))
    if alone:
        (place / "unet" / WEIGHTS).unlink()
        sandbox.refused(lambda: load_pipeline(place), place)
        sandbox.refused(lambda: export_pipeline(place, sandbox.folder / "out"), place)
        return
    assert sandbox.watch(lambda: load_pipeline(place)).unet.dtype == torch.float32
    assert Path("unet", name) in sandbox.watch(lambda: export_pipeline(place, sandbox.folder / "out"))
    assert not (sandbox.folder / "out" / "unet" / name).exists()


NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not a number": lambda tensor: torch.full_like(tensor, torch.nan),
    "one not a number": lambda tensor: tensor.clone().index_fill_(0, torch.tensor([0]), torch.nan),
    "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
    "whole": lambda tensor: tensor.to(torch.int64),
    "truth values": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "transposed": lambda tensor: tensor[None],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", ["pipeline", "classifier", "features"])
def test_numbers_that_are_no_weights(name: str, kind: str, sandbox: Sandbox) -> None:
    reader = READERS[name](sandbox.folder)
    if name == "features":
        save_file(digits().state_dict(), reader.file)
    tensors = load_file(reader.file)
    first = min(key for key, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, first: NUMBERS[kind](tensors[first]).contiguous()}, reader.file, metadata={"format": "pt"})
    sandbox.refused(reader.read, reader.file.parent)
