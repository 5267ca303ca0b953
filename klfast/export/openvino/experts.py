"""``GraphExperts``: which experts tokens meet, and the products with their matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openvino import opset13 as op
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.routing import Routes, Routing
from klfast.export.openvino import weights
from klfast.export.openvino.matrices import GraphMatrices
from klfast.export.openvino.nodes import constant, integers, reshaped, size
from klfast.nn.experts import stack_names
from klfast.nn.linear import QuantLinear
from klfast.nn.split_stack import SplitStack


class GraphExperts(GraphMatrices):
    """Routers and experts.

    Each expert gets each token, and weights of zero leave out what was not chosen: the form in which OpenVINO's
    ConvertTiledMoeBlockTo3GatherMatmuls (2026.4, convert_tiled_moe_block_to_gather_matmuls.cpp) finds gated experts and
    computes only the chosen ones.
    """

    def route(
        self, name: str, routing: Routing, logits: Columns, bias: torch.Tensor | None = None, prefix: str = "router"
    ) -> Routes:
        """Choose experts for each token by the logits; ``bias`` [E] is added to the scores for the choice alone."""
        routing.require_experts(name, logits.width)
        value = self.memory.read(logits)
        scores = op.sigmoid(value) if routing.sigmoid else op.softmax(value, -1)
        choice = scores if bias is None else op.add(scores, constant(bias))
        if routing.groups > 1:
            choice = _in_open_groups(choice, routing, logits.width)
        best = op.topk(choice, op.constant(np.int64(routing.each)), -1, "max", "value", "i32").output(1)
        chosen = op.gather_elements(scores, best, -1)
        if routing.normalise:
            total = op.reduce_sum(chosen, np.array([-1]), keep_dims=True)
            chosen = op.divide(chosen, op.add(total, np.float32(routing.epsilon)))
        if routing.factor != 1:
            chosen = op.multiply(chosen, np.float32(routing.factor))
        index, weight = (self.buffer(f"{prefix}.{part}", routing.each) for part in ("index", "weights"))
        self.memory.write(index, best)
        self.memory.write(weight, chosen)
        return Routes(logits.width, index, weight)

    def gather(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Repeat all tokens for each expert, [E, B T, width]; a single expert takes them as they are."""
        value = self.memory.read(x)
        if routes.experts > 1:
            value = op.tile(reshaped(value, -1, x.width), np.array([routes.experts, 1]))
            value = reshaped(value, routes.experts, -1, x.width)
        self.memory.write(out, value)

    def project_gathered(self, experts: nn.Module, stack: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Multiply such rows by each expert's matrix in a stack, whose gates and others are products of their own."""
        is_gated = getattr(experts, "has_gate", False) and stack == stack_names(experts)[0]
        parts = out.split(*([out.width // 2] * 2 if is_gated else [out.width]))
        name, first = f"{self.name(experts)}.{stack}", 0
        for part in parts:
            weight = self._stack(name, experts, stack, routes.experts, first, first + part.width)
            self.memory.write(part, self._product(name, self.memory.read(x), weight))
            first += part.width

    def sum_gathered(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Add up such rows of each token, weighted."""
        value, weight = self.memory.read(x), self.memory.read(routes.weights)
        if routes.experts == 1:
            self.memory.write(out, op.multiply(value, weight))
            return
        index, weight = (reshaped(each, -1, routes.chosen.width) for each in (self.memory.read(routes.chosen), weight))
        each, texts = integers(routes.experts), op.shape_of(self.ids)
        nothing = op.broadcast(op.constant(np.float32(0)), op.concat([size(index, 0), each], 0))
        of_experts = op.transpose(op.scatter_elements_update(nothing, index, weight, op.constant(1)), np.array([1, 0]))
        of_experts = op.unsqueeze(op.reshape(of_experts, op.concat([each, texts], 0), False), op.constant(-1))
        value = op.reshape(value, op.concat([each, texts, integers(x.width)], 0), False)
        self.memory.write(out, op.reduce_sum(op.multiply(value, of_experts), np.array([0]), keep_dims=False))

    def _stack(self, name: str, experts: nn.Module, stack: str, count: int, first: int, end: int) -> Any:
        """Return rows [first, end) of each expert's matrix, [E, end - first, K]."""
        layer = experts._modules.get(stack)
        if isinstance(layer, SplitStack):
            raise CannotLowerError(
                f"the experts of {name} have different precisions, and OpenVINO's products of experts one; plan one "
                "for the whole stack (klfast plan --servable, or a sweep without --experts)"
            )
        if not isinstance(layer, QuantLinear):
            [held] = self.parameters(experts, stack)
            return weights.dense(held[:, first:end], name)
        self.expect(layer, "QuantLinear")
        rows = torch.arange(layer.out_features).view(count, -1)[:, first:end]
        return self._packed(name, layer.quantized, rows)


def _in_open_groups(choice: Any, routing: Routing, count: int) -> Any:
    """Return scores [B, T, E] where experts of groups whose two best add up to less have the least of all."""
    by_group = reshaped(choice, 0, 0, routing.groups, count // routing.groups)
    two = op.topk(by_group, op.constant(np.int64(2)), -1, "max", "value", "i32").output(0)
    sums = op.reduce_sum(two, np.array([-1]), keep_dims=True)  # [B, T, groups, 1]
    best = op.topk(sums, op.constant(np.int64(routing.open_groups)), 2, "max", "value", "i32").output(0)
    is_open = op.greater_equal(sums, op.reduce_min(best, np.array([2]), keep_dims=True))
    least = op.constant(np.float32(np.finfo(np.float16).min))
    return reshaped(op.select(is_open, by_group, least), 0, 0, count)
