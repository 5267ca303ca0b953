"""The product of models' layers: klfast's or torch's, as ``ops.linear`` decides."""

import pytest
import torch
import torch.nn.functional as F

import klfast
from klfast.nn.dense_product import dense_product
from klfast.nn.linear import QuantLinear

BF16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """Record the dtypes with which ``ops.linear`` was called."""
    seen = []
    original = klfast.ops.linear

    def recorded(x, *args, **options):
        seen.append(x.dtype)
        return original(x, *args, **options)

    monkeypatch.setattr(klfast.ops, "linear", recorded)
    return seen


def operands(dtype=BF16, rows=2):
    return torch.randn(rows, 40).to(dtype), torch.randn(9, 40).to(dtype), torch.randn(9).to(dtype)


@pytest.mark.parametrize("out", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_equals_torch(dtype, out):
    x, weight, bias = operands(dtype)
    found = dense_product(x, weight, bias, dtype=out)
    assert found.dtype == (out or dtype)
    torch.testing.assert_close(found.to(dtype), F.linear(x, weight, bias))


def test_klfast_multiplies_where_its_kernel_is_faster(calls):
    dense_product(*operands(torch.float32))  # torch is faster
    dense_product(*operands())
    with klfast.using("scalar"):
        dense_product(*operands(torch.float32))
    assert calls == [BF16, torch.float32]


def test_torch_multiplies_what_takes_gradients_or_is_not_a_plain_tensor(calls):
    x, weight, bias = operands()
    dense_product(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None
    layer = QuantLinear.from_linear(torch.nn.Linear(40, 9).bfloat16(), "int8-g40-sym")
    assert dense_product(x, layer.weight).shape == (2, 9)
    assert not calls


def test_compiled_graph_calls_the_op_for_any_number_of_rows():
    graphs = []

    def backend(module, inputs):
        graphs.append([node.target for node in module.graph.nodes])
        return module

    with torch.inference_mode():
        compiled = torch.compile(dense_product, fullgraph=True, backend=backend, dynamic=True)
        for rows in (2, 50, 3):
            x, weight, bias = operands(rows=rows)
            torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    assert [klfast.ops.matmul.linear_op in targets for targets in graphs] == [True]
