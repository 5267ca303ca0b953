"""``ExpertInstructions``: which experts tokens meet, and the products with their matrices."""

from __future__ import annotations

import torch
from torch import nn

from klfast.backends.cpu.extension import DTYPE_CODES, view
from klfast.engine.columns import Columns
from klfast.engine.instructions.matrices import MatrixInstructions
from klfast.engine.routing import Routes, Routing
from klfast.nn.split_stack import SplitStack


class ExpertInstructions(MatrixInstructions):
    """Routers and experts."""

    def route(
        self, name: str, routing: Routing, logits: Columns, bias: torch.Tensor | None = None, prefix: str = "router"
    ) -> Routes:
        """Choose experts for each token by the logits; ``bias`` [E] is added to the scores for the choice alone."""
        routing.require_experts(name, logits.width)
        index = self.buffer(f"{prefix}.index", routing.each, torch.float32)
        weights = self.buffer(f"{prefix}.weights", routing.each, torch.float32 if routing.wide else None)
        self.program.route(
            name,
            view(bias),
            routing.sigmoid,
            routing.normalise,
            routing.epsilon,
            routing.factor,
            routing.groups,
            routing.open_groups,
            DTYPE_CODES[self.dtype if routing.rounds else torch.float32],
            logits,
            index,
            weights,
        )
        return Routes(logits.width, index, weights)

    def gather(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Copy each token's row of x once for each of its experts, in the order of the experts."""
        self.program.gather(name, routes.experts, routes.chosen, x, out)

    def project_gathered(self, experts: nn.Module, stack: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Multiply each of such rows by its expert's matrix in a stack; one product for each part of a SplitStack."""
        name, held = f"{self.name(experts)}.{stack}", experts._modules.get(stack)
        if not isinstance(held, SplitStack):
            matrices = self._matrix(experts, stack)
            self.program.project_gathered(name, matrices, routes.experts, routes.chosen, x, out, [])
            return
        self.expect(held, "SplitStack")
        parts = [self._projection(part) for part in held.parts]
        if held.dense is not None:
            parts.append(self._matrix(held, "dense"))
        for number, part in enumerate(parts):
            slots = held.slots(number)
            self.program.project_gathered(name, part, routes.experts, routes.chosen, x, out, slots)

    def sum_gathered(self, name: str, routes: Routes, x: Columns, out: Columns) -> None:
        """Add up such rows of each token, weighted."""
        self.program.sum_gathered(name, routes.experts, routes.chosen, routes.weights, x, out)
