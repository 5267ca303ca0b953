"""Functions of recurrent layers at the sizes of Mamba-130M, Mamba2-130M and Qwen3.5-4B, against transformers' own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import torch

from klfast import ops
from klfast.benchkit.runner import Contender, Group, UnavailableError, distance
from klfast.benchkit.settings import Settings
from klfast.dispatch import registry

Run = Callable[[], torch.Tensor]


def groups(settings: Settings) -> Iterator[Group]:
    batch, length = (1, 64) if settings.quick else (2, 512)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for case in (_selective_scan, _chunk_scan, _conv, _state_update, _state_update_heads, _conv_update):
            yield case(_Draw(settings.device, dtype), name, batch, length)
        for tokens in (length, 1):
            yield _delta_rule(_Draw(settings.device, dtype), name, tokens, settings.working_set)


class _Draw:
    """Draws random tensors."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> torch.Tensor:
        """Return activations, in their dtype."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def weight(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device)

    def decay(self, *shape: int) -> torch.Tensor:
        return -torch.rand(*shape, device=self.device) - 0.1


def _selective_scan(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        u, delta, z = (draw.normal(batch, 1536, length) for _ in range(3))
        B, C = (draw.normal(batch, 16, length) for _ in range(2))
        return u, delta, draw.decay(1536, 16), B, C, draw.weight(1536), z, draw.weight(1536), True

    return _group(
        f"selective_scan B={batch} D=1536 N=16 L={length} {dtype}",
        draw,
        "selective_scan",
        arguments,
        ops.selective_scan_fn,
        "mamba.mamba_selective_scan",
    )


def _chunk_scan(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        B, C = (draw.normal(batch, length, 1, 128) for _ in range(2))
        return draw.normal(batch, length, 24, 64), draw.normal(batch, length, 24), draw.decay(24), B, C, 256

    def more() -> dict:
        return {"D": draw.weight(24), "dt_bias": draw.weight(24), "dt_softplus": True}

    return _group(
        f"mamba_chunk_scan B={batch} H=24 P=64 N=128 L={length} {dtype}",
        draw,
        "mamba_chunk_scan",
        arguments,
        ops.mamba_chunk_scan_combined,
        "mamba2.mamba2_chunk_scan",
        more,
    )


def _conv(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        return draw.normal(batch, 1536, length), draw.normal(1536, 4), draw.normal(1536)

    return _group(
        f"causal_conv1d B={batch} D=1536 W=4 L={length} {dtype}",
        draw,
        "causal_conv1d",
        arguments,
        ops.causal_conv1d_fn,
        "mamba.causal_conv1d_fn",
        lambda: {"activation": "silu"},
    )


def _state_update(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        x, dt, z = (draw.normal(1, 1536) for _ in range(3))
        B, C = (draw.normal(1, 16) for _ in range(2))
        state, A, D = draw.weight(1, 1536, 16), draw.decay(1536, 16), draw.weight(1536)
        return state, x, dt, A, B, C, D, z, draw.weight(1536), True

    def ours(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)

    def theirs(function, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        return function(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)

    return _group(
        f"selective_state_update B=1 D=1536 N=16 {dtype}",
        draw,
        "selective_state_update",
        arguments,
        ours,
        "mamba.mamba_selective_state_update",
        call_theirs=theirs,
    )


def _state_update_heads(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        B, C = (draw.normal(1, 1, 128) for _ in range(2))
        dt, A = draw.normal(1, 24, 1).expand(1, 24, 64), draw.decay(24, 1, 1).expand(24, 64, 128)
        D, bias = (draw.weight(24, 1).expand(24, 64) for _ in range(2))
        return draw.weight(1, 24, 64, 128), draw.normal(1, 24, 64), dt, A, B, C, D, bias

    def ours(state, x, dt, A, B, C, D, dt_bias):
        return ops.selective_state_update(state, x, dt, A, B, C, D, None, dt_bias, True)

    def theirs(function, state, x, dt, A, B, C, D, dt_bias):
        return function(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)

    return _group(
        f"selective_state_update B=1 H=24 P=64 N=128 {dtype}",
        draw,
        "selective_state_update",
        arguments,
        ours,
        "mamba2.mamba2_selective_state_update",
        call_theirs=theirs,
    )


def _conv_update(draw: _Draw, dtype: str, batch: int, length: int) -> Group:
    def arguments() -> tuple:
        return draw.normal(1, 1536, 1), draw.normal(1, 1536, 4), draw.normal(1536, 4), draw.normal(1536), "silu"

    return _group(
        f"causal_conv1d_update B=1 D=1536 W=4 {dtype}",
        draw,
        "causal_conv1d_update",
        arguments,
        ops.causal_conv1d_update,
        "mamba.causal_conv1d_update",
    )


def _delta_rule(draw: _Draw, dtype: str, length: int, working_set: int) -> Group:
    """Return a group; one step, which reads and writes its state and little else, rotates through several states."""
    moved = 2 * 32 * 128 * 128 * 4 if length == 1 else 0

    def arguments() -> tuple:
        q, k = (draw.normal(1, length, 16, 128) for _ in range(2))
        v, beta = draw.normal(1, length, 32, 128), draw.normal(1, length, 32).sigmoid()
        return q, k, v, draw.decay(1, length, 32), beta, draw.weight(1, 32, 128, 128)

    def ours(q, k, v, g, beta, state):
        return ops.gated_delta_rule_update(state, q, k, v, g, beta, use_qk_l2norm_in_kernel=True)

    def theirs(function, q, k, v, g, beta, state):
        options = dict(output_final_state=True, use_qk_l2norm_in_kernel=True)
        # Older versions leave the heads that several share to the model, newer ones repeat them themselves.
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        y, last = function(q, k, v, g=g, beta=beta, initial_state=state, **options)
        state.copy_(last)
        return y

    return _group(
        f"gated_delta_rule B=1 H=32 K=128 V=128 L={length} {dtype}",
        draw,
        "gated_delta_rule",
        arguments,
        ours,
        f"qwen3_5.torch_{'recurrent' if length == 1 else 'chunk'}_gated_delta_rule",
        call_theirs=theirs,
        bytes_moved=moved,
        states=-(-working_set // moved) if moved else 1,
    )


def _group(
    title: str,
    draw: _Draw,
    op: str,
    arguments: Callable[[], tuple],
    ours: Callable,
    theirs: str,
    more: Callable[[], dict] = dict,
    call_theirs: Callable | None = None,
    bytes_moved: int = 0,
    states: int = 1,
) -> Group:
    """Return a group of klfast's function and transformers'.

    ``theirs`` is the module and name of transformers' function, which takes the same arguments unless ``call_theirs``
    adapts them. Calls take turns with so many ``states``, the last argument.
    """

    def klfast() -> Contender:
        if not registry.has_kernel(op, draw.device.upper()):
            raise UnavailableError(f"klfast has no {draw.device} kernel of {op}")
        return _contender(ours, arguments(), more(), ours, bytes_moved, states)

    def transformers() -> Contender:
        module, name = theirs.split(".")
        function = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name, None)
        if function is None:
            raise UnavailableError(f"this version of transformers has no {name}")
        call = function if call_theirs is None else lambda *args, **kwargs: call_theirs(function, *args, **kwargs)
        return _contender(call, arguments(), more(), ours, states=states)

    return Group(title, {}, {"klfast": klfast, "transformers": transformers})


def _contender(
    call: Callable, args: tuple, more: dict, ours: Callable, bytes_moved: int = 0, states: int = 1
) -> Contender:
    """Return a contender checked against the reference in float32: transformers' bfloat16 steps round their states."""

    def fresh(convert: Callable[[torch.Tensor], torch.Tensor]) -> list:
        """Copy the arguments, since decode steps write to their states."""
        return [convert(a) if isinstance(a, torch.Tensor) else a for a in args]

    def error() -> float:
        import klfast

        with klfast.using("reference"):
            expected = ours(*fresh(lambda t: t.float().clone()), **more)
        return distance(call(*fresh(torch.clone), **more), expected)

    single = all(t.dtype != torch.bfloat16 for t in args if isinstance(t, torch.Tensor))
    others = [(*args[:-1], args[-1].clone()) for _ in range(states - 1)]
    calls = [functools.partial(call, *each, **more) for each in (args, *others)]
    return Contender(calls, error, 1e-3 if single else 5e-2, bytes_moved, copy_nbytes=args[-1].nbytes if others else 0)


def test_scan(group, name, run, benchmark):
    run.time("scan", group, name, benchmark)
