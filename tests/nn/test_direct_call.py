"""Layers prepared for the extension: the ops' results, never those of replaced weights."""

import copy
import gc
import pickle
import weakref
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import klfast
from klfast import ops
from klfast.core.errors import InvalidInputError
from klfast.nn import QuantLinear, direct_call
from klfast.quant.spec import QuantSpec

SPECS = [
    QuantSpec(4, 32),
    QuantSpec(4, 64, symmetric=False),
    QuantSpec(6, 32, False),
    QuantSpec(8, -1),
    QuantSpec(8, 48, symmetric=False),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def quantized(spec=SPECS[0], n=21, k=100, bias=True, activation="exact"):
    return QuantLinear.from_linear(nn.Linear(k, n, bias), spec, activation)


def by_op(layer, x):
    return ops.dequant_matmul(x, layer.quantized, layer.bias, activation=layer.activation)


def is_taken(layer, x):
    return direct_call.linear(layer, x) is not None


@pytest.mark.parametrize("activation", ["exact", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantized_layer_equals_its_op(spec, bias, activation, tier):
    layer = quantized(spec, bias=bias, activation=activation)
    for shape, dtype in product([(100,), (1, 100), (2, 5, 100), (33, 100)], DTYPES):
        x = torch.randn(shape).to(dtype)
        assert is_taken(layer, x) == (tier != "reference")
        assert torch.equal(layer(x), by_op(layer, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_layer_equals_its_op(dtype, rows, bias, tier):
    layer, x = nn.Linear(100, 21, bias).to(dtype), torch.randn(rows, 100).to(dtype)
    found = direct_call.linear(layer, x)
    assert (found is None) == (tier == "reference")
    if found is not None:
        assert torch.equal(found, ops.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_layer_goes_where_its_op_does(dtype, rows):
    layer, x = nn.Linear(100, 21).to(dtype), torch.randn(rows, 100).to(dtype)
    chosen = klfast.explain("linear", x, layer.weight, layer.bias).chosen
    assert is_taken(layer, x) == (chosen != "torch")
    with klfast.using("scalar"):
        assert is_taken(layer, x)


def test_falls_back_to_the_op():
    layer = quantized()
    assert not is_taken(nn.Linear(100, 21).bfloat16(), torch.randn(1, 100))  # another dtype
    assert not is_taken(layer, torch.randn(0, 100))
    assert not is_taken(layer, torch.randn(100, 3).T)
    assert not is_taken(layer, torch.randn(3, 100).double())
    for wrong in (torch.randn(3, 99), torch.randn(()), torch.ones(3, 100).long()):
        with pytest.raises(InvalidInputError):
            layer(wrong)
    assert layer(torch.randn(0, 100)).shape == (0, 21)


def test_tensors_that_the_kernel_would_misread_go_to_the_op():
    layer, x = quantized(), torch.randn(2, 100)
    negated = torch.randn(2, 100, dtype=torch.complex64).conj().imag
    for lazy, values in (
        (torch._neg_view(x), -x),
        (negated, negated.resolve_neg()),
        (torch._efficientzerotensor((2, 100)), torch.zeros(2, 100)),
    ):
        assert not is_taken(layer, lazy)
        assert torch.equal(layer(lazy), layer(values))
    one = quantized(n=3, k=1)
    part = torch.randn(1, 1, dtype=torch.complex64).conj().imag  # contiguous, but negated
    assert part.is_neg() and part.is_contiguous() and torch.equal(one(part), one(part.resolve_neg()))
    layer = quantized()
    layer.bias = nn.Parameter(torch._neg_view(layer.bias.detach()), requires_grad=False)
    assert not is_taken(layer, x) and torch.equal(layer(x), by_op(layer, x))


CHANGES = {
    "buffer": lambda layer: setattr(layer, "weight_scale", layer.weight_scale * 2),
    "data": lambda layer: setattr(layer.weight_packed, "data", layer.weight_packed ^ 0x11111111),
    "dtype of the same memory": lambda layer: setattr(
        layer.weight_scale, "data", layer.weight_scale.data.view(torch.bfloat16)
    ),
    "in place": lambda layer: layer.weight_packed.bitwise_xor_(0x11111111),
    "bias": lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "bias type": lambda layer: layer.to(torch.bfloat16),
    "activation": lambda layer: setattr(layer, "activation", "int8"),
    "state dict": lambda layer: layer.load_state_dict(quantized(bias=True).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_seen(change):
    layer, x = quantized(), torch.randn(2, 100)
    before = layer(x)
    CHANGES[change](layer)
    found = layer(x)
    assert torch.equal(found, by_op(layer, x))
    assert change == "bias type" or not torch.equal(found, before)


def test_other_memory_under_the_same_tensor_is_seen():
    layer, x = nn.Linear(64, 8, bias=False).bfloat16(), torch.randn(1, 64).bfloat16()
    first, second = layer.weight.data, layer.weight.data + 1  # both alive, so that only the address differs
    layer.weight.data = second
    found = direct_call.linear(layer, x)
    layer.weight.data = first
    assert not torch.equal(direct_call.linear(layer, x), found)


def test_reused_address_is_seen():
    """The same tensor object at the same address, with other memory in between: the address alone does not show it."""
    layer, memory = nn.Linear(64, 8, bias=False).bfloat16(), bytearray(8 * 64 * 2)
    for n, k in [(8, 64), (4, 128)] * 2:
        layer.weight.data = torch.randn(n, k).bfloat16()
        layer.weight.data = torch.frombuffer(memory, dtype=torch.bfloat16).view(n, k).copy_(torch.randn(n, k))
        layer.out_features, layer.in_features = n, k
        x = torch.randn(1, k).bfloat16()
        assert torch.equal(direct_call.linear(layer, x), ops.linear(x, layer.weight))


@pytest.mark.parametrize("view", [torch.t, lambda weight: weight[:32]], ids=["transposed", "cut"])
def test_another_view_of_the_same_memory_is_seen(view):
    layer, x = nn.Linear(64, 64, bias=False).bfloat16(), torch.randn(1, 64).bfloat16()
    assert is_taken(layer, x)
    layer.weight.data = view(layer.weight.data)
    assert not is_taken(layer, x)


def test_another_shape_of_the_same_memory_is_seen():
    layer, x = quantized(), torch.randn(1, 100)
    assert is_taken(layer, x)
    layer.weight_packed.data = layer.weight_packed.data.view(13, 21)
    with pytest.raises(InvalidInputError, match="packed must have shape"):
        layer(x)


@pytest.mark.parametrize("make", [quantized, lambda: nn.Linear(100, 21).bfloat16()])
def test_swapped_tensors(make):
    """Torch swaps only tensors without weak references."""
    layer = make()
    assert is_taken(layer, torch.randn(1, 100).to(layer.bias.dtype))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.inference_mode(False):
            layer.to(torch.float16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = torch.randn(1, 100).half()
    want = by_op(layer, x) if isinstance(layer, QuantLinear) else ops.linear(x, layer.weight, layer.bias)
    assert is_taken(layer, x) and torch.equal(direct_call.linear(layer, x), want)


@pytest.mark.parametrize("make", [quantized, lambda: nn.Linear(100, 21).bfloat16()])
def test_bias_that_is_not_a_parameter_goes_to_the_op(make):
    """As torch.nn.utils.prune leaves it: an attribute."""
    layer = make()
    x = torch.randn(1, 100).to(layer.bias.dtype)
    assert is_taken(layer, x)
    bias = layer.bias.data
    del layer.bias
    layer.bias = bias
    assert not is_taken(layer, x)


def test_layers_of_other_classes_are_left_to_their_own_forward():
    class Linear(nn.Linear):
        """A class that klfast does not know, by a name that it does."""

    class Adapted(nn.Module):
        """As peft's layers: beside nn.Linear, with its features."""

        in_features, out_features = 100, 21

    for layer in (Linear(100, 21), Adapted()):
        assert not is_taken(layer, torch.randn(1, 100))
        assert direct_call.PreparedLinear(layer).projection is None


def test_damaged_buffers_are_refused():
    layer, x = quantized(), torch.randn(1, 100)
    layer(x)
    layer.weight_packed = layer.weight_packed[:-1]
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="packed must have shape"):
            layer(x)


def test_layer_is_copied_pickled_and_freed():
    layer, x = quantized(), torch.randn(1, 100)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    storage, alive = weakref.ref(layer.weight_packed), weakref.ref(layer)
    layer.to("meta")
    assert storage() is None
    del layer
    gc.collect()
    assert alive() is None


def test_layers_that_share_another_ones_attributes_have_their_own_tensors():
    layer, x = quantized(), torch.randn(1, 100)
    y = layer(x)
    other = copy.copy(layer)  # as DataParallel replicates a module
    other._buffers = {name: t if t is None else t.clone() for name, t in layer._buffers.items()}
    other.weight_scale.mul_(2)
    torch.testing.assert_close(other(x) - other.bias, 2 * (y - layer.bias))
    assert torch.equal(layer(x), y)


# Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["exact", "int8"])
@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 5, 100)])
def test_a_call_with_a_gradient_equals_its_op(shape, activation):
    with torch.inference_mode(False), torch.enable_grad():
        layer, x = quantized(activation=activation), torch.randn(shape, requires_grad=True)
        dy = torch.randn(*shape[:-1], 21, requires_grad=True)
        assert direct_call.product(layer, x) is not None and not is_taken(layer, x)
        results = []
        for y in (layer(x), by_op(layer, x)):
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            results.append((y, dx, *torch.autograd.grad(dx.square().sum(), dy)))
        for direct, by_dispatcher in zip(*results, strict=True):
            assert torch.equal(direct, by_dispatcher)


def test_a_weight_changed_between_forward_and_backward_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        layer, x = quantized(), torch.randn(2, 100, requires_grad=True)
        y = layer(x)
        layer.weight_scale.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# Observers ---------------------------------------------------------------------------------------------------------


def test_observed_calls_go_through_the_op():
    layer, x = quantized(), torch.randn(2, 100)
    with torch.autograd.profiler.profile() as seen:
        layer(x)
    assert "klfast::dequant_matmul" in {event.name for event in seen.function_events}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not is_taken(layer, mode.from_tensor(x))
        assert type(layer(mode.from_tensor(x))) is not torch.Tensor
    taken = []
    torch.vmap(lambda row: (taken.append(is_taken(layer, row)), row)[1])(x)
    assert taken == [False]
    with klfast.using("reference"):
        assert not is_taken(layer, x)
    with FlopCounterMode(display=False):
        assert not is_taken(layer, x)
    with torch.inference_mode(False), torch.enable_grad():
        assert not is_taken(layer, torch.randn(2, 100, requires_grad=True))
        with_bias = quantized()
        assert is_taken(with_bias, torch.randn(2, 100))
        with_bias.bias.requires_grad_()
        assert not is_taken(with_bias, torch.randn(2, 100)) and with_bias(torch.randn(2, 100)).requires_grad
    with torch.inference_mode(False), torch.autograd.forward_ad.dual_level():
        assert not is_taken(layer, torch.randn(2, 100))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_taken(layer, x)
    assert is_taken(layer, x)
