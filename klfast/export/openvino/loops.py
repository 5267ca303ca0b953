"""Recurrences over time as OpenVINO's Loop, one token an iteration.

``delta_rule`` has the form, down to the versions of operations, in which OpenVINO's GatedDeltaNetFusion (2026.4,
fuse_gated_delta_net.cpp in src/common/transformations/src/transformations/common_optimizations) finds it and makes one
operation of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from klfast.export.openvino.nodes import integers, reshaped, size, sizes

_LAST = -1


def selective_scan(A: Any, step: Any, x: Any, B: Any, C: Any, state: Any) -> tuple[Any, Any]:
    """Return y [B, T, D] and the last state [B, N, D] of h = exp(step A) h + B x, y = C h.

    A [N, D]; step and x, which is multiplied by it, [B, T, D]; B and C [B, T, N].
    """
    loop = _Loop(size(x, 1))
    rate, step, x = loop.constant(A), loop.slices(step, 1), loop.slices(x, 1)
    b, c = loop.slices(op.transpose(B, np.array([0, 2, 1])), 2), loop.slices(C, 1)
    h = loop.carried(state)
    new = op.add(op.multiply(op.exp(op.multiply(rate, step)), h), op.multiply(b, x))
    return loop.run(h, new, op.matmul(c, new, False, False), 1)


def head_scan(decay: Any, x: Any, B: Any, C: Any, state: Any) -> tuple[Any, Any]:
    """Return y [B, T, D] and the last state [B, G, D / G, N] of h = decay h + x B, y = h C.

    decay and x [B, T, D]; B and C [B, T, G, N], each group's for its part of the channels.
    """
    _, groups, width, states = sizes(state)
    loop = _Loop(size(x, 1))
    decay, x = (reshaped(loop.slices(each, 1), 0, groups, width, 1) for each in (decay, x))
    b = reshaped(loop.slices(B, 1), 0, groups, 1, states)
    c = reshaped(loop.slices(C, 1), 0, groups, states, 1)
    h = loop.carried(state)
    new = op.add(op.multiply(h, decay), op.multiply(x, b))
    y = op.matmul(new, c, False, False)
    return loop.run(h, new, reshaped(y, 0, 1, groups * width), 1)


def delta_rule(q: Any, k: Any, v: Any, gate: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    """Return y [B, T, H, V] and the last state [B, H, K, V] of the delta rule with a decay exp(gate) a head.

    q and k [B, T, H, K], v [B, T, H, V], gate and beta [B, T, H].
    """
    q, k, v = (op.transpose(each, np.array([0, 2, 1, 3])) for each in (q, k, v))
    gate, beta = (op.transpose(each, np.array([0, 2, 1])) for each in (gate, beta))
    width = op.convert(op.gather(op.shape_of(q), op.constant(3), op.constant(0)), np.float32)
    q = op.divide(q, op.power(width, np.float32(0.5)))  # as GatedDeltaNetFusion finds it
    loop = _Loop(size(v, 2))
    q_t, k_t, v_t = (op.squeeze(loop.slices(each, 2), op.constant(2)) for each in (q, k, v))
    gate_t, beta_t = loop.slices(gate, 2), loop.slices(beta, 2)
    h = loop.carried(state)
    new, y = _delta_step(h, q_t, k_t, v_t, op.unsqueeze(op.exp(gate_t), op.constant(-1)), beta_t)
    y, last = loop.run_scattered(h, new, y, 2, op.shape_of(v))
    return op.transpose(y, np.array([0, 2, 1, 3])), last


def channel_delta_rule(q: Any, k: Any, v: Any, gate: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    """Do the same with a decay for each channel of the keys: gate [B, T, H, K]."""
    q = op.divide(q, np.float32(math.sqrt(sizes(q)[3])))
    loop = _Loop(size(v, 1))
    q_t, k_t, v_t, gate_t = (op.squeeze(loop.slices(each, 1), op.constant(1)) for each in (q, k, v, gate))
    beta_t = op.transpose(loop.slices(beta, 1), np.array([0, 2, 1]))
    h = loop.carried(state)
    new, y = _delta_step(h, q_t, k_t, v_t, op.unsqueeze(op.exp(gate_t), op.constant(-1)), beta_t)
    return loop.run(h, new, op.transpose(y, np.array([0, 2, 1, 3])), 1)


def _delta_step(h: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any) -> tuple[Any, Any]:
    """Return the state [B, H, K, V] after a token and its result [B, H, 1, V].

    q and k [B, H, K], v [B, H, V], decay [B, H, 1 or K, 1], beta [B, H, 1].
    """
    column = op.unsqueeze(k, op.constant(-1))
    decayed = op.multiply(h, decay)
    found = op.reduce_sum(op.multiply(decayed, column), op.constant(-2), keep_dims=False)
    change = op.multiply(op.subtract(v, found), beta)
    new = op.add(decayed, op.multiply(column, op.unsqueeze(change, op.constant(-2))))
    return new, op.reduce_sum(op.multiply(new, op.unsqueeze(q, op.constant(-1))), op.constant(-2), keep_dims=True)


def of_heads(x: Any, heads: int) -> Any:
    """Return [B, T, G, N] as [B, T, heads, N], each group's for its heads, one after another."""
    groups, states = sizes(x)[2:]
    tiled = op.tile(op.unsqueeze(x, op.constant(3)), np.array([1, 1, 1, heads // groups, 1]))
    return op.reshape(tiled, integers(0, 0, heads, states), special_zero=True)


class _Loop:
    """A Loop whose body is being written; inputs keep the order in which they are named.

    Args:
        count: number of iterations, int64 [1].
    """

    def __init__(self, count: Any) -> None:
        self._count = op.squeeze(count, op.constant(0))
        self._inputs: list[tuple[str, Any, Any, int]] = []  # (kind, parameter, node, axis)

    def _parameter(self, kind: str, node: Any, axis: int = 0) -> Any:
        shape = list(node.get_output_partial_shape(0))
        if kind == "sliced":
            shape[axis] = ov.Dimension(1)
        parameter = op.parameter(ov.PartialShape(shape), np.float32)
        self._inputs.append((kind, parameter, node, axis))
        return parameter

    def constant(self, node: Any) -> Any:
        """Return what the body sees of a node that is the same in each iteration."""
        return self._parameter("same", node)

    def slices(self, node: Any, axis: int) -> Any:
        """Return what the body sees of a node of whose places along an axis each iteration has one."""
        return self._parameter("sliced", node, axis)

    def carried(self, node: Any) -> Any:
        """Return what the body sees of a node that it gives a new value."""
        return self._parameter("carried", node)

    def run(self, before: Any, after: Any, y: Any, axis: int) -> tuple[Any, Any]:
        """Return the results y of all iterations, one after another along an axis, and the last state ``after``."""
        loop = self._closed([(before, after)], [y], [])
        return loop.get_concatenated_slices(y.output(0), 0, 1, 1, -1, axis), loop.get_iter_value(after.output(0), _LAST)

    def run_scattered(self, before: Any, after: Any, y: Any, axis: int, shape: Any) -> tuple[Any, Any]:
        """Do the same with y put into its place of a tensor of a shape by each iteration."""
        number = op.parameter([], np.int64)
        into = self.carried(op.broadcast(op.constant(np.float32(0)), shape))
        all_ = op.scatter_update(into, op.unsqueeze(number, op.constant(0)), y, op.constant(axis))
        loop = self._closed([(before, after), (into, all_)], [], [number])
        return loop.get_iter_value(all_.output(0), _LAST), loop.get_iter_value(after.output(0), _LAST)

    def _closed(self, carried: list[tuple[Any, Any]], others: list[Any], number: list[Any]) -> Any:
        """Return the Loop, with the parameter that counts iterations, if there is one."""
        goes_on = op.constant(np.array([True]))
        parameters = [parameter for _, parameter, _, _ in self._inputs]
        body = ov.Model([goes_on, *(after for _, after in carried), *others], [*number, *parameters], "iteration")
        loop = op.loop(self._count, op.constant(np.array([True])))
        loop.set_function(body)
        loop.set_special_body_ports([0 if number else -1, 0])
        following = {id(before): after for before, after in carried}
        for kind, parameter, node, axis in self._inputs:
            if kind == "sliced":
                loop.set_sliced_input(parameter, node.output(0), 0, 1, 1, -1, axis)
            elif kind == "same":
                loop.set_invariant_input(parameter, node.output(0))
            else:
                loop.set_merged_input(parameter, node.output(0), following[id(parameter)].output(0))
        return loop
