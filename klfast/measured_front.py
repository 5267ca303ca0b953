"""Plans of many sizes, measured: KL, perplexity, bytes and speed."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from klfast import __version__
from klfast.checkpoint.apply_plan import quantize_model
from klfast.core import lock
from klfast.core.errors import InvalidInputError
from klfast.core.progress import Progress, reporter
from klfast.dispatch.conditions import conditions
from klfast.evaluation.front import Front, FrontPoint
from klfast.evaluation.quality import evaluate
from klfast.generation.loop import generate
from klfast.generation.transcript import Transcript
from klfast.models.batches import Batches
from klfast.models.fingerprint import fingerprint
from klfast.planning.front import front_plans, full_precision, uniform_plans
from klfast.planning.plan_file import Plan
from klfast.sensitivity import inputs
from klfast.sensitivity.results import Sensitivities

_PROMPT, _NEW_TOKENS, _RUNS = 8, 32, 5  # of decoding
_MOST_TOKENS = 8192  # in a micro-batch

Planned = tuple[str, str | None, Plan]  # kind, spec of a uniform plan, plan


def measure_front(
    model: nn.Module,
    sensitivities: Sensitivities,
    text: Batches,
    count: int = 20,
    *,
    rounding: str = "nearest",
    calibration: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
    **choices: object,
) -> Front:
    """Make plans of about ``count`` sizes, and measure the models that they make.

    The uniform plan in each spec that was measured on every layer and full precision are measured beside them. Speed is
    that of ``klfast.generate``: the median of five runs, each of 32 tokens after a prompt of 8.

    Args:
        model: in full precision, in the dtype that it is to run in; left as it is. Each plan is applied to a copy.
        sensitivities: of the model.
        text: held-out token ids, as for ``klfast.evaluate``; 8 tokens or more in the first window.
        count: of plans, 2 or more.
        rounding: as for ``klfast.quantize_model``.
        calibration: likewise.
        resume: a file that keeps what is measured. If it exists, the rest is measured.
        progress: as for ``klfast.sweep``.
        choices: further arguments of ``klfast.plan``: metric, layers, exclude, keep, activation, servable, timings.

    Raises:
        InvalidInputError: the resume file belongs to other arguments or another machine, or another process is working
            on it; or as ``klfast.plan``, ``klfast.quantize_model`` and ``klfast.evaluate``.
        CheckpointError: the resume file is damaged.
        ModelMismatchError: the sensitivities are of another model.
    """
    windows = inputs.micro_batches(text, inputs.vocabulary(model), _MOST_TOKENS)
    plans = _plans(sensitivities, count, **choices)
    provenance = _provenance(model, windows, rounding, calibration)
    prompt = windows[0][:1, :_PROMPT]
    with lock.held(resume):
        found = {} if resume is None else _resumed(resume, provenance)
        todo = [planned for planned in plans if _key(planned) not in found]
        with reporter(progress, "pareto", len(plans), len(plans) - len(todo)) as advance:
            for kind, spec, plan in todo:
                student = model
                if plan.specs:
                    student = quantize_model(
                        copy.deepcopy(model), plan, rounding=rounding, calibration=calibration, progress=False
                    )
                quality = evaluate(student, windows, teacher=model, progress=False)
                assert quality.kl is not None and quality.kl_stderr is not None  # since there is a teacher
                point = FrontPoint(
                    kind,
                    plan,
                    spec,
                    quality.kl,
                    quality.kl_stderr,
                    quality.perplexity,
                    _tokens_per_second(student, prompt),
                )
                found[_key((kind, spec, plan))] = point
                if resume is not None:
                    _front(found.values(), provenance).to_json(resume)
                advance(1, point.label)
        points = (replace(found[_key(planned)], plan=planned[2]) for planned in plans)  # predictions may be newer
        return _front(points, provenance)


def _plans(sensitivities: Sensitivities, count: int, **choices: object) -> list[Planned]:
    planned: list[Planned] = [("planned", None, plan) for plan in front_plans(sensitivities, count, **choices)]
    uniform: list[Planned] = [
        ("uniform", spec, plan) for spec, plan in uniform_plans(sensitivities, **choices).items() if plan.specs
    ]
    return [*planned, *uniform, ("full", None, full_precision(sensitivities, **choices))]


def _key(planned: Planned) -> str:
    kind, spec, plan = planned
    specs = {name: str(each) for name, each in plan.specs.items()}
    return repr((kind, spec, specs, dict(plan.activations), plan.scale))


def _front(points: Iterable[FrontPoint], provenance: dict[str, object]) -> Front:
    return Front(tuple(sorted(points, key=lambda point: point.nbytes)), provenance)


def _tokens_per_second(model: nn.Module, prompt: torch.Tensor) -> float:
    generate(model, prompt, 2, eos_token_id=())  # lowers the model to its engine, and wakes threads
    speeds = []
    for _ in range(_RUNS):
        transcript = Transcript()
        generate(model, prompt, _NEW_TOKENS, eos_token_id=(), transcript=transcript)
        assert transcript.tokens_per_second is not None  # after so many tokens
        speeds.append(transcript.tokens_per_second)
    return statistics.median(speeds)


def _provenance(
    model: nn.Module, windows: list[torch.Tensor], rounding: str, calibration: Batches | None
) -> dict[str, object]:
    """Return what decides the figures beside the plans."""
    known = fingerprint(model)
    of_calibration = (
        None
        if calibration is None
        else inputs.digest(inputs.micro_batches(calibration, inputs.vocabulary(model), _MOST_TOKENS))
    )
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "structure": known.structure,
        "norms": [float(f"{norm:.6g}") for norm in known.norms],
        "text_sha256": inputs.digest(windows),
        "tokens": sum(ids.shape[0] * (ids.shape[1] - 1) for ids in windows),
        "rounding": rounding,
        "calibration_sha256": of_calibration,
        **conditions(next(p.dtype for p in model.parameters() if p.is_floating_point())),
        "klfast": __version__,
        "torch": torch.__version__,
    }


def _resumed(path: str | os.PathLike[str], provenance: dict[str, object]) -> dict[str, FrontPoint]:
    if not Path(path).exists():
        return {}
    before = Front.from_json(path)
    for name, value in provenance.items():
        if before.provenance.get(name) != value:
            raise InvalidInputError(
                f"{os.fspath(path)} is the resume file of a front with other {name}; to start over delete it "
                "(--no-resume)"
            )
    return {_key((point.kind, point.spec, point.plan)): point for point in before.points}
