"""One decoding step of a Mamba mixer, from its first to its last projection, in one call of the extension."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.backends.cpu.extension import view
from klfast.backends.operands import FEW_ROWS
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.core.torch_internals import has_global_hooks
from klfast.dispatch import pins
from klfast.nn.direct_call import Place, Prepared, PreparedLinear, Watch, current, has, plain, unobserved
from klfast.nn.linear import QuantLinear
from klfast.nn.untouched import why_touched

_LAYERS = (nn.Linear, QuantLinear)


class Parts(NamedTuple):
    """The parts between a mixer's first and last projection.

    Attributes:
        conv1d: depthwise nn.Conv1d over D channels; SiLU follows.
        x_proj: linear layer from D to R + 2 N: dt, B, C.
        dt_proj: linear layer from R to D; its bias is added in float32.
        A_log, D: the parameters [D, N] and [D].
        norm_eps: epsilon of the RMS norms over dt, B and C; None if there are none.
        norms: their modules, with weights [R], [N] and [N]; empty if the weights are ones.
    """

    conv1d: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Module
    A_log: Place
    D: Place
    norm_eps: float | None = None
    norms: tuple[nn.Module, ...] = ()

    def are(self, others: Parts) -> bool:
        """Return True if all parts are identical.

        The dictionaries are compared by identity first, because ``==`` on them would compare tensors.
        """
        return self.A_log[0] is others.A_log[0] and self.D[0] is others.D[0] and self == others


class MambaStep(Prepared):
    """A mixer's parts, checked and passed to the extension.

    Attributes:
        mixer: the extension's MambaMixer; None if it cannot take these parts.
    """

    def __init__(self, parts: Parts) -> None:
        self.mixer: Any = None
        self._parts = parts
        found, _ = _projections(parts)
        self._projections: tuple[Any, ...] = found or ()
        convolution: dict[str, Any] = parts.conv1d._parameters
        projection: dict[str, Any] = parts.dt_proj._parameters
        norms: list[tuple[dict[str, Any], str]] = [(norm._parameters, "weight") for norm in parts.norms]
        places: tuple[Place, ...] = (
            (convolution, "weight"),
            (convolution, "bias"),
            parts.A_log,
            parts.D,
            (projection, "bias"),
            *norms,
        )
        if not self._projections or not has(*places):
            return
        self._watch = Watch(*places)
        self._prepare(parts.norm_eps, *self._watch.tensors)
        self._watch.tensors = ()

    def _prepare(self, norm_eps: float | None, *tensors: torch.Tensor | None) -> None:
        from klfast import _C  # it was built, or else every x would count as observed

        weight, conv_bias, A_log, D, dt_bias, *norms = tensors
        if weight is None or A_log is None or D is None or not plain(*tensors) or A_log.dim() != 2:
            return
        x_proj, dt_proj = self._projections
        (channels, states), rank, width = A_log.shape, dt_proj.k, weight.shape[-1]
        shapes = (
            (channels, 1, width),
            (channels,),
            (channels, states),
            (channels,),
            (channels,),
            (rank,),
            (states,),
            (states,),
        )[: len(tensors)]
        fit = all(t is None or t.shape == shape for t, shape in zip(tensors, shapes, strict=True))
        if not fit or (x_proj.k, x_proj.n, dt_proj.n) != (channels, rank + 2 * states, channels):
            return
        self._channels, self._states, self._past = channels, states, width - 1
        self.mixer = _C.MambaMixer(
            view(weight.squeeze(1)),
            view(conv_bias),
            x_proj.projection,
            dt_proj.projection,
            norm_eps is not None,
            *(view(t) for t in norms or (None, None, None)),
            norm_eps or 0.0,
            view(A_log),
            view(D),
            view(dt_bias),
            channels,
            width,
            rank,
            states,
        )

    def hold(self, parts: Parts) -> list[object] | None:
        """Return the objects that must live until a call returns.

        None if a part has changed, or the extension cannot take these.
        """
        if self.mixer is None or not self._parts.are(parts):
            return None
        projections, held = _projections(parts)
        own = self._watch.hold()
        return None if own is None or projections != self._projections else [own, held]

    def takes(self, x: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> bool:
        """Return True if the step supports one token of B sequences, x [B, ...], and states [B, D, S] and [B, D, N]."""
        batch = x.shape[0]
        return (
            self.mixer is not None
            and 0 < batch <= FEW_ROWS
            and all(projection.takes(x.dtype) for projection in self._projections)
            and plain(conv_state, ssm_state)
            and conv_state.dim() == 3
            and conv_state.shape[:2] == (batch, self._channels)
            and conv_state.shape[2] >= self._past
            and ssm_state.shape == (batch, self._channels, self._states)
        )

    def __call__(
        self, held: list[object], x: torch.Tensor, z: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        """Return y [B, D] in the dtype of x from the input x and the gate z, both [B, D].

        The states, which must pass ``takes``, are updated in place. ``held``, from ``hold``, only has to stay alive.
        """
        shape = (len(conv_state), self._channels)
        taken = (
            all(projection.takes(x.dtype) for projection in self._projections)
            and z.dtype in FLOAT_DTYPES
            and x.is_cpu
            and z.is_cpu
        )
        if x.shape != shape or z.shape != shape or not taken:
            raise InvalidInputError(
                f"x and z must be {list(shape)} after the first projection, "
                f"got {x.dtype} {list(x.shape)} and {z.dtype} {list(z.shape)}"
            )
        out = x.new_empty(*shape)
        self.mixer(
            view(x),
            view(z),
            view(conv_state),
            view(ssm_state),
            view(out),
            len(x),
            conv_state.shape[2],
            torch.get_num_threads(),
            pins.cpu_tier_limit(),
        )
        return out


def prepare(
    mixer: nn.Module, parts: Parts, x: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
) -> partial[torch.Tensor] | None:
    """Return the step of the mixer with these parts, for x's dtype and batch; call it with x, z and both states.

    It keeps the parts' memory alive. Returns None where the ops must be called: a part is unsupported, a submodule has
    hooks or a replaced forward, a global hook is set, x is observed, or gradients are enabled.
    """
    if torch.is_grad_enabled() or not unobserved(x) or has_global_hooks():
        return None
    step: Any
    step, held = current(mixer, MambaStep, parts)
    return partial(step, held) if held is not None and step.takes(x, conv_state, ssm_state) else None


def _projections(parts: Parts) -> tuple[tuple[PreparedLinear, PreparedLinear] | None, tuple[object, ...]]:
    """Return x_proj and dt_proj, and the objects that must live while they are called.

    None for layers that the extension cannot take.
    """
    first: Any
    second: Any
    x_proj, dt_proj = parts.x_proj, parts.dt_proj
    if (
        type(x_proj) not in _LAYERS
        or type(dt_proj) not in _LAYERS
        or any(map(why_touched, (x_proj, dt_proj, *parts.norms)))
    ):
        return None, ()
    first, first_held = current(x_proj, PreparedLinear, x_proj)
    second, second_held = current(dt_proj, PreparedLinear, dt_proj)
    return (None, ()) if first_held is None or second_held is None else ((first, second), (first_held, second_held))
