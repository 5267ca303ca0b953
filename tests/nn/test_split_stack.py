"""QuantExperts whose experts have different precisions, against transformers' experts in float64."""

import copy

import pytest
import torch
from test_quant_experts import assert_close, check_batches, experts_of, routed

import klfast
from klfast import QuantSpec
from klfast.core.errors import InvalidInputError
from klfast.nn import QuantExperts, QuantLinear
from klfast.nn.experts import stack_names
from klfast.nn.split_stack import SplitStack

# By expert of four; None keeps full precision.
MIXED = ("int4-g16-asym", None, "int8-channel-sym", "int4-g16-asym")
WITHOUT_FULL = ("int8-g32-sym", "int6-g16-asym", "int4-g32-sym", "int6-g16-asym")
ONE_QUANTIZED = (None, None, "int4-g16-sym", None)


def split(experts, specs, activations=("exact",) * 4, names=None):
    """Return QuantExperts whose experts have these specs, and float64 experts with the same matrices."""
    stacks, truth = {}, copy.deepcopy(experts).double()
    truth.config._experts_implementation = "eager"  # torch's grouped product has no float64
    for name in stack_names(experts) if names is None else names:
        stack, layers = getattr(experts, name), {}
        for i, spec in enumerate(specs):
            if spec is not None:
                qt = klfast.quantize(stack[i].detach(), QuantSpec.of(spec))
                layers[i] = QuantLinear(qt, activation=activations[i], dtype=stack.dtype)
                getattr(truth, name).data[i] = qt.dequantize(torch.float32).double()
        stacks[name] = SplitStack(layers, stack)
    return QuantExperts(experts, stacks), truth


@pytest.mark.parametrize("specs", [MIXED, WITHOUT_FULL, ONE_QUANTIZED])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", ["granite_hybrid_moe", "nemotron_h_moe"])
@pytest.mark.filterwarnings("ignore:.*float64:klfast.SlowPathWarning")
@torch.no_grad()
def test_computes_what_transformers_does(family, dtype, rtol, specs):
    experts = experts_of(family)
    names = stack_names(experts)
    for chosen in (names, names[:1], names[1:]):
        module, truth = split(copy.deepcopy(experts), specs, names=chosen)
        check_batches(module.to(dtype), truth, experts, dtype, rtol)


@torch.no_grad()
def test_odd_sizes_of_matrices():
    """Rows of 5 and inputs of 13: matrices begin within words and tiles of their part."""
    full = torch.randn(7, 5, 13)
    specs = (
        "int4-channel-asym",
        "int8-channel-sym",
        "int4-channel-asym",
        None,
        "int6-channel-asym",
        None,
        "int4-g13-sym",
    )
    made = [None if spec is None else klfast.quantize(full[i], spec) for i, spec in enumerate(specs)]
    stack = SplitStack({i: QuantLinear(qt) for i, qt in enumerate(made) if qt is not None}, full)
    truth = torch.stack([full[i] if qt is None else qt.dequantize(torch.float32) for i, qt in enumerate(made)]).double()
    assert torch.equal(stack.weight.double(), truth) and stack.full == [3, 5] and len(stack.parts) == 4
    for rows, each in ((1, 1), (3, 2), (19, 5)):
        x, index = torch.randn(rows, 13), torch.rand(rows, 7).argsort(1)[:, :each]
        expected = torch.einsum("mk,msnk->msn", x.double(), truth[index])
        found = stack.product(x, index)
        assert found.shape == (rows, each, 5)
        assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    for i, layer in stack.layers():
        assert torch.equal(layer.quantized.dequantize(), made[i].dequantize()) and layer.spec == made[i].spec


@torch.no_grad()
def test_each_expert_has_its_activation():
    experts = experts_of("granite_hybrid_moe")
    specs = ("int8-g32-sym",) * 4
    module, truth = split(experts, specs, activations=("exact", "int8", "exact", "exact"))
    x, _, weights = routed(experts, 9, each=1)
    for expert, (least, most) in {0: (0, 1e-5), 1: (1e-4, 3e-2), 2: (0, 1e-5)}.items():
        index = torch.full((9, 1), expert)
        found, exact = module(x, index, weights).double(), truth(x.double(), index, weights.double())
        assert least <= (found - exact).abs().max() / exact.abs().max() <= most


@torch.no_grad()
def test_one_token_reads_only_its_experts():
    """All matrices but those of its experts become NaN."""
    experts = experts_of("granite_hybrid_moe")
    module, truth = split(experts, MIXED)
    x, _, weights = routed(experts, 1)
    for met in ([0, 1], [2, 3], [1, 3]):
        index, broken = torch.tensor([met]), copy.deepcopy(module)
        for name in module.stack_names:
            stack = getattr(broken, name)
            for i in set(range(4)) - set(met):
                part, place = stack.places[i]
                held = stack.held[part]
                numbers = (
                    held
                    if isinstance(held, torch.Tensor)
                    else held.weight_scale.view(-1, stack.rows, held.weight_scale.shape[-1])
                )
                numbers[place] = torch.nan
        assert torch.equal(broken(x, index, weights), module(x, index, weights))
        assert broken(x, (index + 1) % 4, weights).isnan().any()
        assert_close(module(x, index, weights), truth, x, index, weights, 1e-5)


def test_the_input_gets_gradients():
    experts = experts_of("nemotron_h_moe")
    module, truth = split(experts, MIXED)
    for each in (module, truth):
        each.requires_grad_(False)
    x, index, weights = routed(experts, 5)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    module(mine, index, weights).square().sum().backward()
    truth(theirs, index, weights.double()).square().sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_does_not_exist(gradients, expert):
    module, _ = split(experts_of("granite_hybrid_moe"), MIXED)
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, expert]] * 3), torch.rand(3, 2)
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(InvalidInputError, match=r"^index must lie in 0\.\.3 for 4 matrices, got"),
    ):
        module(x.requires_grad_(gradients), index, weights)


def test_an_adapter_around_a_part():
    module, _ = split(experts_of("granite_hybrid_moe"), MIXED)
    args = routed(experts_of("granite_hybrid_moe"), 2)
    module.down_proj.parts[0] = torch.nn.Sequential(module.down_proj.parts[0])  # as peft's all-linear would
    with pytest.raises(InvalidInputError, match="a part of quantized experts has become a Sequential"):
        module(*args)


@torch.no_grad()
def test_copies_and_state_dicts(tmp_path):
    experts = experts_of("lfm2_moe")
    (module, _), (other, _) = split(experts, MIXED), split(experts, MIXED)
    args = routed(experts, 6)
    want = module(*args)
    assert torch.equal(copy.deepcopy(module)(*args), want)
    for name in other.stack_names:
        for part in getattr(other, name).parts:
            part.weight_scale.zero_()
        getattr(other, name).dense.data = torch.zeros_like(getattr(other, name).dense)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*args), want)
    torch.save(module, tmp_path / "experts.pt")
    assert torch.equal(torch.load(tmp_path / "experts.pt", weights_only=False)(*args), want)
    assert "4 experts" in repr(module) and "full=1" in repr(module)
