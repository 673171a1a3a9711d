import textwrap

import pytest
import torch
import torch_fidelity
from torch_fidelity import register_feature_extractor

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.frechet import frechet_distance, measure
from tests.evaluation.torch_images import Images

MODULE = """
    import torch
    from torch_fidelity import FeatureExtractorBase

    class Projection(FeatureExtractorBase):
        seed = 0

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            generator = torch.Generator().manual_seed(self.seed)
            self.weight = torch.nn.Parameter(torch.randn(192, 5, generator=generator))

        @staticmethod
        def get_provided_features_list():
            return ("5", "classes")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"fid": "5"}[metric]

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1) @ self.weight
            layers = {"5": features, "classes": features[:, :2]}
            return tuple(layers[name] for name in self.features_list)

    class Classifying(Projection):
        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "classes" if metric == "isc" else "5"

    class Other(Projection):
        seed = 1

    class Failing(Projection):
        def forward(self, images):
            raise RuntimeError("out of\\norder")

    class Flat(Projection):
        def forward(self, images):
            return (images.float().mean((1, 2, 3)),)

    class NotFinite(Projection):
        def forward(self, images):
            return (torch.full((len(images), 5), float("nan")),)

    class LargeKernel(Projection):
        def forward(self, images):
            return (torch.nn.functional.conv2d(images.float(), torch.ones(5, 3, 9, 9)).mean((2, 3)),)

    class AsWideAsTheImage(Projection):
        def forward(self, images):
            return (images.float().mean(2).flatten(1),)

    class NotFiniteInColour(Projection):
        def forward(self, images):
            return (torch.log(1 - images.float().flatten(2).mean(2)),)

    class Unbuildable(Projection):
        def __init__(self, name):
            pass

    class Unrelated:
        pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A user's module in the working folder, under a name that no other test has imported."""
    name = f"user_{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone after the test
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    return name


def test_distance_equals_torch_fidelitys(module, digits):
    first, second = torch.from_numpy(digits.images[:100]), torch.from_numpy(digits.images[100:250])
    extractor = build_features(f"{module}:Projection")
    register_feature_extractor(module, __import__(module).Projection)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(first),
        input2=Images(second),
        feature_extractor=module,
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert extractor.name == f"{module}:Projection"
    ours = frechet_distance(measure([first], extractor), measure([second], extractor))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_logits_are_optional(module, digits):
    images = torch.from_numpy(digits.images[:4])
    without, with_logits = build_features(f"{module}:Projection"), build_features(f"{module}:Classifying")
    assert without.widths == {"features": 5}
    assert with_logits.widths == {"features": 5, "logits": 2}
    features, logits = with_logits.layers(images).values()
    assert torch.equal(logits, features[:, :2])
    assert torch.equal(without(images), features)
    assert without.layers(images).keys() == {"features"}


def test_hash_is_of_weights_and_code(module, tmp_path):
    """Without the code in the hash, results cached before an edit of the features would still be used after it."""
    text = (tmp_path / f"{module}.py").read_text()
    (tmp_path / f"{module}_edited.py").write_text(text.replace("/ 255", "/ 1"))
    (tmp_path / f"{module}_elsewhere.py").write_text(f"from {module} import Projection")
    names = ("Projection", "Classifying", "Other")
    first, again, other = (build_features(f"{module}:{name}").weights_hash for name in names)
    edited, elsewhere = (build_features(f"{module}_{name}:Projection").weights_hash for name in ("edited", "elsewhere"))
    assert first == again == elsewhere
    assert len({first, other, edited}) == 3


def refused(said, call, *arguments):
    with pytest.raises(InputError, match=said) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LargeKernel", r"fail on images of 8x8 .RuntimeError: .*[Kk]ernel size"),
        ("AsWideAsTheImage", r"must be \(4, 192\) for images of shape \(4, 3, 8, 8\), got \(4, 24\)"),
        ("NotFiniteInColour", "aren't finite for images of 8x8"),
    ],
)
def test_features_that_fail_on_the_images_are_reported_in_one_line(module, name, said, digits):
    extractor = build_features(f"{module}:{name}")  # the check on a black 64x64 image passes
    refused(said, extractor, torch.from_numpy(digits.images[:4]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Failing", "fail on images of 64x64 .RuntimeError: out of order"),
        ("Flat", r"must be \(1, number of features\) for images of shape \(1, 3, 64, 64\), got \(1,\)"),
        ("NotFinite", "aren't finite"),
        ("Unbuildable", r"can't be constructed as Unbuildable\(name, layers\) .TypeError"),
        ("Unrelated", "Unrelated in .* isn't one; .* has: Projection, Classifying"),
        ("Nothing", "no Nothing there; .* has: Projection"),
        ("", "or MODULE:CLASS"),
    ],
)
def test_unusable_features_are_reported_in_one_line(module, name, said):
    refused(said, build_features, f"{module}:{name}")


def test_modules_that_cannot_be_imported(module, tmp_path):
    (tmp_path / "user_needing.py").write_text("import nothing_of_this_name")
    (tmp_path / "user_wrong.py").write_text("def f(:")
    (tmp_path / "user_ending.py").write_text("raise SystemExit(3)")
    said = {
        "user_absent": "no module 'user_absent' in",
        "user_absent.inner": "no module 'user_absent.inner' in",
        "user_needing": "No module named 'nothing_of_this_name'",
        "user_wrong": "SyntaxError",
        "user_ending": "SystemExit: 3",
    }
    for name, text in said.items():
        refused(text, build_features, f"{name}:Features")
