"""Private names of torch: all exist, and a missing one does no harm."""

import subprocess
import sys

import pytest

from klfast.core import torch_internals


def test_torch_has_them_all():
    assert not torch_internals.MISSING, (
        f"this torch lacks {', '.join(torch_internals.MISSING)}: klfast uses the ops, which is slow for few rows"
    )


WITHOUT = """
import torch
from torch import nn
del {owner}.{name}
from klfast import QuantLinear, QuantSpec
from klfast.core import torch_internals
from klfast.nn import direct_call
assert torch_internals.MISSING == ['{owner}.{name}'], torch_internals.MISSING
layer = QuantLinear.from_linear(nn.Linear(64, 8), QuantSpec(4, 32))
x, weight = torch.randn(2, 64, requires_grad=True), layer.quantized.dequantize(torch.float32)
y = layer(x)
torch.testing.assert_close(y, x @ weight.T + layer.bias)
y.sum().backward()
torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1))
assert direct_call.linear(layer, x.detach()) is None
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [("torch._C", "_len_torch_function_stack"), ("torch._functorch.utils", "enable_single_level_autograd_function")],
)
def test_missing_name(owner, name):
    """Torch itself needs these, but has bound them by then."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT.format(owner=owner, name=name)], check=True)
