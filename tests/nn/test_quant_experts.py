"""QuantExperts against transformers' experts with the dequantized matrices, in float64."""

import copy

import pytest
import torch
from tiny_models import tiny
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import klfast
from klfast import QuantSpec
from klfast.core.errors import InvalidInputError
from klfast.nn import QuantExperts, QuantLinear
from klfast.nn.experts import stack_names

# A gate, no gate, an activation that is a function, experts of which a token meets one.
FAMILIES = ("granite_hybrid_moe", "nemotron_h_moe", "lfm2_moe", "minimax")
SPEC = QuantSpec(4, 16, False)


def experts_of(family):
    """Return the experts of a tiny model."""
    return next(module for module in tiny(family).modules() if stack_names(module))


def quantized(experts, names=None, spec=SPEC, activation="exact"):
    """Return QuantExperts with some stacks quantized, all by default, and float64 experts with the same matrices."""
    names = stack_names(experts) if names is None else names
    layers, truth = {}, copy.deepcopy(experts).double()
    truth.config._experts_implementation = "eager"  # torch's grouped product has no float64
    for name in names:
        stack = getattr(experts, name)
        qt = klfast.quantize(stack.detach().flatten(0, 1), spec)
        layers[name] = QuantLinear(qt, activation=activation, dtype=stack.dtype)
        getattr(truth, name).data = qt.dequantize(torch.float32).view_as(stack).double()
    return QuantExperts(experts, layers), truth


def routed(experts, tokens, each=2, dtype=torch.float32):
    """Return hidden states, the experts that each token is routed to, and their weights."""
    features = getattr(experts, stack_names(experts)[0]).shape[-1]
    index = torch.rand(tokens, experts.num_experts).argsort(1)[:, :each]
    return torch.randn(tokens, features).to(dtype), index, torch.rand(tokens, each).to(dtype)


def assert_close(found, truth, x, index, weights, rtol):
    expected = truth(x.double(), index, weights.double())
    assert found.dtype == x.dtype and found.shape == x.shape
    assert (found.double() - expected).abs().max() <= rtol * expected.abs().max()


def check_batches(module, truth, experts, dtype, rtol):
    """Compare quantized experts of a dtype with float64 ones, on 0, 1 and more tokens."""
    for tokens in (0, 1, 7, 40):
        x, index, weights = routed(experts, tokens, dtype=dtype)
        y = module(x, index, weights)
        if tokens:
            assert_close(y, truth, x, index, weights, rtol)
        else:
            assert y.shape == x.shape


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*float64:klfast.SlowPathWarning")
@torch.no_grad()
def test_computes_what_transformers_does(family, dtype, rtol):
    experts = experts_of(family)
    names = stack_names(experts)
    for chosen in (names, names[:1], names[1:]):
        module, truth = quantized(copy.deepcopy(experts), chosen)
        check_batches(module.to(dtype), truth, experts, dtype, rtol)


@torch.no_grad()
def test_rounds_activations_to_int8():
    experts = experts_of("granite_hybrid_moe")
    module, truth = quantized(experts, activation="int8")
    x, index, weights = routed(experts, 9)
    found, exact = module(x, index, weights).double(), truth(x.double(), index, weights.double())
    assert 1e-4 < (found - exact).abs().max() / exact.abs().max() < 3e-2


@torch.no_grad()
def test_one_token_reads_only_its_experts():
    """All matrices but those of its experts become NaN."""
    module, truth = quantized(experts_of("granite_hybrid_moe"))
    x, index, weights = routed(experts_of("granite_hybrid_moe"), 1)
    want = module(x, index, weights)
    others = [i for i in range(module.num_experts) if i not in index]
    assert len(others) == 2
    for name in module.stack_names:
        scale = getattr(module, name).weight_scale
        scale.view(module.num_experts, -1)[others] = torch.nan
    assert torch.equal(module(x, index, weights), want)
    assert module(x, torch.tensor([[others[0], index[0, 0]]]), weights).isnan().all()
    assert_close(want, truth, x, index, weights, 1e-5)


def test_the_input_gets_gradients():
    experts = experts_of("nemotron_h_moe")
    module, truth = quantized(experts)
    for each in (module, truth):
        each.requires_grad_(False)
    x, index, weights = routed(experts, 5)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    module(mine, index, weights).square().sum().backward()
    truth(theirs, index, weights.double()).square().sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_expert_that_does_not_exist(gradients):
    module, _ = quantized(experts_of("granite_hybrid_moe"))
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 4]] * 3), torch.rand(3, 2)
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(InvalidInputError, match=r"^index must lie in 0\.\.3 for 4 matrices, got 0\.\.4$"),
    ):
        module(x.requires_grad_(gradients), index, weights)


def test_an_adapter_around_a_stack():
    module, _ = quantized(experts_of("granite_hybrid_moe"))
    args = routed(experts_of("granite_hybrid_moe"), 2)
    module.down_proj = torch.nn.Sequential(module.down_proj)  # as peft's all-linear would
    with pytest.raises(InvalidInputError, match="down_proj of quantized experts has become a Sequential"):
        module(*args)


@torch.no_grad()
def test_copies_and_state_dicts(tmp_path):
    experts = experts_of("lfm2_moe")
    (module, _), (other, _) = quantized(experts), quantized(experts, spec=QuantSpec(4, 16, False))
    args = routed(experts, 6)
    want = module(*args)
    assert torch.equal(copy.deepcopy(module)(*args), want)
    for name in other.stack_names:
        getattr(other, name).weight_scale.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*args), want)
    torch.save(module, tmp_path / "experts.pt")
    assert torch.equal(torch.load(tmp_path / "experts.pt", weights_only=False)(*args), want)


@torch.no_grad()
def test_compiles_into_one_graph():
    module, _ = quantized(experts_of("granite_hybrid_moe"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        args = routed(experts_of("granite_hybrid_moe"), tokens)
        assert torch.equal(compiled(*args), module(*args))


def test_a_second_stack_can_follow():
    experts = experts_of("granite_hybrid_moe")
    first, last = stack_names(experts)
    half, _ = quantized(experts, [first])
    assert stack_names(half) == (first, last) and "down_proj=[4, 64, 96]" in repr(half)
    whole, _ = quantized(experts)
    second = QuantExperts(half, {last: getattr(whole, last)})
    args = routed(experts, 3)
    with torch.no_grad():
        assert torch.equal(second(*args), whole(*args))


def test_knows_only_experts_that_compute_so():
    assert stack_names(torch.nn.Linear(2, 2)) == () == stack_names(torch.nn.Module())
    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    assert stack_names(GptOssExperts(config)) == (), "transposed, with biases and a gate of its own"
    experts = experts_of("granite_hybrid_moe")
    experts.extra = torch.nn.Parameter(torch.ones(2))
    assert stack_names(experts) == ()
