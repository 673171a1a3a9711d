import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError, RunError
from tests.data.conftest import png, write_folder

datasets = pytest.importorskip("datasets")
LABELS = [1, 0, 0, 1, 2, 2]
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps tests away from this machine's caches and turns progress bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def dataset(columns: dict[str, list], **features):
    images = {name: datasets.Image() for name in columns if name.startswith("image")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**images, **features}))


def labelled(pixels, labels=LABELS):
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
    return dataset(columns, label=datasets.ClassLabel(names=NAMES))


def saved(found, folder: Path) -> Path:
    found.save_to_disk(folder)
    return folder


def test_a_saved_dataset_is_the_folder_of_the_same_images(tmp_path, pixels):
    found = open_images(saved(labelled(pixels), tmp_path / "animals"))
    np.testing.assert_array_equal(found.images, pixels.transpose(0, 3, 1, 2))
    assert (found.name, found.class_names) == ("animals", tuple(NAMES))
    assert found.labels is not None and found.labels.tolist() == LABELS
    order = np.argsort(LABELS, kind="stable")
    files = {f"{NAMES[LABELS[i]]}/{k}.png": png(pixels[i]) for k, i in enumerate(order)}
    folder = open_images(write_folder(tmp_path / "folder", files))
    sorted_set = open_images(saved(labelled(pixels).select(order), tmp_path / "sorted"))
    assert sorted_set.fingerprint == folder.fingerprint != found.fingerprint
    assert sorted_set.class_names == folder.class_names


def test_splits(tmp_path, pixels):
    both = datasets.DatasetDict({"train": labelled(pixels), "test": labelled(pixels).select([4, 1])})
    folder = saved(both, tmp_path / "both")
    assert len(open_images(folder)) == 6
    test = open_images(folder, split="test")
    assert test.split == "test"
    np.testing.assert_array_equal(test.images, pixels[[4, 1]].transpose(0, 3, 1, 2))
    assert test.labels is not None and test.labels.tolist() == [2, 0]
    folder = saved(labelled(pixels), tmp_path / "alone")
    assert open_images(folder).split is None
    with pytest.raises(InputError, match=r"must be train for .*alone, which has no splits, got 'test'"):
        open_images(folder, split="test")
    folder = saved(datasets.DatasetDict({"validation": labelled(pixels)}), tmp_path / "validation")
    with pytest.raises(InputError, match=r"`split` must be one of validation for .*, got 'train'"):
        open_images(folder)


def test_images_are_resized_and_mapped_like_others(tmp_path, pixels):
    calls: list[tuple[int, int]] = []
    folder = saved(labelled(pixels), tmp_path / "animals")
    small = open_images(folder, size=4, channels=1, progress=lambda *counts: calls.append(counts))
    files = open_images(
        write_folder(tmp_path / "x", {f"{i}.png": png(image) for i, image in enumerate(pixels)}), size=4, channels=1
    )
    np.testing.assert_array_equal(small.images, files.images)
    assert calls == [(6, 6)]
    mapped = open_images(folder, size=4, memory_limit=10)
    assert isinstance(mapped.images, np.memmap)
    turned = labelled(pixels[::-1])  # same names and sizes, saved over the first dataset
    del mapped
    saved(turned, folder)
    again = open_images(folder, size=4, memory_limit=10)
    np.testing.assert_array_equal(again.images, open_images(folder, size=4).images)


def test_labels_that_are_hidden_or_of_no_class(tmp_path, pixels):
    assert open_images(saved(labelled(pixels, [-1] * 6), tmp_path / "hidden")).labels is None
    with pytest.raises(InputError, match=r"column label of .* must be in 0\.\.2, got None in row 2"):
        open_images(saved(labelled(pixels, [0, 1, None, 0, 0, 0]), tmp_path / "some"))
    images = [Image.fromarray(image) for image in pixels]
    numbers = dataset({"image": images, "label": LABELS}, label=datasets.Value("int64"))
    assert open_images(saved(numbers, tmp_path / "numbers")).labels is None
    two = dataset(
        {"image": images, "fine": LABELS, "coarse": [0] * 6},
        fine=datasets.ClassLabel(names=NAMES),
        coarse=datasets.ClassLabel(names=["animal"]),
    )
    assert open_images(saved(two, tmp_path / "two")).class_names == tuple(NAMES)


def test_datasets_without_usable_images_are_refused(tmp_path, pixels):
    images = [Image.fromarray(image) for image in pixels]
    refused = {
        "image columns image, image2": dataset({"image": images, "image2": images}),
        r"got none of text": dataset({"text": ["a"]}, text=datasets.Value("string")),
    }
    for number, (message, found) in enumerate(refused.items()):
        with pytest.raises(InputError, match=message) as error:
            open_images(saved(found, tmp_path / str(number)))
        assert "\n" not in str(error.value)
    broken = dataset({"image": [{"bytes": png(pixels[0])}, {"bytes": b"no image"}, {"bytes": b""}]})
    with pytest.raises(InputError, match=r"2 of 3 images can't be read, first: .*broken/image 1 \(not an image"):
        open_images(saved(broken, tmp_path / "broken"))
    folder = saved(labelled(pixels), tmp_path / "cut")
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-300])
    with pytest.raises(InputError, match="cut can't be read as a saved dataset") as error:
        open_images(folder)
    assert "\n" not in str(error.value)


def test_versions_that_run_scripts_are_refused(tmp_path, pixels, monkeypatch):
    folder = saved(labelled(pixels), tmp_path / "animals")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"needs datasets 4 or newer, this is 3\.6\.0"):
        open_images(folder)


def test_a_dataset_by_name(tmp_path, pixels):
    """The name is a folder of parquet files, which `datasets` opens like a repository of the hub."""
    (tmp_path / "animals").mkdir()
    labelled(pixels).to_parquet(tmp_path / "animals" / "train.parquet")
    name = f"hf:{tmp_path / 'animals'}"
    found = open_images(name)
    assert found.name == "animals" and found.class_names == tuple(NAMES)
    assert found.fingerprint == open_images(saved(labelled(pixels), tmp_path / "saved")).fingerprint
    files = write_folder(tmp_path / "files", {f"{NAMES[i % 3]}/{i}.png": png(image) for i, image in enumerate(pixels)})
    assert open_images(f"hf:{files}").fingerprint == open_images(files).fingerprint
    with pytest.raises(InputError, match=r"can't be opened \(Unknown split \"test\""):
        open_images(name, split="test")
    with pytest.raises(InputError, match=r"can't be opened \(BuilderConfig 'other' not found"):
        open_images(f"{name}:other")
    with pytest.raises(InputError, match="must be given as hf:NAME"):
        open_images("hf:")


def test_without_a_network_it_is_one_line(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/animals' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        RunError, match=r"hf:someone/animals can't be downloaded \(Couldn't reach .*save_to_disk"
    ) as error:
        open_images("hf:someone/animals")
    assert "\n" not in str(error.value)


def test_without_the_package_it_is_named(tmp_path, pixels, monkeypatch):
    folder = saved(labelled(pixels), tmp_path / "animals")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hf:cifar10", folder):
        with pytest.raises(InputError, match=r"needs the package datasets: pip install 'dia-diffusion\[datasets\]'"):
            open_images(source)
