"""Derivatives through quantized layers, against float64 and against nn.Linear with the dequantized weight."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, tiny
from torch import nn
from torch.autograd import forward_ad

import klfast
from klfast import QuantLinear, QuantSpec, ops
from klfast.core.errors import InvalidInputError
from klfast.models.linears import linears
from klfast.ops.matmul import dequant_matmul_op

SPECS = [QuantSpec(4, 32), QuantSpec(4, 64, symmetric=False), QuantSpec(8, -1), QuantSpec(8, 48, symmetric=False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ("mamba", "mamba2", "falcon_mamba", "hymba", "llama")


def quantized(n=21, k=100, spec=SPECS[0], bias=True, activation="exact"):
    layer = QuantLinear.from_linear(nn.Linear(k, n, bias), spec, activation)
    if bias:
        layer.bias.requires_grad_()
    return layer


def weight_of(layer, dtype=torch.float64):
    return layer.quantized.dequantize(torch.float32).to(dtype)


def assert_sum(found, factors, addends):
    """Assert that ``found`` is a float64 product up to float32's rounding of each addend and of the result."""
    want = factors @ addends
    terms = max(factors.shape[-1], 1)
    allowed = (
        torch.finfo(torch.float32).eps * terms * (factors.abs() @ addends.abs())
        + torch.finfo(found.dtype).eps * want.abs()
    )
    assert bool(((found.double() - want).abs() <= allowed + 1e-30).all())


@pytest.mark.parametrize("activation", ["exact", "int8"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_input_and_bias(spec, activation, tier):
    layer = quantized(spec=spec, activation=activation)
    for shape, dtype in product([(100,), (1, 100), (2, 5, 100), (33, 100), (0, 100)], DTYPES):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = layer(x)
        dy = torch.randn_like(y)
        dx, dbias = torch.autograd.grad(y, (x, layer.bias), dy)
        assert (dx.dtype, dbias.dtype) == (dtype, torch.float32)
        assert_sum(dx, dy.double(), weight_of(layer))
        rows = dy.reshape(-1, 21).double()
        assert_sum(dbias[None], torch.ones(1, len(rows), dtype=torch.float64), rows)
        torch.testing.assert_close(y, layer(x.detach()).detach(), rtol=0, atol=0)  # with or without gradients


@pytest.mark.parametrize("n", [1, 63, 100])
@pytest.mark.parametrize("k", [1, 7, 63, 1600])
def test_odd_shapes(n, k):
    layer, x = quantized(n, k, bias=False), torch.randn(3, k, requires_grad=True)
    dy = torch.randn(3, n)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert_sum(dx, dy.double(), weight_of(layer))


def test_only_tensors_that_require_gradients_get_them():
    layer, x = quantized(), torch.randn(2, 100)
    assert layer(x).requires_grad  # for the bias alone
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((21,), 2.0))
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad
    layer.weight_scale.requires_grad_()
    with pytest.raises(InvalidInputError, match="scale of a quantized weight takes no gradient"):
        layer(x)


def by_linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def by_matmul(layer, x):
    return (layer.weight @ x.mT).mT + layer.bias


def by_op(layer, x):
    return klfast.dequant_matmul(x, layer.quantized, layer.bias)


@pytest.mark.parametrize("way", [by_linear, by_matmul, by_op])
def test_other_ways_into_the_op(way):
    layer, x = quantized(), torch.randn(3, 100, requires_grad=True)
    dy = torch.randn(3, 21)
    dx, dbias = torch.autograd.grad(way(layer, x), (x, layer.bias), dy)
    assert_sum(dx, dy.double(), weight_of(layer))
    torch.testing.assert_close(dbias, dy.sum(0))


# Higher derivatives and torch.func -----------------------------------------------------------------------------------


def square(layer):
    return lambda x: layer(x).square().sum()


def dense_square(layer):
    weight, bias = weight_of(layer, torch.float32), layer.bias.detach()
    return lambda x: F.linear(x, weight, bias).square().sum()


FUNC = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "grad of jvp": lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.expand(3, -1) + torch.arange(3.0)[:, None]),
    "vmap of grad": lambda f: (
        lambda x: torch.func.vmap(torch.func.grad(f))(x.expand(3, -1) + torch.arange(3.0)[:, None])
    ),
    "grad of vmap": lambda f: torch.func.grad(
        lambda x: torch.func.vmap(f)(x.expand(3, -1) + torch.arange(3.0)[:, None]).sum()
    ),
}


@pytest.mark.parametrize("name", FUNC)
def test_torch_func(name, tier):
    layer, x = quantized(5, 40), torch.randn(40)
    layer.bias.requires_grad_(False)
    found, want = FUNC[name](square(layer))(x), FUNC[name](dense_square(layer))(x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_vmap_over_weights():
    """One layer per row of x, as in an ensemble."""
    layers, x = [quantized() for _ in range(3)], torch.randn(3, 2, 100)
    parts = [
        torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight_packed", "weight_scale", "bias")
    ]

    def call(x, packed, scale, bias):
        return dequant_matmul_op(x, [packed, scale], bias, 21, 100, "int4-g32-sym", "plain", "exact")

    torch.testing.assert_close(
        torch.func.vmap(call, (1, 0, 0, 0))(x.transpose(0, 1), *parts),
        torch.stack([layer(row) for layer, row in zip(layers, x, strict=True)]),
    )
    shared = torch.func.vmap(call, (0, None, None, None))(x, *(part[0] for part in parts))
    torch.testing.assert_close(shared, layers[0](x))


def test_second_backward():
    layer, x = quantized(5, 40), torch.randn(2, 40, requires_grad=True)
    (dx,) = torch.autograd.grad(square(layer)(x), x, create_graph=True)
    v = torch.randn_like(dx)
    (ddx,) = torch.autograd.grad(dx, x, v)
    weight = weight_of(layer)
    torch.testing.assert_close(ddx.double(), 2 * v.double() @ weight.T @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_forward_mode(activation):
    layer, x, v = quantized(activation=activation), torch.randn(3, 100), torch.randn(3, 100)
    with torch.no_grad(), forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v)))
    assert_sum(dy, v.double(), weight_of(layer).T)
    torch.testing.assert_close(y, layer(x).detach(), rtol=0, atol=0)
    with forward_ad.dual_level():
        bias = forward_ad.make_dual(layer.bias.detach(), torch.ones(21))
        moved = dequant_matmul_op(
            x, [layer.weight_packed, layer.weight_scale], bias, 21, 100, "int4-g32-sym", "plain", activation
        )
        torch.testing.assert_close(forward_ad.unpack_dual(moved).tangent, torch.ones(3, 21))


def test_compiled_backward():
    model = nn.Sequential(quantized(48, 100, SPECS[1]), nn.SiLU(), quantized(7, 48, bias=False))
    x = torch.randn(4, 100, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), want)


def test_registration():
    layer = quantized(spec=SPECS[1])
    x = torch.randn(2, 100, requires_grad=True)
    args = (x, list(layer.quantized.parts), layer.bias, 21, 100, str(layer.spec), "plain", "exact")
    torch.library.opcheck(dequant_matmul_op, args)


# Models --------------------------------------------------------------------------------------------------------------


def twin_of(model):
    """Return the model in float64, with nn.Linear and dequantized weights for its quantized layers."""
    twin = copy.deepcopy(model)
    for name, layer in linears(model).items():
        if isinstance(layer, QuantLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight.data = weight_of(layer, torch.float32)
            if layer.bias is not None:
                dense.bias.data = layer.bias.detach().clone()
            twin.set_submodule(name, dense)
    return twin.requires_grad_(False)


@pytest.mark.filterwarnings("ignore::klfast.core.errors.SlowPathWarning")
@pytest.mark.parametrize("is_accelerated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_model(family, is_accelerated):
    """klfast's state-space functions have no gradients, so an accelerated model runs its plain forward."""
    model = tiny(family)
    model = klfast.quantize_model(model, klfast.Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform"))
    twin = twin_of(model)
    if is_accelerated:
        klfast.accelerate(model)
    embedded = model.get_input_embeddings()(batch(2, 9)).detach()

    def gradient(model, x):
        x.requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits
        return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), batch(2, 9).flatten()), x)[0]

    found = gradient(model, embedded.clone())
    dtype = torch.float32 if family == "hymba" else torch.float64  # klfast's own model takes no float64
    want = gradient(twin.to(dtype), embedded.to(dtype, copy=True))
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-3, atol=1e-4 * want.abs().max().item())


class Adapter(nn.Module):
    """LoRA around a linear layer."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / 8)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank) / 8)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_adapters_train_as_around_dense_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        Adapter(quantized(48, 32)),
        nn.SiLU(),
        Adapter(quantized(48, 48, SPECS[2])),
        nn.SiLU(),
        Adapter(quantized(8, 48)),
    )
    for adapter in model[::2]:
        adapter.layer.requires_grad_(False)
    twin = twin_of(model).double()
    for module in twin[::2]:
        module.down.requires_grad_(), module.up.requires_grad_()
    x, wanted = torch.randn(16, 32), torch.randn(16, 8)

    def train(model, x, wanted):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    found, want = train(model, x, wanted), train(twin, x.double(), wanted.double())
    assert found == pytest.approx(want, rel=1e-3) and found[-1] < 0.8 * found[0]


def test_quantized_layer_is_a_linear_layer_for_peft():
    assert isinstance(quantized(), nn.Linear)


# Autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [lambda layer, x: layer(x), by_linear, by_op])
def test_autocast(way, dtype):
    layer, x = quantized(), torch.randn(3, 100, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = way(layer, x)
        dense = F.linear(x, weight_of(layer, torch.float32), layer.bias)
    assert y.dtype == dense.dtype == dtype
    torch.testing.assert_close(y, dense, rtol=0, atol=4 * torch.finfo(dtype).eps * dense.abs().max().item())
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx.double(), dy.double() @ weight_of(layer), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_of_dense_products(gradients):
    x, weight = torch.randn(2, 100), torch.randn(21, 100)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        assert ops.linear(x, weight).dtype == F.linear(x, weight).dtype == torch.bfloat16
        assert ops.linear(x, weight, dtype=torch.float32).dtype == torch.float32
