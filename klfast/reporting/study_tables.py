"""Tables of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, median

from klfast.evaluation.study_results import Agreement, Alone, Study
from klfast.evaluation.windowed import Estimate
from klfast.reporting.grouping import depth, kind
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.coverage import left_out_note


def study_tables(study: Study, top: int = 10) -> list[Table]:
    """Return how each metric agrees with measured perplexity, and which layers, kinds and blocks cost most of it.

    Before these comes a table of notes, if there is anything to note.
    """
    notes: tuple[tuple[Cell, ...], ...] = tuple((note,) for note in _notes(study))
    rows = [_row(spec, one) for spec in study.specs for one in study.agreements(spec)]
    headings = ("spec", "metric", "Kendall's tau", "Spearman's rho", "tau less KL's", "tau between halves")
    return [
        *([Table("How it was measured", ("note",), notes)] if notes else []),
        Table("Agreement with measured perplexity, over all layers", headings, tuple(rows)),
        Table(
            "ln(perplexity) that one layer adds: the most",
            ("spec", "layer", "added"),
            tuple((spec, name, value) for spec, alone in study.specs.items() for name, value in _worst(alone, top)),
        ),
        _by("kind", study.specs, kind),
        _by("block", study.specs, depth),
    ]


def _notes(study: Study) -> Iterator[str]:
    if note := left_out_note(study.provenance):
        yield note
    for spec, alone in study.specs.items():
        if len(alone.layers) == 1:
            yield f"{spec} was measured on {alone.layers[0]} alone; a ranking needs two layers or more"


def _row(spec: str, one: Agreement) -> tuple[Cell, ...]:
    halves = None if one.halves is None else f"{one.halves:.2f}"
    return spec, one.metric, _text(one.tau), _text(one.rho), _text(one.gain), halves


def _text(figure: Estimate | None) -> str | None:
    """Return a figure with its interval: "0.84 (0.79 to 0.89)"."""
    if figure is None:
        return None
    known = figure.low is not None and figure.high is not None
    return f"{figure.value:.2f}" + (f" ({figure.low:.2f} to {figure.high:.2f})" if known else "")


def _worst(alone: Alone, top: int) -> list[tuple[str, float]]:
    added = zip(alone.layers, alone.perplexity.mean(0).tolist(), strict=True)
    return sorted(added, key=lambda layer: -layer[1])[:top]


def _by(heading: str, specs: Mapping[str, Alone], key: Callable[[str], str | int | None]) -> Table:
    """Return mean and median of what a layer adds, for the layers of which ``key`` says the same."""
    groups: dict[str, dict[str, list[float]]] = {}
    for spec, alone in specs.items():
        for name, value in zip(alone.layers, alone.perplexity.mean(0).tolist(), strict=True):
            group = key(name)
            groups.setdefault("outside" if group is None else str(group), {}).setdefault(spec, []).append(value)
    rows: list[tuple[Cell, ...]] = []
    for group, found in groups.items():
        held = [found.get(spec) for spec in specs]
        rows.append((group, *(of(values) if values else None for values in held for of in (fmean, median))))
    headings = [f"{spec}, {of}" for spec in specs for of in ("mean", "median")]
    return Table(f"ln(perplexity) that one layer adds, by {heading}", (heading, *headings), tuple(rows))
