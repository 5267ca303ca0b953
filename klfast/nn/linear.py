"""QuantLinear: a drop-in nn.Linear with a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from klfast import reference
from klfast.backends import operands
from klfast.core.arguments import check_activation
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.nn import direct_call
from klfast.nn.lazy_weight import LazyWeight, ReadOnlyWeight
from klfast.ops.matmul import call_dequant_matmul, dequant_matmul, differentiable_dequant_matmul
from klfast.quant.formats import ROWS, check_rows
from klfast.quant.layouts import Layout
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor


class QuantLinear(ReadOnlyWeight, nn.Linear):
    """``y = x W^T + b`` with W quantized; x [..., in_features] to [..., out_features].

    Its buffers are the parts of its format, named as in compressed-tensors' ``pack-quantized`` format:
    weight_packed, weight_scale, weight_zero_point (None if symmetric) and weight_shape; ``bias`` is a float parameter.
    ``dtype`` is the apparent dtype of ``.weight``, at first the unquantized weight's. ``module.to(dtype)`` changes it,
    never the scales. The buffers have the layout of the device's kernels (``layout``); a state dict always holds
    ``Layout.PLAIN``.

    The input and the bias, if it ``requires_grad``, get gradients; the weight is frozen and read-only. The layer is an
    instance of nn.Linear, so that libraries such as peft can train adapters around it. After ``double()`` it computes
    in float64 from the dequantized weight, slowly. ``rounding`` tells how its codes were chosen, "nearest" or "gptq".
    """

    rounding = "nearest"

    def __init__(
        self,
        qt: QuantizedTensor,
        bias: torch.Tensor | None = None,
        activation: str = "exact",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would create a weight
        check_activation("", activation)
        self.out_features, self.in_features = qt.shape
        qt = qt.to_layout(operands.preferred_layout(qt.device, qt.spec))
        self.spec, self.layout, self.activation, self.dtype = qt.spec, qt.layout, activation, dtype
        buffers = _buffers(qt)
        self.part_names = tuple(buffers)  # in the order that ops take
        for name, tensor in ({"weight_zero_point": None} | buffers).items():  # None if symmetric
            self.register_buffer(name, tensor)
        self.register_buffer("weight_shape", torch.tensor(qt.shape))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: QuantSpec | str, activation: str = "exact", scale: str = "absmax"
    ) -> QuantLinear:
        """Quantize a linear layer's weight; its bias is kept. ``scale`` as in ``klfast.quantize``."""
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantLinear):
            raise InvalidInputError(f"QuantLinear.from_linear takes an nn.Linear, got {type(linear).__name__}")
        return cls(quantize(linear.weight, spec, scale=scale), linear.bias, activation, dtype=linear.weight.dtype)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        spec: QuantSpec | str,
        *,
        bias_dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str = "meta",
        activation: str = "exact",
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """Return a layer to load a state dict into; without a bias if ``bias_dtype`` is None."""
        spec = QuantSpec.of(spec)
        qt = QuantizedTensor.empty(shape, spec, scale_dtype=scale_dtype, device=device)
        bias = None if bias_dtype is None else torch.empty(shape[0], dtype=bias_dtype, device=device)
        return cls(qt, bias, activation, dtype=dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, as the buffers hold it."""
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(self.parts(), shape, self.spec, self.layout)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return rows ``index`` (int64 [...]) of the weight in float32, [..., in_features]; quick for a few of many."""
        shape = (self.out_features, self.in_features)
        return self.spec.format.decode_rows(self.parts(), index, shape, self.spec, self.layout)

    def parts(self) -> list[torch.Tensor]:
        """Return the weight's parts in the order that ops take."""
        # From the dictionary: nn.Module takes three times as long to find a buffer.
        buffers: dict[str, Any] = self._buffers
        return [buffers[name] for name in self.part_names]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # read-only
        """A stand-in for the dequantized weight, which is computed only when needed."""
        if torch.compiler.is_compiling():  # cannot trace the stand-in, but drops an unused matrix
            return self.quantized.dequantize(torch.float32).to(self.dtype)
        return LazyWeight(self.quantized, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in_features] by the weight, and add the bias."""
        y = direct_call.product(self, x)
        if y is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return y
        if x.dtype is self.dtype is torch.float64:
            return self._in_float64(x)
        if self.spec.corrected:
            return dequant_matmul(x, self.quantized, self.bias, activation=self.activation)
        # Not by a QuantizedTensor: to make one at each call would cost as much as a small product.
        sizes, how = (self.out_features, self.in_features), (self.spec.text, self.layout.value, self.activation)
        arguments = (x, self.parts(), self.bias, *sizes, *how)
        return call_dequant_matmul(*arguments) if y is None else differentiable_dequant_matmul(arguments, lambda *_: y)

    def _in_float64(self, x: torch.Tensor) -> torch.Tensor:
        pins.slow_path(
            "QuantLinear", list(x.shape), "no kernel computes in float64; use float32.", how="with a dequantized weight"
        )
        if self.activation == "int8":
            x = x + (reference.fake_quantize_rows(x, self.spec) - x).detach()
        return F.linear(x, self.quantized.dequantize(torch.float32).to(torch.float64), self.bias)

    def _apply(self, fn, recurse=True):
        parts = set(map(id, self.parts()))

        def keep_codes(tensor):  # they belong to the scale as stored
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in parts and new.dtype != tensor.dtype else new

        super()._apply(keep_codes, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_shape.device)).dtype
        self._set_layout(operands.preferred_layout(self.parts()[0].device, self.spec))
        return self

    def _set_layout(self, layout: Layout) -> None:
        if layout is not self.layout:  # without self.quantized, whose values may still have to be loaded
            shape = (self.out_features, self.in_features)
            parts = self.spec.format.convert(self.parts(), shape, self.spec, self.layout, layout)
            for name, tensor in zip(self.part_names, parts, strict=True):
                setattr(self, name, tensor)
            self.layout = layout

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not Layout.PLAIN:
            plain = _buffers(self.quantized.to_layout(Layout.PLAIN))
            destination.update((prefix + name, tensor) for name, tensor in plain.items())

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if reason := self._misfit(state_dict, prefix):
            *_, errors = args
            errors.append(reason)
            return
        layout = self.layout
        self._set_layout(Layout.PLAIN)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_layout(layout)

    def _misfit(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> str:
        """Return why values of a state dict are not of this layer; empty if they may be."""
        shape, rows = (state_dict.get(f"{prefix}weight_{part}") for part in ("shape", ROWS))
        own = [self.out_features, self.in_features]
        if shape is not None and not shape.is_meta and shape.tolist() != own:
            return f"{prefix}weight_shape is {shape.tolist()}, but the layer's weight is {own}"
        if rows is None or rows.shape != (self.spec.corrected,):  # torch names the wrong number
            return ""
        try:
            check_rows(rows.to(torch.int32), self.out_features)
        except InvalidInputError as error:
            return f"{prefix}weight_{ROWS}: {error}"
        return ""

    def extra_repr(self) -> str:
        """Return the sizes, the spec and the activation mode."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, spec={self.spec}, activation={self.activation}"


def _buffers(qt: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {f"weight_{part.name}": tensor for part, tensor in zip(qt.stored.parts, qt.parts, strict=True)}
