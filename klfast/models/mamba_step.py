"""One token through the inside of a Mamba mixer, in one call of the extension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from klfast import runtime
from klfast.backends.memory import view
from klfast.errors import InvalidInputError
from klfast.nn import QuantLinear
from klfast.prepared import FEW_ROWS, PreparedLinear, Watch, plain, prepared, unobserved
from klfast.types import FLOAT_DTYPES

try:
    from klfast import _C
except ImportError:  # not built: then everything counts as observed
    _C = None

Place = tuple[dict[str, torch.Tensor | None], str]  # a module's dictionary of parameters, and a name in it


class Parts(NamedTuple):
    """What lies between a mixer's first and last projection.

    Attributes:
        conv1d: depthwise nn.Conv1d over D channels; SiLU follows.
        x_proj: linear layer from D to R + 2 N: dt, B, C.
        dt_proj: linear layer from R to D; its bias is added in float32.
        A_log, D: the parameters [D, N] and [D].
        norm_eps: of RMS norms over dt, B and C; None if there are none.
        norms: their weights [R], [N] and [N]; none if these are ones.
    """

    conv1d: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Module
    A_log: Place
    D: Place
    norm_eps: float | None = None
    norms: tuple[Place, ...] = ()


class MambaStep:
    """A mixer's parts, checked and handed to the extension. ``mixer`` is None if it cannot take them."""

    def __init__(self, parts: Parts) -> None:
        self.mixer, self._parts, self._projections = None, parts, _projections(parts)
        convolution = parts.conv1d._parameters
        places = ((convolution, "weight"), (convolution, "bias"), parts.A_log, parts.D, (parts.dt_proj._parameters, "bias"), *parts.norms)
        weight, conv_bias, A_log, D, dt_bias, *norms = tensors = [home.get(name) for home, name in places]
        if self._projections is None or any(t is None for t in (weight, A_log, D)) or not plain(*tensors) or A_log.dim() != 2:
            return
        x_proj, dt_proj = self._projections
        (channels, states), rank, width = A_log.shape, dt_proj.k, weight.shape[-1]
        shapes = ((channels, 1, width), (channels,), (channels, states), (channels,), (channels,), (rank,), (states,), (states,))[: len(tensors)]
        fit = all(t is None or t.shape == shape for t, shape in zip(tensors, shapes, strict=True))
        if not fit or (x_proj.k, x_proj.n, dt_proj.n) != (channels, rank + 2 * states, channels):
            return
        self._channels, self._states, self._past, self._watch = channels, states, width - 1, Watch(*places)
        self.mixer = _C.MambaMixer(
            view(weight.squeeze(1)), view(conv_bias), x_proj.projection, dt_proj.projection, parts.norm_eps is not None,
            *(view(t) for t in norms or (None, None, None)), parts.norm_eps or 0.0, view(A_log), view(D), view(dt_bias), channels, width, rank, states,
        )  # fmt: skip

    def is_current(self, parts: Parts) -> bool:
        return self.mixer is not None and self._parts == parts and self._watch.sees_no_change() and self._projections == _projections(parts)

    def takes(self, x: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> bool:
        """Whether one token of each of B sequences, x [B, ...], can go through, with the states [B, D, S] and [B, D, N]."""
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

    def __call__(self, x: torch.Tensor, z: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> torch.Tensor:
        """y [B, D] in the dtype of x from the input x and the gate z, both [B, D]; the states, which it ``takes``, move on in place."""
        shape = (len(conv_state), self._channels)
        if x.shape != shape or z.shape != shape or not self._projections[0].takes(x.dtype) or z.dtype not in FLOAT_DTYPES:
            raise InvalidInputError(f"x and z must be {list(shape)} after the first projection, got {x.dtype} {list(x.shape)} and {z.dtype} {list(z.shape)}")
        out = x.new_empty(x.shape)
        self.mixer(view(x), view(z), view(conv_state), view(ssm_state), view(out), len(x), conv_state.shape[2], torch.get_num_threads(), runtime.cpu_tier_limit())
        return out


def prepare(mixer: nn.Module, parts: Parts, x: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> MambaStep | None:
    """The step of the mixer whose parts these are, for an input of x's dtype and batch; None where the ops have to be called.

    That is where there is a part that the extension cannot take, a hook on a projection, somebody who observes x, or
    gradients are enabled.
    """
    if torch.is_grad_enabled() or not unobserved(x):
        return None
    step = prepared(mixer, MambaStep, parts)
    return step if step.takes(x, conv_state, ssm_state) else None


def _projections(parts: Parts) -> tuple[PreparedLinear, PreparedLinear] | None:
    layers = (parts.x_proj, parts.dt_proj)
    if any(type(layer) not in (nn.Linear, QuantLinear) or layer._forward_hooks or layer._forward_pre_hooks or "_hf_hook" in vars(layer) for layer in layers):
        return None
    x_proj, dt_proj = (prepared(layer, PreparedLinear, layer) for layer in layers)
    return None if x_proj.projection is None or dt_proj.projection is None else (x_proj, dt_proj)
