"""Inception against torch-fidelity's own, with weights drawn by a seed: its release file is not needed."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from dia_diffusion.data import open_images
from dia_diffusion.download import Download
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.evaluation.evaluate import Evaluator, measure_together
from dia_diffusion.evaluation.features import FeatureExtractor, build_features, inception
from dia_diffusion.evaluation.features.inception import InceptionExtractor, build_inception, unreleased
from dia_diffusion.evaluation.frechet import frechet_distance, measure, sums
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import distance_name
from dia_diffusion.evaluation.reference import measure_reference
from dia_diffusion.evaluation.sources import images_source
from dia_diffusion.io import sha256_of_file
from dia_diffusion.progress import Progress
from tests.evaluation.torch_images import Images


class Unfilled(FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is initialised."""

    def __init__(self, features_list):
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("unfilled", features_list, nothing)

    def load_state_dict(self, *_):
        pass


@pytest.fixture(scope="module")
def network():
    """Seeded weights under which features have the size of the real ones': about 1, and different for each image."""
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
    """The weights as the release has them, a .pth file."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def released(weights, tmp_path, monkeypatch):
    """These weights as if they were the release, to be had from a URL; an empty hub folder; nothing else downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", None)
    monkeypatch.setattr("dia_diffusion.download._check_secure", lambda url: None)  # of a file here
    download = Download(weights.as_uri(), sha256_of_file(weights), weights.stat().st_size)
    monkeypatch.setattr(inception, "RELEASED", download)
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    hub.mkdir(parents=True)
    return hub / weights.name


def images(count, seed):
    """Noise of a colour and contrast that differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(count, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(count, 3, 32, 32, generator=generator) * 60
    return (mean + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("layer", "count"), [("64", 24), pytest.param("2048", 12, marks=pytest.mark.long)], ids=["early", "full"]
)
def test_distance_equals_torch_fidelitys(weights, layer, count):
    first, second = images(count, 1), images(count, 2)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(first),
        input2=Images(second),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        feature_layer_fid=layer,
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        batch_size=count,
    )
    extractor = FeatureExtractor(*build_inception(weights, features_list=[layer]), "cpu")
    ours = frechet_distance(measure(first.split(7), extractor), measure(second.split(5), extractor))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_features_and_logits_are_torch_fidelitys(network, weights):
    """Ours in channels_last; and a batch of one is as good as a batch of three."""
    batch = images(3, 0)
    features, logits = network(batch)
    extractor = build_features("inception", weights=weights)
    assert (extractor.num_features, extractor.num_classes) == (2048, 1008)
    ours, our_logits, _ = extractor.layers(batch).values()
    assert features.std() > 0.1
    torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor(batch[1:2]), features[1:2], rtol=1e-4, atol=1e-4)


def spatial_features(network, batch):
    """ADM's: the first 7 channels after the ReLU of the 1x1 convolution in the third block of 17x17, channels last."""
    pixels = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    pixels = (pixels - 128) / 128
    names = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
    for name in f"{names} Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c".split():
        pixels = getattr(network, name)(pixels)
    branch = network.Mixed_6d.branch1x1
    return branch.bn(branch.conv(pixels)).relu().numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(batch), -1)


def test_spatial_features_are_adms_and_sfid_their_distance(network, weights, tmp_path, monkeypatch):
    extractor = build_features("inception", weights=weights)
    batches = images(4, 1), images(5, 2)
    first, second = (spatial_features(network, batch) for batch in batches)
    assert extractor.widths == {"features": 2048, "logits": 1008, "spatial": 2023} and first.std() > 0.1
    np.testing.assert_allclose(extractor.layers(batches[0])["spatial"], first, rtol=1e-4, atol=1e-4)
    for name, batch in zip(("fake", "real"), batches, strict=True):
        np.save(tmp_path / f"{name}.npy", batch.permute(0, 2, 3, 1).numpy())
    fake, real = (open_images(str(tmp_path / f"{name}.npy"), channels=3) for name in ("fake", "real"))
    protocol = EvalProtocol(features="inception", num_samples=4, sampler="ddim", steps=1, metrics=["sfid"])
    reference = measure_reference(real, extractor, protocol, Accelerator(cpu=True), Progress())
    evaluator = Evaluator(protocol, extractor, reference, Accelerator(cpu=True))
    record = measure_together([evaluator], images_source(fake), [None])[0]
    expected = frechet_distance(*(sums([torch.from_numpy(each)], 2023) for each in (first, second)))
    assert record.metrics == {f"sFD({extractor.name})": pytest.approx(expected, rel=1e-4)}
    assert protocol.metric_labels("inception") == ["sFID"]
    monkeypatch.setattr(FeatureExtractor, "layers", None)  # both statistics of the reference are kept
    assert measure_reference(real, extractor, protocol, Accelerator(cpu=True), Progress()).spatial.count == 5


def test_a_batch_larger_than_a_cpu_takes_at_once_is_torch_fidelitys(network, weights):
    batch = images(inception.CPU_BATCH + 2, 0)
    early = Unfilled(["64"])
    FeatureExtractorInceptionV3.load_state_dict(early, network.state_dict())
    (expected,) = early(batch)
    _, extractor, _ = build_inception(weights, features_list=["64"])
    torch.testing.assert_close(extractor(batch)[0], expected, rtol=1e-4, atol=1e-4)
    assert extractor(batch[:0])[0].shape == (0, 64)


def test_both_formats_have_one_hash(weights, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    save_file(tensors, tmp_path / "same.safetensors")
    tensors["fc.bias"][0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    first, same, other = (
        build_inception(path, features_list=["64"])[2]
        for path in (weights, tmp_path / "same.safetensors", tmp_path / "other.safetensors")
    )
    assert first == same
    assert first != other


def test_only_the_released_weights_are_called_inception(weights, released, own_cache, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    save_file(tensors, tmp_path / "same.safetensors", metadata={"sha256": sha256_of_file(weights)})  # anybody's claim
    tensors["fc.bias"][0] += 1
    torch.save(tensors, tmp_path / "other.pth")
    save_file(tensors, tmp_path / "other.safetensors")

    def name(path=None):
        return build_inception(path, features_list=["64"])[0]

    assert name(weights) == "inception"
    other = name(tmp_path / "other.pth")
    assert other == f"inception-{build_inception(tmp_path / 'other.pth', features_list=['64'])[2][:8]}"
    assert name(tmp_path / "other.safetensors") == other
    assert distance_name(other) == f"FD({other})"
    assert name(tmp_path / "same.safetensors").startswith("inception-")  # whose tensors they are isn't known yet
    shutil.copy(weights, released)
    assert name() == name() == "inception"  # of the release, then of what the cache has made of it
    (cached,) = own_cache.rglob("*.*")
    assert name(cached) == name(tmp_path / "same.safetensors") == "inception"
    assert name(tmp_path / "other.safetensors") == other
    told = unreleased(other, tmp_path / "other.pth")
    assert sha256_of_file(tmp_path / "other.pth") in told and sha256_of_file(weights) in told and other in told
    assert unreleased("inception", weights) is None


def test_torchs_hub_folder_is_read_once_and_safetensors_afterwards(weights, released, own_cache, monkeypatch):
    shutil.copy(weights, released)
    *_, expected = build_inception(weights, features_list=["64"])
    assert build_inception(features_list=["64"])[2] == expected
    (cached,) = own_cache.rglob("*.*")
    assert load_file(cached).keys() == torch.load(weights, weights_only=True).keys()
    released.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **kwargs: {} if not kwargs["weights_only"] else 1 / 0)
    assert build_inception(features_list=["64"])[2] == expected


def test_a_damaged_cache_is_made_again(weights, released, own_cache):
    shutil.copy(weights, released)
    *_, expected = build_inception(features_list=["64"])
    (cached,) = own_cache.rglob("*.*")
    data = bytearray(cached.read_bytes())
    data[-5] ^= 1
    for damaged in (data, data[:1000]):
        cached.write_bytes(damaged)
        assert build_inception(features_list=["64"])[2] == expected
        assert cached.stat().st_size == len(data)


def test_what_is_nowhere_is_downloaded_and_checked(weights, released, own_cache, monkeypatch):
    told = []
    *_, found = build_inception(features_list=["64"], progress=lambda *done: told.append(done))
    assert found == build_inception(weights, features_list=["64"])[2]
    assert told[-1] == (weights.stat().st_size, weights.stat().st_size)
    shutil.rmtree(own_cache)
    monkeypatch.setattr(inception, "RELEASED", Download(weights.as_uri(), "0" * 64, weights.stat().st_size))
    with pytest.raises(RunError, match="by --inception-weights"):
        build_inception()
    assert not list(own_cache.rglob("*.*"))


def test_a_damaged_file_in_torchs_folder_is_named_and_kept(released):
    released.write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged") as caught:
        build_inception()
    assert str(released) in str(caught.value) and released.read_bytes() == b"PK"


def test_other_files_are_refused_with_the_expected_hash(weights, tmp_path):
    whole = weights.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(3)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    (tmp_path / "text.pth").write_text("no weights")
    said = {
        "cut.pth": "truncated",
        "cut.safetensors": "truncated",
        "other.safetensors": "another network's",
        "other.pth": "another network's",
        "module.pth": "no file of tensors",
        "numbers.pth": "must hold tensors by name",
        "text.pth": "no file of tensors",
        "none.pth": "No such file",
    }
    for name, text in said.items():
        with pytest.raises(InputError, match=text) as caught:
            build_features("inception", weights=tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and "\n" not in message
        assert "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2" in message


def test_the_pinned_release_is_the_one_its_name_says():
    released = inception.RELEASED
    assert released.url.startswith("https://") and released.url.endswith(f"-{released.sha256[:8]}.pth")
    assert len(bytes.fromhex(released.sha256)) == 32


def test_finds_the_layers_asked_for(network):
    extractor = InceptionExtractor(["192", "64"], network.state_dict())
    assert [layer.shape[1] for layer in extractor(images(1, 0))] == [192, 64]
