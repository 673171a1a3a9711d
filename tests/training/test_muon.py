"""Muon compared with singular value decompositions and torch's Muon, and what all optimizers here guarantee."""

import pytest
import torch
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.uvit import UViT
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.muon import Muon, hidden_matrices, muon_groups, orthogonalize
from dia_diffusion.training.optimizer import parameter_groups
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import Recorder
from tests.training.run_files import weights
from tests.training.test_finite import same, spoil, states_of_steps

MUON = ("--optimizer.name", "muon")
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
TINY_UVIT = {"sample_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_layers": 3}


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 60), (2, 60, 24)])
def test_singular_values_become_those_of_the_quintic(shape: tuple[int, ...]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-2, 0, 24, dtype=torch.float64)
    matrices = u * values @ vh
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(orthogonalize(matrices), u * expected @ vh)
    assert expected.min() > 0.68 and expected.max() < 1.21, "close to U V^T"
    rounded = orthogonalize(matrices.float(), torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert (rounded - u * expected @ vh).norm() < 0.1 * expected.norm() * shape[0] ** 0.5


def test_no_gradient_is_no_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_steps_are_those_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def step_both(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        (start,), (own,), (other,) = (parameters(shape, dtype=torch.float64) for _ in range(3))
        steps(Muon([{"params": [own], "stacked": 1}], **OPTIONS, momentum=0.9, dtype=dtype), [own])
        options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
        steps(torch.optim.Muon([other], **options), [other])
        return own - start, other - start

    own, other = step_both(torch.bfloat16)
    assert (own - other).norm() < 0.05 * other.norm()
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch iterates in bfloat16
    own, other = step_both(None)
    torch.testing.assert_close(own, other)


def test_stacked_matrices_are_updated_like_separate_ones() -> None:
    (qkv,) = parameters((72, 24), dtype=torch.float64)
    apart = [nn.Parameter(part.clone()) for part in qkv.detach().chunk(3)]
    gradient = torch.randn(72, 24, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(24)[:, None]
    qkv.grad = gradient
    for part, own in zip(apart, gradient.chunk(3), strict=True):
        part.grad = own.clone()
    Muon([{"params": [qkv], "stacked": 3}], **OPTIONS).step()
    Muon([{"params": apart, "stacked": 1}], **OPTIONS).step()
    torch.testing.assert_close(qkv.detach(), torch.cat([part.detach() for part in apart]))


def test_other_parameters_get_torchs_adamw_bit_for_bit() -> None:
    shapes = ((5,), (3, 4), (2, 1, 3, 3))
    own, other = parameters(*shapes), parameters(*shapes)
    optimizer, adamw = Muon([{"params": own}], **OPTIONS), torch.optim.AdamW(other, **OPTIONS, fused=True)
    steps(optimizer, own)
    steps(adamw, other)
    for one, two in zip(own, other, strict=True):
        assert torch.equal(one, two) and optimizer.state[one].keys() == adamw.state[two].keys()
        assert all(torch.equal(optimizer.state[one][key], adamw.state[two][key]) for key in adamw.state[two])


def test_fp16s_scaler_skips_and_unscales() -> None:
    scaled, plain = parameters((4, 4), (4,)), parameters((4, 4), (4,))
    groups = [[{"params": [matrix], "stacked": 1}, {"params": [bias]}] for matrix, bias in (scaled, plain)]
    optimizer, expected = (Muon(group, **OPTIONS) for group in groups)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for factor in (1.0, float("inf"), 2.0):
        for parameter, other in zip(scaled, plain, strict=True):
            other.grad = torch.arange(1.0, 1 + parameter.numel()).view_as(parameter) * factor
            parameter.grad = None
            scaler.scale((parameter * other.grad).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor < float("inf"):
            expected.step()
    for parameter, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(parameter, other)
    assert float(optimizer.state[scaled[1]]["step"]) == 2 and scaler.get_scale() == 128


def test_which_parameters_are_hidden_matrices() -> None:
    model = UViT(**TINY_UVIT, num_attention_heads=2, num_classes=3)
    assert hidden_matrices(model).keys() == {
        f"{block}.{name}.weight"
        for block in ("in_blocks.0", "mid_block", "out_blocks.0")
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    } | {"out_blocks.0.skip_linear.weight"}
    groups = muon_groups(model, parameter_groups(model, 1.0, 2.0), 3.0)
    assert [(group["peak_rate"], group.get("stacked")) for group in groups] == [(1, None), (2, None), (3, 1), (3, 3)]
    assert groups[1]["params"] == list(model.unit.parameters())
    assert [tuple(weight.shape) for weight in groups[3]["params"]] == 3 * [(48, 16)]
    in_groups = [parameter for group in groups for parameter in group["params"]]
    assert len(in_groups) == len(set(in_groups)) and set(in_groups) == set(model.parameters())


DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4}
UNET = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
UNET |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


@pytest.mark.parametrize(
    ("backbone", "kwargs", "names"),
    [
        ("dit", DIT, {"to_q", "to_k", "to_v", "to_out.0", "proj", "net.2"}),
        ("unet2d", UNET, {"to_q", "to_k", "to_v", "to_out.0"}),
    ],
)
def test_hidden_matrices_of_diffusers_networks(backbone: str, kwargs: dict, names: set[str]) -> None:
    model = AttachedModel(backbone, kwargs, 8, 1, attention_kwargs={"reduction": 4})
    matrices = hidden_matrices(model)
    assert all(any(name.endswith(f".{end}.weight") for end in names) for name in matrices)
    assert len(matrices) == len(names), "in one block"


def test_a_network_without_hidden_matrices_is_refused() -> None:
    kwargs = UNET | {"add_attention": False}
    model = AttachedModel("unet2d", kwargs, 8, 1, attention_kwargs={"reduction": 4})
    with pytest.raises(InputError, match=r"`optimizer.name` must be adamw for a network without .*, got muon"):
        muon_groups(model, parameter_groups(model, 1.0), 1.0)


def test_a_step_that_is_not_finite_touches_nothing(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {1, 4}, lambda loss: loss * float("nan"))
    found = states_of_steps(Trainer(tiny("run", *MUON), Recorder()))
    weight = "mid_block.attn.qkv.weight"
    changing = {f"model/{weight}", f"optimizer/{weight}/momentum_buffer", "optimizer/norm.weight/step"}
    for step in range(1, 7):
        unchanged = same(found[step - 1], found[step])
        assert unchanged == found[step].keys() if step in (1, 4) else not unchanged & changing


def test_checkpoints_have_its_state_by_name(tiny, finished) -> None:
    run, model = finished("run", *MUON), DiffusionTask(tiny("run", *MUON)).build_model()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for key, tensor in weights(run, 6, "optimizer").items():
        name, quantity = key.rsplit("/", 1)
        assert tensor.shape == (() if quantity == "step" else shapes[name])
        assert (quantity == "momentum_buffer") == (name in hidden_matrices(model))


def test_it_orthogonalizes_in_the_precision_of_the_run(tiny) -> None:
    for precision, dtype in (("none", None), ("bf16", torch.bfloat16)):
        task = DiffusionTask(tiny("run", *MUON, "--train.mixed_precision", precision))
        assert task.build_optimizer(task.build_model()).dtype is dtype
