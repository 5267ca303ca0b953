"""``GraphExperts``: refuses mixtures of experts."""

from __future__ import annotations

import torch

from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.routing import Routes, Routing
from klfast.export.openvino.base import GraphBase


class GraphExperts(GraphBase):
    """Routers, of which a graph has none yet."""

    def route(
        self, name: str, routing: Routing, logits: Columns, bias: torch.Tensor | None = None, prefix: str = "router"
    ) -> Routes:
        """Refuse a model whose tokens choose experts."""
        raise CannotLowerError(f"{name} chooses experts, and models with experts are not written yet")
