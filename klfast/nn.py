"""QuantLinear: a drop-in nn.Linear whose weight is quantized."""

from __future__ import annotations

import torch
from torch import nn

from klfast import ops
from klfast.errors import InvalidInputError
from klfast.quantization import quantize
from klfast.types import QuantizedTensor, QuantSpec, packed_words


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with W quantized; x [..., in_features] to [..., out_features].

    Its buffers bear the names of compressed-tensors' ``pack-quantized`` format: weight_packed, weight_scale,
    weight_zero_point (asymmetric only) and weight_shape; ``bias`` stays a float parameter.
    """

    def __init__(self, qt: QuantizedTensor, bias: torch.Tensor | None = None, activation: str = "exact") -> None:
        super().__init__()
        self.out_features, self.in_features = qt.shape
        self.spec, self.layout, self.activation = qt.spec, qt.layout, activation
        self.register_buffer("weight_packed", qt.packed)
        self.register_buffer("weight_scale", qt.scale)
        self.register_buffer("weight_zero_point", qt.zero_point)
        self.register_buffer("weight_shape", torch.tensor(qt.shape))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: QuantSpec, activation: str = "exact", scale: str = "absmax") -> QuantLinear:
        """Quantize a linear layer's weight; its bias is kept as it is. ``scale`` as in ``klfast.quantize``."""
        if not isinstance(linear, nn.Linear):
            raise InvalidInputError(f"QuantLinear.from_linear takes an nn.Linear, got {type(linear).__name__}")
        return cls(quantize(linear.weight, spec, scale=scale), linear.bias, activation)

    @classmethod
    def empty(cls, shape: tuple[int, int], spec: QuantSpec, *, bias_dtype: torch.dtype | None = None, scale_dtype: torch.dtype = torch.float16, device: torch.device | str = "meta") -> QuantLinear:
        """A layer to load a state dict into; without a bias if ``bias_dtype`` is None."""
        n, k = shape
        groups = spec.n_groups(k)
        zero_point = None if spec.symmetric else torch.empty(packed_words(n, spec.bits), groups, dtype=torch.int32, device=device)
        packed = torch.empty(n, packed_words(k, spec.bits), dtype=torch.int32, device=device)
        qt = QuantizedTensor(packed, torch.empty(n, groups, dtype=scale_dtype, device=device), zero_point, (n, k), spec)
        return cls(qt, None if bias_dtype is None else torch.empty(n, dtype=bias_dtype, device=device))

    @property
    def quantized(self) -> QuantizedTensor:
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(self.weight_packed, self.weight_scale, self.weight_zero_point, shape, self.spec, self.layout)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, made anew at each access: code that reads ``.weight`` works, at a price."""
        return self.quantized.dequantize(None if self.bias is None else self.bias.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dequant_matmul(x, self.quantized, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec}, activation={self.activation}"
