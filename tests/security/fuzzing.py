"""Mutations of valid files of every kind, and the readers, which may fail only by refusing the file."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from dia_diffusion.data import open_images, read_image
from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.evaluation.statistics_file import is_statistics_file, read_statistics, write_statistics
from dia_diffusion.io import shipped_folder
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sharing.convert import convert_official
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.training.checkpoint import load_checkpoint
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment, recipes_folder
from tests.data.test_cifar import binary, python, write_tar
from tests.pipelines.test_convert import official_weights
from tests.security import readers
from tests.security.hostile import npy, write_zip
from tests.security.hostile_images import encoded
from tests.security.readers import Reader

JSON = ["pipeline's index", "network's config", "training of a pipeline", "training on a card", "records", "metrics"]
JSON += ["last line of metrics", "metrics on a page", "checkpoint's state", "classifier's config"]
JSON += ["result of a classifier"]


def targets(folder: Path) -> dict[str, Reader]:
    """A reader for each kind of file, each file in its own folder."""
    made: dict[str, Reader] = {}

    def add(name: str, file: Path, read: Callable[[Path], Any]) -> None:
        made[name] = Reader(file, lambda: read(file))

    def write(name: str, data: bytes) -> Path:
        path = folder / name.replace(" ", "_") / name.rpartition(" ")[2]
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return path

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    for name in JSON:
        made[name] = {**readers.STRICT, **readers.LENIENT}[name](place(name))
    recipe = (recipes_folder() / "cifar10_unet2d.yaml").read_bytes()
    add("recipe", write("recipe x.yaml", recipe), lambda p: read_experiment(str(p)))
    recipe = sorted(recipes_folder(ClassifyExperiment).glob("*.yaml"))[0].read_bytes()
    classified = write("classified x.yaml", recipe)
    add("classifier's recipe", classified, lambda p: read_experiment(str(p), kind=ClassifyExperiment))
    protocol = sorted(shipped_folder("protocols").glob("*.yaml"))[0].read_bytes()
    add("protocol", write("protocol x.yaml", protocol), lambda p: EvalProtocol.read(str(p)))
    readers.study(place("study"))
    add("study", folder / "study" / "s.yaml", lambda p: read_study(str(p)))

    checkpoint = readers.checkpoint(place("weights"))
    add("checkpoint's weights", checkpoint / "model.safetensors", lambda p: load_checkpoint(p.parent))
    unet = readers.pipeline(place("network")) / "unet"
    add("network's weights", unet / "diffusion_pytorch_model.safetensors", lambda p: load_pipeline(p.parents[1]))
    card = readers.weights_card(place("features"))
    card.file.unlink()
    network = PACKAGED["digits"].network()
    add("features' weights", card.file.with_suffix(".safetensors"), lambda p: load_weights(network, p))

    extractor = build_features("digits")
    statistics = place("statistics") / "x.safetensors"
    write_statistics(
        statistics, reference_statistics(open_images("digits", split="test", channels=3), extractor), extractor
    )
    add("statistics", statistics, read_statistics)
    np.savez(place("npz") / "x.npz", mu=np.zeros(4), sigma=np.eye(4))
    add("statistics in npz", folder / "npz" / "x.npz", lambda p: (is_statistics_file(p), read_statistics(p)))

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels[0])
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        file = write(f"{kind} x.png", encoded(picture, kind))
        add(f"{kind} image", file, lambda p: read_image(p, "x.png", size=8))
    pictures = {f"{k}.png": encoded(Image.fromarray(image)) for k, image in enumerate(pixels)}
    write_zip(place("zip") / "x.zip", pictures, zipfile.ZIP_DEFLATED)
    add("zip of images", folder / "zip" / "x.zip", lambda p: open_images(p, size=8))
    add("array", write("array x.npy", npy(pixels)), open_images)
    with io.BytesIO() as buffer:
        np.savez(buffer, images=pixels, labels=np.arange(3))
        add("arrays in npz", write("arrays x.npz", buffer.getvalue()), open_images)
    for name, content in (("binary", binary(100)), ("python", python(100))):
        write_tar(place(f"tar {name}") / "x.tar.gz", content)
        add(f"{name} archive", folder / f"tar {name}" / "x.tar.gz", open_images)
        given = place(f"cifar {name}")
        for file_name, data in content.items():
            (given / file_name).write_bytes(data)
        first = given / ("train.bin" if name == "binary" else "train")
        add(f"{name} batch", first, lambda p: open_images(p.parent))
    torch.save(official_weights(), place("pth") / "x.pth")
    add("pickled weights", folder / "pth" / "x.pth", lambda p: convert_official(p, 4))
    return made


TOKENS = [
    *b"- -1 0 1 1e999 null true NaN Infinity [] {} [ ] { } \" ' , : &a *a !!python/name:os.system !!int".split(),
    *b"!!set # % | \\ud800 ../ / IHDR O .nan 1_000 0x10 1:1 2020-01-01 F64 |O <f8 ( ) R.".split(),
    *(b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"9" * 30, b"\n", b"\r", b"<<: *a", b"? "),
    *(b"- ", b"\t", b"\x1b[2J", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"PK\x03\x04", b"\x80\x02", b"c__builtin__\neval\n"),
]


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The data after a few changes: bytes overwritten, inserted, deleted, repeated or moved, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.integers(0, 6)):
            case 0:
                changed[at : at + 1] = bytes([changed[at] ^ draw(st.integers(1, 255))]) if changed else b"\0"
            case 1:
                token = draw(st.sampled_from(TOKENS))
                changed[at : at + len(token)] = token
            case 2:
                changed[at:at] = draw(st.sampled_from(TOKENS))
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length] * draw(st.integers(1, 8))
            case 5:
                part = changed[at : at + length]
                to = draw(st.integers(0, max(0, len(changed) - 1)))
                changed[to : to + length] = part
            case 6:
                del changed[at:]
    return bytes(changed)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 10**30])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["digits", "none", "dia-lstm", "../x", "\x1b[2J", "os.system", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def rewritten(draw: st.DrawFn, value: Any) -> Any:
    """A JSON or YAML value with one part replaced or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: draw(rewritten(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(rewritten(value[at])), *value[at + 1 :]]
    return draw(values)


def hostile_data(target: Reader) -> st.SearchStrategy[bytes]:
    """Contents that replace a target's file: mostly mutations of the file itself."""
    data = target.file.read_bytes()
    kinds = [mutated(data), mutated(data), st.binary(max_size=200)]
    if target.file.suffix in (".json", ".jsonl"):
        lines = data.splitlines() if target.file.suffix == ".jsonl" else [data]
        first, rest = json.loads(lines[0]), b"\n".join(lines[1:])
        kinds += [rewritten(first).map(lambda value: json.dumps(value).encode() + b"\n" + rest)] * 4
    if target.file.suffix == ".yaml":
        parsed = yaml.safe_load(data)
        kinds += [rewritten(parsed).map(lambda value: yaml.safe_dump(_plain(value)).encode())] * 4
    return st.one_of(kinds)


def _plain(value: Any) -> Any:
    """Replaces lone surrogates, which YAML can't write."""
    return json.loads(json.dumps(value).encode().replace(b"\\ud800", b"?"))
