"""Heat maps against a written-out Grad-CAM, for maps and tokens, and the command's figure."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dia_diffusion.analysis.gradcam import HeatMaps, heat_maps, last_block, token_grid
from dia_diffusion.cli.main import main
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import SavedClassifier, build_classifier, load_classifier, save_classifier

pytest.importorskip("pytorch_grad_cam")
RESNET = BackboneConfig(backbone="cifar-resnet20-basic", sample_size=32, num_classes=10, attention="dia-lstm")
VIT = BackboneConfig(backbone="vit_s_16", sample_size=32, num_classes=10)


def saved(place: Path, config: BackboneConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    names = tuple(f"class{number}" for number in range(10))
    save_classifier(place, build_classifier(config).state_dict(), config, [0.5] * 3, [0.25] * 3, names, {})
    return place


def by_hand(classifier: SavedClassifier, images: torch.Tensor, numbers: list[int]) -> np.ndarray:
    """Channels weighted by their mean gradient, clipped at 0, resized to the images, scaled to [0, 1]."""
    layer, is_tokens = last_block(classifier.model)
    kept = []
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = classifier.model(((images / 255 - 0.5) / 0.25).requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[range(len(numbers)), numbers].sum(), kept)
    features = kept[0]
    if is_tokens:  # (B, 1 + L, N), row by row
        side = int((features.shape[1] - 1) ** 0.5)
        shape = (len(images), side, side, features.shape[2])
        features, gradient = (x[:, 1:].reshape(shape).permute(0, 3, 1, 2) for x in (features, gradient))
    cam = (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1).clamp(min=0)
    cam = F.interpolate(cam[:, None], size=32, mode="bilinear")[:, 0]
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return (cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-7)).detach().numpy()


@pytest.mark.parametrize("config", [RESNET, VIT], ids=["maps", "tokens"])
def test_heat_maps_match_the_formula(config: BackboneConfig, tmp_path: Path) -> None:
    classifier = load_classifier(saved(tmp_path / "one", config))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = heat_maps("one", classifier, images, [0, 3, 7])
    assert np.abs(found.maps - by_hand(classifier, images, [0, 3, 7])).max() < 1e-3
    logits = classifier.model((images / 255 - 0.5) / 0.25).double().numpy()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(found.scores, softmax[range(3), [0, 3, 7]], atol=1e-6)
    assert (found.predicted == logits.argmax(axis=1)).all()
    assert not any(module._forward_hooks for module in [last_block(classifier.model)[0]])  # no hook is left behind


def test_tokens_keep_their_places() -> None:
    grid = token_grid(torch.arange(10.0)[None, :, None])
    assert grid.shape == (1, 1, 3, 3) and grid[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_command_draws_classifiers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(saved(tmp_path / name, RESNET, seed)) for seed, name in enumerate(("none", "dia"))]
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    command = ["gradcam", *places, "--images", str(tmp_path / "images.npz"), "--out", str(tmp_path / "grid.png")]
    assert main([*command, "--count", "2"]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    assert "of images.npz" in capsys.readouterr().out
    assert main(["gradcam", places[0], *command[1:-1], str(tmp_path / "b.png")]) == 2
    assert "classifiers must have folders of different names" in capsys.readouterr().err
    for more, message in (
        ([], "exists"),
        (["--out", str(tmp_path / "b.png"), "--class", "10"], "`--class` must be 0 to 9 for none, got 10"),
        (["--out", str(tmp_path / "b.what")], "must have the suffix of a figure format"),
        (["--out", str(tmp_path / "b.png"), "--count", "0"], "`--count` must be 1 or more, got 0"),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "b.png").exists()


def test_class_folders_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(saved(tmp_path / "none", RESNET))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for folder, name in (("some", "class3"), ("some", "class7"), ("other", "class3"), ("other", "zebra")):
        (tmp_path / folder / name).mkdir(parents=True)
        picture.save(tmp_path / folder / name / "0.png")
    asked = []

    def keep(name: str, classifier: SavedClassifier, images: torch.Tensor, classes: list[int]) -> HeatMaps:
        asked.extend(classes)
        return heat_maps(name, classifier, images, classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dia_diffusion.analysis.gradcam.heat_maps", keep)
        assert main(["gradcam", place, "--images", str(tmp_path / "some"), "--out", str(tmp_path / "a.png")]) == 0
    assert asked == [3, 7]
    assert main(["gradcam", place, "--images", str(tmp_path / "other"), "--out", str(tmp_path / "b.png")]) == 2
    assert "has the class 'zebra'" in capsys.readouterr().err
