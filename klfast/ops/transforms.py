"""Torch's transforms of klfast's matrix products: gradients, forward mode, vmap and autocast.

The quantized weight takes no gradient; x and the bias do. The derivative with respect to x is the dequantized weight,
in float32, whatever ``activation`` is: rounding x to int8 counts as the identity (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from klfast.core import torch_internals
from klfast.core.errors import InvalidInputError
from klfast.dispatch import registry
from klfast.quant.tensor import QuantizedTensor, stored

_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}


def register(dequant_matmul: Callable, linear: Callable) -> Callable[..., torch.Tensor]:
    """Register derivatives, vmap and autocast of these two ops.

    Returns:
        A function that gives a product the derivative of dequant_matmul. It takes that op's arguments, of which only x
        may require a gradient, and a function of the same arguments that computes the product.
    """
    derivative = _derivative(dequant_matmul)
    _register_derivative(dequant_matmul, derivative)
    torch.library.register_vmap("klfast::dequant_matmul", _batched(dequant_matmul), lib=registry.LIBRARY)
    for device, key in _AUTOCAST_DEVICES.items():
        registry.LIBRARY.impl("dequant_matmul", _autocast(dequant_matmul, device, 1), key)
        registry.LIBRARY.impl("linear", _autocast(linear, device, 2), key)
    return partial(_apply, derivative)


def past_autograd(op: Callable) -> Callable:
    """Skip an op's Autograd kernel where no derivative can be needed: saves 4 us under ``torch.no_grad()``."""

    def call(*args):
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return op(*args)
        if torch_internals.MISSING or torch_internals.transform() is not None or torch_internals.is_forward_mode():
            return op(*args)
        with torch_internals.below_autograd():
            return op(*args)

    return call


def _register_derivative(op: Callable, derivative: type[torch.autograd.Function]) -> None:
    if torch_internals.MISSING:
        # torch's own registration: no forward mode, no torch.func.
        def backward(ctx, dy):
            dx, _, *rest = derivative.backward(ctx, dy)[:-1]
            return dx, [None] * len(ctx.saved_tensors), *rest

        torch.library.register_autograd(
            "klfast::dequant_matmul", backward, setup_context=_remember, lib=registry.LIBRARY
        )
        return

    def differentiable(keyset, *args):
        x, parts, bias = args[:3]
        if not _is_differentiated(x, bias, *parts):
            return _below_autograd(op, keyset, *args)
        _refuse_parts(parts)
        with torch_internals.single_level_autograd():
            return _apply(derivative, args, partial(_below_autograd, op, keyset))

    registry.LIBRARY.impl("dequant_matmul", differentiable, "Autograd", with_keyset=True)


def _is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Return True if any tensor takes a gradient or carries a tangent."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator in any() would take as long as the op's checks
            if t is not None and t.requires_grad:
                return True
    return torch_internals.is_forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _apply(derivative: type[torch.autograd.Function], args: Sequence[Any], run: Callable) -> torch.Tensor:
    # Past its checks of torch.func's transforms.
    return super(torch.autograd.Function, derivative).apply(*args, run)  # type: ignore[misc]


def _below_autograd(op: torch._ops.OpOverload, keyset: Any, *args: Any) -> torch.Tensor:
    with torch_internals.below_autograd():
        return op.redispatch(keyset & torch_internals.after_autograd, *args)


def _refuse_parts(parts: list[torch.Tensor]) -> None:
    if _is_differentiated(*parts):
        raise InvalidInputError(
            "dequant_matmul: the scale of a quantized weight takes no gradient; give it as scale.detach()"
        )


def _remember(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, parts, bias, *ctx.numbers = inputs
    _refuse_parts(parts)
    ctx.save_for_backward(*parts)
    ctx.save_for_forward(*parts)
    ctx.bias_dtype, ctx.shape, ctx.dtype = None if bias is None else bias.dtype, output.shape, output.dtype
    ctx.set_materialize_grads(False)


def _derivative(op: Callable) -> type[torch.autograd.Function]:
    class DequantMatmul(torch.autograd.Function):
        """Runs inside the dispatcher, one transform of torch.func at a time, so ``forward`` takes a context."""

        @staticmethod
        def forward(ctx, *args):
            *args, run = args
            if torch_internals.transform() is None:
                y = run(*args)
            else:  # torch turns derivatives off in here, also those of enclosing transforms
                with torch.enable_grad(), torch_internals.forward_mode_enabled(True):
                    y = run(*args)
            _remember(ctx, args, y)
            return y

        @staticmethod
        def backward(ctx, dy):
            dx = dbias = None
            if dy is not None:
                with torch.autocast(dy.device.type, enabled=False):
                    if ctx.needs_input_grad[0]:
                        dx = (dy.float() @ _weight(list(ctx.saved_tensors), *ctx.numbers)).to(dy.dtype)
                    if ctx.needs_input_grad[2]:
                        dbias = dy.float().sum_to_size(dy.shape[-1]).to(ctx.bias_dtype)
            return dx, None, dbias, *(None for _ in ctx.numbers), None

        @staticmethod
        def jvp(ctx, dx, dparts, dbias, *_):
            dy = None if dx is None else op(dx, list(ctx.saved_tensors), None, *ctx.numbers[:-1], "exact")
            if dbias is not None:
                dbias = dbias.to(ctx.dtype).expand(ctx.shape)
                dy = dbias.clone() if dy is None else dy + dbias
            return dy

    return DequantMatmul


def _weight(parts: list[torch.Tensor], n: int, k: int, format: str, layout: str, _: str) -> torch.Tensor:
    weight = stored(n, k, format, layout)
    return QuantizedTensor(parts, weight.shape, weight.spec, weight.layout).dequantize(torch.float32)


def _batched(op: Callable) -> Callable:
    def batched(info, in_dims, x, parts, *rest):
        of_x, of_parts, *of_rest = in_dims
        of_parts = of_parts if isinstance(of_parts, (list, tuple)) else [of_parts] * len(parts)
        if any(dim is not None for dim in (*of_parts, *of_rest)):  # a weight or bias per batch entry: one call each
            each = [
                op(
                    _one(x, of_x, i),
                    [_one(part, dim, i) for part, dim in zip(parts, of_parts, strict=True)],
                    *(_one(a, dim, i) for a, dim in zip(rest, of_rest, strict=True)),
                )
                for i in range(info.batch_size)
            ]
            return torch.stack(each), 0
        return op(x.movedim(of_x, 0), parts, *rest), 0

    return batched


def _one(argument: Any, dim: int | None, i: int) -> Any:
    return argument if dim is None else argument.select(dim, i)


def _autocast(op: Callable, device: str, operands: int) -> Callable:
    """Wrap an op to cast its first ``operands`` arguments to autocast's dtype; float64 stays, as in torch's own ops."""

    def cast(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in args[:operands]]
        with torch.autocast(device, enabled=False):
            return op(*cast, *args[operands:])

    return cast
