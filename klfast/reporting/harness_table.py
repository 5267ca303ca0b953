"""The table of several models' results in lm-evaluation-harness, beside their KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from klfast.reporting.table import Cell, Table


def harness_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row a model and a column for each metric of each task that was asked for.

    Args:
        models: for each "model", its name, "bytes", "results" and "group_subtasks" as ``lm_eval.simple_evaluate``
            returns them, and perhaps "kl", "kl_stderr" and "top1_agreement". Of a group with a mean only that is
            shown, not its tasks.
    """
    metrics = _metrics(models[0])
    has_kl = "kl" in models[0]
    headings = ("model", "MB", *(("KL", "top-1 agreement") if has_kl else ()), *map(" ".join, metrics))
    rows: list[tuple[Cell, ...]] = []
    for one in models:
        compared = (_measured(one["kl"], one["kl_stderr"]), f"{one['top1_agreement']:.2%}") if has_kl else ()
        scores = [_score(one["results"][task], metric) for task, metric in metrics]
        rows.append((one["model"], one["bytes"] / 1e6, *compared, *scores))
    return Table("lm-evaluation-harness", headings, tuple(rows))


def _metrics(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (task, metric) for what is shown; lm-eval's keys are "metric,filter"."""
    keys = {
        task: [key for key in found if "," in key and "_stderr," not in key]
        for task, found in results["results"].items()
    }
    inside = {task for group, tasks in results["group_subtasks"].items() if keys.get(group) for task in tasks}
    return [(task, key.removesuffix(",none")) for task, own in keys.items() if task not in inside for key in own]


def _score(found: Mapping[str, Any], metric: str) -> str:
    name, _, filtered = metric.partition(",")
    suffix = filtered or "none"
    error = found.get(f"{name}_stderr,{suffix}")
    return _measured(found[f"{name},{suffix}"], error if isinstance(error, float) else math.nan)


def _measured(value: float, error: float) -> str:
    return f"{value:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
