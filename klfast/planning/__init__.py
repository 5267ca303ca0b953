"""Mixed-precision plans: a spec for each layer under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from klfast.core.errors import InvalidInputError
from klfast.models.selection import Patterns
from klfast.planning.budget import Budget
from klfast.planning.constraints import Keep
from klfast.planning.greedy import plan_greedy, plan_greedy_evaluated
from klfast.planning.numbers_given import require_number
from klfast.planning.optimal import plan_optimal
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem
from klfast.planning.refine import refine as refined
from klfast.planning.timings import Timings
from klfast.planning.uniform import plan_uniform
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import Sensitivities

__all__ = ["plan"]

METHODS = ("optimal", "greedy", "uniform")
OBJECTIVES = ("size", "latency")


def plan(
    sensitivities: Sensitivities,
    max_bytes: float | None = None,
    mean_bits: float | None = None,
    max_kl: float | None = None,
    method: str = "optimal",
    *,
    metric: str | None = None,
    evaluate: Callable[[Plan], float] | None = None,
    gamma: float = 1.10,
    spec: QuantSpec | str | None = None,
    time_limit: float = 60.0,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    keep: Keep | None = None,
    activation: str = "exact",
    refine: Callable[[Plan], float] | None = None,
    tries: int = 12,
    servable: bool = False,
    objective: str = "size",
    max_seconds: float | None = None,
    timings: Timings | None = None,
) -> Plan:
    """Choose a precision for each layer: full precision, or a spec that the sweep measured on it.

    Exactly one of max_bytes, mean_bits, max_kl and max_seconds must be given, except where a method says otherwise.

    Args:
        sensitivities: from klfast.sweep, or the published files (klfast.sensitivity.kl_ssm_quant).
        max_bytes: limit on all tensors of the saved model: packed weights, scales (2 bytes each), packed zero points,
            shapes (16 bytes per quantized layer), layers left alone, and everything that is never quantized; a tied
            head counts once. The files' headers (names, shapes and offsets of the tensors) come on top, as do 16 bytes
            for each single matrix of quantized experts.
        mean_bits: limit per weight of all linear layers and experts, including scales, zero points and layers in full
            precision.
        max_kl: limit on the KL summed over the layers, nats per token; the plan is the smallest within it, or by
            ``objective="latency"`` the fastest.
        method:
            "optimal": the least summed cost within the budget, a knapsack solved to proven optimality.
            "greedy": candidates (layer, spec) by rising cost. With ``evaluate``, as in the paper: a candidate is taken
                back if it raises the perplexity above ``gamma`` times that of the full-precision model; stops at the
                end of the list, or once max_bytes or mean_bits (optional) is met. Without it: until the budget is met.
            "uniform": ``spec`` on all layers; without ``spec``, the measured one that meets the budget best.
        metric: the measured metric that costs are derived from. By default KL(teacher || student), which quantization
            adds to the cross-entropy on the teacher's own text distribution: its sum predicts the growth of
            log-perplexity, and the KL that klfast.evaluate reports. KL(student || teacher) if only that was measured.
            "sqnr_db" counts as noise power 10^(-dB/10), "top1_agree" as 1 - agreement.
        evaluate: for "greedy": plan -> perplexity of the model so quantized. Called first with an empty plan.
        gamma: for "greedy" with ``evaluate``.
        spec: for "uniform"; a QuantSpec or its text, such as "int4-g64-sym".
        time_limit: seconds for "optimal", which usually takes well under one; a note says if the limit was reached.
        layers: patterns of the only layers that may be quantized: names, their last parts ("in_proj"), wildcards
            ("layers.0.*") or "re:" and a regular expression, see klfast.models.selection. All by default.
        exclude: patterns of layers that stay in full precision, such as "lm_head".
        keep: pattern -> spec, or None or "full" for full precision: the precision of these layers, whatever the budget
            and the method. The sweep must have measured the spec on them. Under "greedy" with ``evaluate`` they have it
            from the second evaluation on.
        activation: "auto": a layer rounds its input to int8, which makes products faster, where that costs less than a
            tenth of the KL that rounding its weight does. It needs a sweep with ``activations=True``; the plan records
            the choice for each layer, ``quantize_model`` follows it, and both costs count as the layer's. "exact": the
            plan leaves it to ``quantize_model``.
        refine: for a budget of bytes or seconds: plan -> measured KL of the whole model so quantized
            (``klfast.measured_kl``). The plan, uniform ones within the budget in each spec that was measured on every
            layer, and the best swaps are measured; the best of them is returned, so it is never worse, on that text,
            than those.
        tries: most swaps that ``refine`` measures.
        servable: vLLM and transformers without klfast load the plan's folder: layers that they fuse (q, k and v; gate
            and up), and all experts, have one precision, one that vLLM has kernels for (``klfast.planning.servable``);
            the head, what Mamba's forwards multiply by themselves, and Granite-4.0-H's experts keep full precision,
            unless ``keep`` says otherwise.
        objective: what a plan within ``max_kl`` has least of: "size", bytes, or "latency", seconds a token.
        max_seconds: limit on the seconds that a token spends in the products with the layers' matrices, as ``timings``
            say. Attention, recurrences and norms, which no plan changes, come on top.
        timings: from ``klfast.time_products``. Every plan then says its "seconds".

    Returns:
        The plan. Its ``predicted`` holds "bytes" (whole model), "mean_bits", "kl" (sum over layers) and, if the sweep
        measured delta_ce, "perplexity" on its calibration text, estimated as if the layers' contributions to the
        cross-entropy were additive: exp(the teacher's cross-entropy + the sum of delta_ce); "seconds" a token in the
        layers' products, with ``timings``; and "kl_measured", if ``refine`` measured it. If files cannot hold a
        measured group size (``storable_spec``), the plan has the storable one and a note. Ties go to fewer bytes.

    Raises:
        ModelMismatchError: the timings are of another model.
        InvalidInputError: no budget or more than one, seconds without timings, an unknown method or metric, no finite
            measurement, contradictory patterns, a kept spec that was not measured, under "auto" int8 activations that
            were not, or under ``servable`` a kept or uniform spec that other engines have no kernels for.
        UnknownLayerError: a pattern selects no layer.
        InfeasibleBudgetError: no plan meets the budget; the message names the smallest reachable bytes or KL.
    """
    if method not in METHODS:
        raise InvalidInputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if evaluate is not None and method != "greedy":
        raise InvalidInputError(f"evaluate belongs to method='greedy', not {method!r}")
    if spec is not None and method != "uniform":
        raise InvalidInputError(f"spec belongs to method='uniform', not {method!r}; leave it out")
    if evaluate is not None and not callable(evaluate):
        raise InvalidInputError(
            f"evaluate must be a function from a plan to a perplexity, got {type(evaluate).__name__}"
        )
    spec = None if spec is None else QuantSpec.of(spec)
    if time_limit != math.inf:
        time_limit = require_number("time_limit", time_limit, 0.0)
    if refine is not None and (not callable(refine) or evaluate is not None or method == "uniform"):
        raise InvalidInputError("refine must be a function from a plan to a KL, for an optimal or greedy plan by costs")
    if objective not in OBJECTIVES:
        raise InvalidInputError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    problem = Problem.of(
        sensitivities,
        metric=metric,
        layers=layers,
        exclude=exclude,
        keep=keep,
        activation=activation,
        servable=servable,
        timings=timings,
    )
    limits = {"max_bytes": max_bytes, "mean_bits": mean_bits, "max_seconds": max_seconds, "max_kl": max_kl}
    budget = Budget.of(problem, objective, **limits)
    if method == "uniform":
        return plan_uniform(problem, budget, spec)
    if evaluate is not None:
        return plan_greedy_evaluated(problem, budget, evaluate, gamma)
    if budget is None:
        raise InvalidInputError(
            "give a budget: max_bytes (of the model), mean_bits (per weight), max_seconds (a token) or max_kl (nats "
            "per token)"
        )
    made = plan_greedy(problem, budget) if method == "greedy" else plan_optimal(problem, budget, time_limit)
    return made if refine is None else refined(problem, budget, made, refine, tries)
