"""The KL divergence of whole plans, measured."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from klfast.checkpoint.apply_plan import quantize_model
from klfast.evaluation.quality import evaluate
from klfast.models.batches import Batches
from klfast.planning.plan_file import Plan


def measured_kl(
    model: nn.Module, text: Batches, *, rounding: str = "nearest", calibration: Batches | None = None
) -> Callable[[Plan], float]:
    """Return a function that quantizes a copy of a model by a plan and measures it, for ``klfast.plan(refine=...)``.

    Args:
        model: in full precision; left as it is. Each call copies it.
        text: token ids to measure on, as for ``klfast.evaluate``; other text than the evaluation's, and than
            ``calibration``, which flatters GPTQ.
        rounding: as for ``klfast.quantize_model``.
        calibration: likewise.

    Returns:
        plan -> mean KL(model || quantized), nats per token.
    """

    def measure(plan: Plan) -> float:
        student = quantize_model(copy.deepcopy(model), plan, rounding=rounding, calibration=calibration, progress=False)
        kl = evaluate(student, text, teacher=model, progress=False).kl
        assert kl is not None  # since there is a teacher
        return kl

    return measure
