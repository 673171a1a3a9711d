"""Inception against torch-fidelity's, with seeded random weights: the release file is not needed."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from dia_diffusion.data import open_images
from dia_diffusion.download import Download
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.evaluate import Evaluator, measure_together
from dia_diffusion.evaluation.features import FeatureExtractor, build_features, inception
from dia_diffusion.evaluation.features.inception import build_inception, unreleased
from dia_diffusion.evaluation.frechet import frechet_distance, measure, sums
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import distance_name
from dia_diffusion.evaluation.reference import measure_reference
from dia_diffusion.evaluation.sources import images_source
from dia_diffusion.io import sha256_of_file
from dia_diffusion.progress import Progress
from tests.evaluation.torch_images import Images


class Unfilled(FeatureExtractorInceptionV3):
    """torch-fidelity's network with its initial weights."""

    def __init__(self, features_list):
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("unfilled", features_list, nothing)

    def load_state_dict(self, *_):
        pass


@pytest.fixture(scope="module")
def network():
    """Seeded weights that give features of realistic size, about 1, that differ between images."""
    torch.manual_seed(0)
    network = Unfilled(["2048", "logits_unbiased"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """The weights as a .pth file, like the release."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return build_features("inception", weights=weights)


class Small(torch.nn.Linear):
    """A network of two tensors that replaces Inception."""

    def __init__(self, features_list, weights):
        super().__init__(60, 20)
        self.load_state_dict(weights)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A small network's file that stands in for the release at a URL; the path in torch's hub where none is yet."""
    monkeypatch.setattr(inception, "InceptionExtractor", Small)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("dia_diffusion.download._check_secure", lambda url: None)  # allows a local file
    file = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(60, 20).state_dict(), file)
    monkeypatch.setattr(inception, "RELEASED", Download(file.as_uri(), sha256_of_file(file), file.stat().st_size))
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    hub.mkdir(parents=True)
    return file, hub / file.name


def images(count, seed):
    """Noise images (count, 3, 32, 32) with mean colors that differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(count, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(count, 3, 32, 32, generator=generator) * 60
    return (mean + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.long
def test_distance_equals_torch_fidelitys(weights, extractor):
    """The short tests compare features here and, in other files, distances of equal features."""
    first, second = images(12, 1), images(12, 2)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(first),
        input2=Images(second),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=12,
    )
    ours = frechet_distance(measure(first.split(7), extractor), measure(second.split(5), extractor))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_features_and_logits_match_torch_fidelity(network, extractor, monkeypatch):
    """Ours runs in channels_last, and in batches of at most CPU_BATCH images."""
    monkeypatch.setattr(inception, "CPU_BATCH", 2)
    batch = images(3, 0)
    features, logits = network(batch)
    assert (extractor.num_features, extractor.widths["logits"]) == (2048, 1008)
    ours, our_logits, _ = extractor.layers(batch).values()
    assert features.std() > 0.1
    torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)
    assert extractor(batch[:0]).shape == (0, 2048)


def spatial_features(network, batch):
    """ADM's: the first 7 channels after the ReLU of the 1x1 convolution in the third 17x17 block, channels last."""
    pixels = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    pixels = (pixels - 128) / 128
    names = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
    for name in f"{names} Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c".split():
        pixels = getattr(network, name)(pixels)
    branch = network.Mixed_6d.branch1x1
    return branch.bn(branch.conv(pixels)).relu().numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(batch), -1)


def test_spatial_features_match_adm_and_sfid_is_their_distance(network, extractor, tmp_path, monkeypatch):
    batches = images(2, 1), images(3, 2)
    first, second = (spatial_features(network, batch) for batch in batches)
    assert extractor.widths == {"features": 2048, "logits": 1008, "spatial": 2023} and first.std() > 0.1
    np.testing.assert_allclose(extractor.layers(batches[0])["spatial"], first, rtol=1e-4, atol=1e-4)
    for name, batch in zip(("fake", "real"), batches, strict=True):
        np.save(tmp_path / f"{name}.npy", batch.permute(0, 2, 3, 1).numpy())
    fake, real = (open_images(str(tmp_path / f"{name}.npy"), channels=3) for name in ("fake", "real"))
    protocol = EvalProtocol(features="inception", num_samples=2, sampler="ddim", steps=1, metrics=["sfid"])
    reference = measure_reference(real, extractor, protocol, Accelerator(cpu=True), Progress())
    evaluator = Evaluator(protocol, extractor, reference, Accelerator(cpu=True))
    record = measure_together([evaluator], images_source(fake), [None])[0]
    expected = frechet_distance(*(sums([torch.from_numpy(each)], 2023) for each in (first, second)))
    assert record.metrics == {f"sFD({extractor.name})": pytest.approx(expected, rel=1e-4)}
    assert protocol.metric_labels("inception") == ["sFID"]
    monkeypatch.setattr(FeatureExtractor, "layers", None)  # both statistics of the reference are cached
    assert measure_reference(real, extractor, protocol, Accelerator(cpu=True), Progress()).spatial.count == 3


def test_only_the_released_weights_are_called_inception(released, own_cache, tmp_path):
    weights, in_hub = released
    tensors = torch.load(weights, weights_only=True)
    # The sha256 is a claim that anybody could make.
    save_file(tensors, tmp_path / "same.safetensors", metadata={"sha256": sha256_of_file(weights)})
    tensors["bias"][0] += 1
    torch.save(tensors, tmp_path / "other.pth")
    save_file(tensors, tmp_path / "other.safetensors")

    def name(path=None):
        return build_inception(path)[0]

    assert name(weights) == "inception"
    other = name(tmp_path / "other.pth")
    assert other == f"inception-{build_inception(tmp_path / 'other.pth')[2][:8]}"
    assert name(tmp_path / "other.safetensors") == other, "both formats have one hash"
    assert distance_name(other) == f"FD({other})"
    assert name(tmp_path / "same.safetensors").startswith("inception-")  # the release's tensors aren't known yet
    shutil.copy(weights, in_hub)
    assert name() == name() == "inception"  # from the release, then from its cached copy
    (cached,) = own_cache.rglob("*.*")
    assert name(cached) == name(tmp_path / "same.safetensors") == "inception"
    assert name(tmp_path / "other.safetensors") == other
    reported = unreleased(other, tmp_path / "other.pth")
    assert (
        sha256_of_file(tmp_path / "other.pth") in reported and sha256_of_file(weights) in reported and other in reported
    )
    assert unreleased("inception", weights) is None


def test_the_release_is_unpickled_once_and_a_damaged_cache_is_made_again(released, own_cache, monkeypatch):
    weights, in_hub = released
    shutil.copy(weights, in_hub)
    expected = build_inception(weights)[2]
    assert build_inception()[2] == expected
    (cached,) = own_cache.rglob("*.*")
    whole = cached.read_bytes()
    for damaged in (whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], whole[:1000]):
        cached.write_bytes(damaged)
        assert build_inception()[2] == expected
        assert cached.stat().st_size == len(whole)
    in_hub.unlink()
    monkeypatch.setattr(torch, "load", None)
    assert build_inception()[2] == expected


def test_missing_weights_are_downloaded_and_checked(released, own_cache, monkeypatch):
    weights, in_hub = released
    size, reported = weights.stat().st_size, []
    assert build_inception(progress=lambda *done: reported.append(done))[2] == build_inception(weights)[2]
    assert reported[-1] == (size, size)
    shutil.rmtree(own_cache)
    monkeypatch.setattr(inception, "RELEASED", Download(weights.as_uri(), "0" * 64, size))
    with pytest.raises(RunError, match="by --inception-weights"):
        build_inception()
    assert not list(own_cache.rglob("*.*"))
    in_hub.write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged") as caught:
        build_inception()
    assert str(in_hub) in str(caught.value) and in_hub.read_bytes() == b"PK"


@pytest.mark.parametrize(
    ("name", "said"),
    [("other.pth", "another network's"), ("cut.pth", "truncated"), ("none.pth", "No such file")],
)
def test_other_files_are_refused_with_the_expected_hash(name, said, tmp_path):
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:-5000])
    with pytest.raises(InputError, match=said) as caught:
        build_features("inception", weights=tmp_path / name)
    message = str(caught.value)
    assert str(tmp_path / name) in message and "\n" not in message
    assert "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2" in message


def test_the_pinned_hash_matches_the_file_name():
    released = inception.RELEASED
    assert released.url.startswith("https://") and released.url.endswith(f"-{released.sha256[:8]}.pth")
    assert len(bytes.fromhex(released.sha256)) == 32
