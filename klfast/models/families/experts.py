"""Lowerings of mixtures of experts, as transformers writes them: routers, experts, shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.routing import Routes, Routing
from klfast.models.families import lowering
from klfast.nn.experts import stack_names
from klfast.nn.linear import QuantLinear
from klfast.nn.split_stack import SplitStack


def routes(build: Builder, router: Any, x: Columns, routing: Routing, bias: torch.Tensor | None = None) -> Routes:
    """Lower a router: a linear layer, or another module with a ``weight`` [experts, hidden].

    With ``routing.wide`` its product is in float32, too. ``bias`` is added to the scores for the choice alone.
    """
    if isinstance(router, nn.Linear):
        logits = build.buffer("router.logits", router.out_features)
        build.project(router, x, logits)
    else:
        dtype = torch.float32 if routing.wide else None
        logits = build.buffer("router.logits", len(router.weight), dtype)
        if dtype not in (None, build.dtype):
            wide = build.buffer("router.wide", x.width, dtype)
            build.scale(1.0, x, wide)
            x = wide
        build.project_parameter(router, "weight", x, logits, dtype=dtype)
    return build.route(f"{build.name(router)}.routes", routing, logits, bias)


def deepseek_routes(build: Builder, router: Any, x: Columns) -> Routes:
    """Lower a router as DeepSeek-V3 has it: sigmoids in float32, a bias for the choice, groups of experts.

    NemotronHTopkRouter.forward in modeling_nemotron_h.py, likewise modeling_kimi_linear.py, 5.17.0 and 5.24.0.
    """
    build.expect(router, "NemotronHTopkRouter", "KimiLinearTopkRouter")
    routing = Routing(
        router.top_k,
        sigmoid=True,
        normalise=router.norm_topk_prob,
        epsilon=1e-20,
        factor=router.routed_scaling_factor,
        wide=True,
        groups=router.num_group,
        open_groups=router.topk_group,
    )
    [bias] = build.tensors((router._buffers, "e_score_correction_bias"))
    return routes(build, router, x, routing, bias)


def mixture(build: Builder, experts: Any, routes: Routes, x: Columns, out: Columns) -> None:
    """Lower the weighted sum of experts ``down(silu(gate) * up)``, or ``down(relu(up)^2)`` without gates.

    Args:
        build: the program's builder.
        experts: of a class that ``stack_names`` knows, quantized or not.
        routes: of the tokens.
        x, out: columns of the hidden size.
    """
    name = build.name(experts)
    names = stack_names(experts)
    if not names:
        raise CannotLowerError(f"{name} are experts of another kind")
    first, last = names
    down = getattr(experts, last)
    size = down.in_features if isinstance(down, (QuantLinear, SplitStack)) else down.shape[-1]
    each = routes.chosen.width
    rows, projected, inner = (
        build.buffer(f"experts.{part}", width, rows=build.rows * each)
        for part, width in (("rows", x.width), ("projected", (1 + experts.has_gate) * size), ("inner", size))
    )
    if experts.has_gate:
        lowering.require_silu(experts.act_fn)
        activation, one, other = "silu_gate", *projected.split(size, size)
    else:
        lowering.require_squared_relu(experts.act_fn)
        activation, one, other = "relu_gate", projected, projected
    build.gather(f"{name}.gather", routes, x, rows)
    build.project_gathered(experts, first, routes, rows, projected)
    build.combine(activation, one, other, inner, each=each)
    build.project_gathered(experts, last, routes, inner, rows)
    build.sum_gathered(f"{name}.sum", routes, rows, out)


def with_shared_expert(build: Builder, moe: Any, normalise: bool, x: Columns, out: Columns) -> None:
    """Lower a mixture beside an expert that all tokens meet, as Qwen's models have it.

    The router's softmax is in float32, its weights are normalised or not (Qwen3NextTopKRouter.forward and
    Qwen3NextSparseMoeBlock.forward in modeling_qwen3_next.py, likewise modeling_qwen3_5_moe.py, 5.17.0 and 5.24.0).
    """
    build.expect(moe.gate, "Qwen3_5MoeTopKRouter", "Qwen3NextTopKRouter")
    shared = build.buffer("experts.shared", out.width)
    lowering.mlp(build, moe.shared_expert, x, shared, "Qwen3_5MoeMLP", "Qwen3NextMLP")
    _gate(build, moe.shared_expert_gate, x, shared)
    mixture(build, moe.experts, routes(build, moe.gate, x, Routing(moe.gate.top_k, normalise=normalise)), x, out)
    build.combine("add", out, shared, out)


def _gate(build: Builder, layer: nn.Linear, x: Columns, y: Columns) -> None:
    """Lower y = sigmoid(layer(x)) y with one gate a token: a mixture of one expert, which all tokens meet."""
    logit = build.buffer("gate.logit", 1)
    build.project(layer, x, logit)
    routing = Routing(1, sigmoid=True, normalise=False, rounds=True)
    routes = build.route(f"{build.name(layer)}.routes", routing, logit, prefix="gate")
    build.sum_gathered(f"{build.name(layer)}.multiply", routes, y, y)
