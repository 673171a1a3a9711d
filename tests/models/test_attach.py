"""Units attached by hooks give the same results as networks with the units written in place."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dia_diffusion import attach
from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import attachment_in
from tests.attention.networks import Network, gradients, is_branch, tiny_dit, tiny_unet

UNITS = [("dia-lstm", {}), ("se", {"sharing": "individual"}), ("cbam", {})]


@pytest.mark.parametrize(("unit", "kwargs"), UNITS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_and_gradients_match_the_network_written_out(unit: str, kwargs: dict, checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, unit, is_branch, reduction=4, **kwargs)
    model.checkpointed = checkpointed
    first, second = torch.randn(2, 3, 8, 4, 4, dtype=torch.float64)

    # Two forward passes, then their backward passes in either order.
    for order in (1, -1):
        outputs = [model(first), model(second)]
        found = gradients(model, *[output.square().sum() for output in outputs][::order])
        expected = [model.written_out(x, list(attached.units)) for x in (first, second)]
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, gradients(model, *[output.square().sum() for output in expected]))


def test_frozen_weights_and_a_loss_on_features_are_recomputed_right() -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    model.first.requires_grad_(False)
    features: list[Tensor] = []
    model.widen.register_forward_hook(lambda module, args, output: features.append(args[0]))
    results = []
    for model.checkpointed in (False, True):
        features.clear()
        model(x)  # the output and the end of its graph are dropped
        gc.collect()
        results.append(gradients(attached.units[0], features[0].square().sum()))
    torch.testing.assert_close(*results)


def test_states_kept_for_recomputation_are_freed_with_the_graph() -> None:
    model = Network()
    attached = attach(model, at=is_branch)
    model.checkpointed = True
    for _ in range(3):
        output = model(torch.randn(2, 8, 4, 4))
    gc.collect()
    assert len(attached.passes.kept) == 1
    output.sum().backward()
    del output
    gc.collect()
    assert len(attached.passes.kept) == 0
    with torch.no_grad():
        model(torch.randn(2, 8, 4, 4))
    assert len(attached.passes.kept) == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
def test_diffusers_checkpointing_gives_the_same_gradients(build: Callable[[], nn.Module], when: str) -> None:
    torch.manual_seed(0)
    model = build().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # a new DiT's output is 0 whatever its blocks do
    twin = copy.deepcopy(model)
    attach(twin)
    if when == "before":
        model.enable_gradient_checkpointing()
        attach(model)
    else:
        attach(model)
        model.enable_gradient_checkpointing()
    model.attention_units.load_state_dict(twin.attention_units.state_dict())
    inputs = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 500])
    labels = {} if build is tiny_unet else {"class_labels": torch.tensor([0, 2])}
    model.eval(), twin.eval()  # a DiT drops labels at random while it trains
    results = [gradients(m, m(*inputs, **labels).sample.square().sum()) for m in (model, twin)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_reentrant_checkpointing_is_refused() -> None:
    class Reentrant(Network):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, self.first, x.requires_grad_(), use_reentrant=True)

    model = Reentrant()
    attach(model, at=["first.0.conv", "first.1.conv", "first.2.conv"])
    with pytest.raises(InputError, match=r"first.0.conv must run with gradients .*, got none; .*use_reentrant=False"):
        model(torch.randn(2, 8, 4, 4))


def test_a_checkpoint_around_the_whole_model_restarts_the_state() -> None:
    torch.manual_seed(0)
    model = Network().double()
    attached = attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    found = gradients(model, checkpoint(model, x, use_reentrant=False).square().sum())
    expected = gradients(model, model.written_out(x, list(attached.units)).square().sum())
    torch.testing.assert_close(found, expected)


def test_a_compiled_model_is_one_graph_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = Network()
    attach(model, at=is_branch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(2, 2, 8, 4, 4)
    results = [gradients(model, *[network(x).square().sum() for x in inputs]) for network in (compiled, model)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.checkpointed = True
    with pytest.raises(InputError, match=r"must be enabled by its enable_gradient_checkpointing\(\), got a checkpoint"):
        compiled(inputs[0])


def test_a_compiled_model_recomputes_the_same_gradients() -> None:
    """With a backend that traces the backward pass, which contains the recomputation."""
    torch.manual_seed(0)
    model = tiny_dit(num_layers=2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach(model)
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2]))
    results = [gradients(model, network(*inputs).sample.square().sum()) for network in (compiled, model)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_detach_removes_only_its_own_units() -> None:
    model = tiny_unet()
    attached = attach(model)
    attached.detach()
    assert "save_pretrained" not in vars(model)
    again = attach(model)
    attached.detach()  # again, after other units were attached
    assert model.attention_units is again.units


def test_a_copy_is_independent() -> None:
    model = Network()
    attached = attach(model, at=is_branch)
    copied = copy.deepcopy(model)
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    for parameter in copied.attention_units.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(x), expected) and not torch.equal(copied(x), expected)
    theirs = attachment_in(copied)
    assert theirs is not None and theirs is not attached and theirs.model is copied
    attached.detach()
    assert not torch.equal(copied(x), model(x))
    theirs.detach()
    assert torch.equal(copied(x), model(x))


def test_after_an_error_in_a_pass_the_next_is_right() -> None:
    model = Network()
    attach(model, at=is_branch)
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    failing = model.first[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    failing.remove()
    with pytest.raises(InputError, match="got a call outside it"):
        model.first[0](x)
    assert torch.equal(model(x), expected)


def test_autocast_keeps_the_dtype_of_features() -> None:
    model = Network()
    attach(model, at=is_branch)
    seen = []
    model.first[0].conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 8, 4, 4)).float().sum().backward()
    assert seen == [torch.bfloat16]


def test_the_unit_changes_no_other_weights_and_no_later_draws() -> None:
    drawn = []
    for unit, kwargs in UNITS:
        torch.manual_seed(0)
        model = Network()
        attach(model, unit, is_branch, reduction=4, **kwargs)
        drawn.append((model.second[1].conv.weight, torch.randn(4)))
    for one in drawn[1:]:
        torch.testing.assert_close(one, drawn[0], rtol=0, atol=0)
