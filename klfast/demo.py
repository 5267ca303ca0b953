"""The whole pipeline on one model: sweep, plan, quantize, compare, save, load back, generate. ``klfast demo``."""

from __future__ import annotations

import csv
import io
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

import klfast
from klfast.checkpoint import by_name
from klfast.core.dtypes import dtype_name
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.diagnostics.explain import explain
from klfast.models.linears import linears, other_bytes, row_parts, weight_bytes
from klfast.quant.spec import QuantSpec
from klfast.reporting.grouping import depth, kind
from klfast.reporting.sweep_tables import by_kind_and_depth, by_use
from klfast.reporting.table import Table
from klfast.sensitivity.results import Sensitivities
from klfast.text import token_batches

PROMPT = "It was a fine morning, and the old man"
HEADROOM = 1.05  # bytes that a mixed plan may have, against uniform INT4
INT4, INT4_FINE, INT4_COARSE, INT8 = QuantSpec(4, 64), QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(8, 64)
SPECS = (
    INT4_FINE,
    INT4,
    INT4_COARSE,
    INT8,
)  # the group size is a choice, too: half the group costs a quarter bit a weight
_KL = "kl_teacher_student"
BASELINE, MIXED = "full precision", "KL-planned mixed"


@dataclass(frozen=True)
class Effort:
    """How much text the demo uses: windows of calibration and of evaluation text, tokens in each, tokens to generate."""

    calibration_windows: int
    evaluation_windows: int
    length: int
    new_tokens: int


FULL = Effort(calibration_windows=8, evaluation_windows=96, length=256, new_tokens=80)
QUICK = Effort(calibration_windows=6, evaluation_windows=16, length=256, new_tokens=40)


@dataclass(frozen=True)
class Row:
    """One variant: bytes of the saved tensors, bits per weight of the linear layers (scales included), and on the
    evaluation text perplexity, mean KL(full precision || variant) in nats with its standard error (by windows), and how often both
    hold the same token likeliest.
    """

    variant: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    kl_stderr: float
    top1_agreement: float


@dataclass(frozen=True)
class DemoResult:
    """What the sweep found (tables, and sentences that sum them up), the variants, where the mixed model is, what it
    wrote, and under which conditions.
    """

    model: str
    sensitivities: tuple[Table, ...]
    findings: tuple[str, ...]
    rows: tuple[Row, ...]
    saved: str
    prompt: str
    continuation: str
    conditions: dict[str, object]

    def as_dict(self) -> dict:
        return asdict(self) | {"sensitivities": [table.data() for table in self.sensitivities]}


def run(
    name: str = "hymba",
    *,
    effort: Effort = FULL,
    out: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
    **loading_options: bool,
) -> DemoResult:
    """Run the pipeline on the model ``name`` (bundled, folder or hub id).

    Args:
        effort: FULL or QUICK.
        out: the folder to save the mixed model in, which must not exist; None for one in a new temporary folder.
        say: takes each sentence about what goes on.
        loading_options: local_files_only and trust_remote_code, as for ``klfast.checkpoint.by_name.load_model``.
    """
    tokenizer = by_name.load_tokenizer(name, **loading_options)
    model = by_name.load_model(name, "auto", **loading_options)
    dtype, vocabulary = model.dtype, model.get_input_embeddings().weight.shape[0]

    def text(which: str, count: int) -> list[torch.Tensor]:
        """``count`` windows from all over a bundled text, whose works differ in style."""
        windows = torch.cat(token_batches(which, tokenizer, vocab_size=vocabulary, length=effort.length))
        chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()
        return list(windows[chosen].split(4))

    calibration, evaluation = (
        text("calibration", effort.calibration_windows),
        text("evaluation", effort.evaluation_windows),
    )
    say(
        f"Model {name}: {len(linears(model))} linear layers, {model.num_parameters() / 1e6:.1f} M parameters, stored as {dtype_name(dtype)}. "
        f"Everything is computed in float32 on {_counted(torch.get_num_threads(), 'thread')}; sizes are those of the stored tensors."
    )
    say(
        f"Sweep: each layer alone in {', '.join(map(str, SPECS))}, on {_tokens(calibration)} tokens of calibration text."
    )
    swept = klfast.sweep(model, calibration, specs=SPECS, metrics=(_KL, "sqnr_db"))
    split = [layer for layer in linears(model) if row_parts(model, layer)]
    if split:
        say(
            f"Sweep: each use of the rows of {_counted(len(split), 'layer')} ({', '.join(dict.fromkeys(map(kind, split)))}) alone in {INT4}."
        )
        swept.rows.update(klfast.sweep(model, calibration, specs=(INT4,), metrics=(), layers=split, rows=True).rows)
    tables, findings = _sensitive(swept)
    uniform8, uniform4, fine4 = (klfast.plan(swept, method="uniform", spec=spec) for spec in (INT8, INT4, INT4_FINE))
    budget = int(HEADROOM * uniform4.predicted["bytes"])
    plans = {
        BASELINE: None,
        "uniform INT8": uniform8,
        "uniform INT4": uniform4,
        "uniform INT4, groups of 32": fine4,
        MIXED: klfast.plan(swept, max_bytes=budget),
        "SQNR-planned mixed": klfast.plan(swept, max_bytes=budget, metric="sqnr_db"),
    }
    chosen = Counter(map(str, plans[MIXED].specs.values()))
    say(
        f"Plan: at most {budget / 1e6:.3f} MB, which is uniform {INT4} plus {HEADROOM - 1:.0%}. "
        f"By KL: {', '.join(_counted(count, 'layer') + f' in {spec}' for spec, count in sorted(chosen.items()))}."
    )
    say(f"Compare on {_tokens(evaluation)} tokens of other text.")
    saved = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="klfast-demo-"), "mixed")
    rows = []
    teacher = model.float()
    for variant, plan in plans.items():
        model = by_name.load_model(name, "auto", **loading_options)
        if plan is not None:
            klfast.quantize_model(model, plan)
        if variant == MIXED:
            klfast.save_quantized(model, saved, tokenizer)
            model = klfast.load_quantized(saved)
        rows.append(_measure(variant, model, teacher, evaluation))
    say(f"The KL-planned model is in {saved}; its row was measured on the model as loaded back from there.")
    mixed = klfast.load_quantized(saved, dtype=torch.float32)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    new = klfast.generate(mixed, ids, effort.new_tokens, temperature=0.8, generator=torch.Generator().manual_seed(0))
    continuation = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return DemoResult(
        name,
        tables,
        findings,
        tuple(rows),
        str(saved),
        PROMPT,
        continuation,
        _conditions(effort, calibration, evaluation, dtype),
    )


def _sensitive(swept: Sensitivities) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Which kinds of layers are sensitive, at which depth, and which of their rows, in INT4: tables and sentences."""
    places, uses = by_kind_and_depth(swept, _KL, INT4), by_use(swept, _KL)
    *kinds, together = places.rows
    found = [
        f"Most sensitive within the blocks: {kinds[0][0]}. One layer in {INT4} costs, in nats: {_listed((row[0], row[-1]) for row in kinds)}.",
        f"By depth, over all kinds: {_listed(zip(places.headings[1:-1], together[1:-1], strict=True))}.",
    ]
    if outside := [
        (name, m.mean[_KL]) for (name, spec), m in swept.measurements.items() if spec == INT4 and depth(name) is None
    ]:
        found.append(f"Outside of the blocks: {_listed(outside)}.")
    for layer in dict.fromkeys(row[0] for row in uses.rows):
        parts = sorted(((use, kl) for of, use, kl in uses.rows if of == layer), key=lambda part: -part[1])
        found.append(f"Of {layer}'s rows, those for {parts[0][0]} are the most sensitive: {_listed(parts)}.")
    return tuple(table for table in (places, uses) if table.rows), tuple(found)


def _listed(costs: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {cost:.2g}" for name, cost in costs)


def _measure(variant: str, model: nn.Module, teacher: nn.Module, batches: list[torch.Tensor]) -> Row:
    layers = list(linears(model).values())
    matrices = [
        layer.quantized.nbytes if isinstance(layer, klfast.QuantLinear) else weight_bytes(layer) for layer in layers
    ]
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    total = sum(map(weight_bytes, layers)) + other_bytes(model)  # before the cast: as it is stored
    found = klfast.evaluate(model.float(), batches, teacher, progress=None)
    return Row(
        variant, total, 8 * sum(matrices) / weights, found.perplexity, found.kl, found.kl_stderr, found.top1_agreement
    )


def _conditions(
    effort: Effort, calibration: list[torch.Tensor], evaluation: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, object]:
    return {
        "uniform_groups_of": INT4.group_size,
        "stored_as": dtype_name(dtype),
        "calibration_tokens": _tokens(calibration),
        "evaluation_tokens": _tokens(evaluation),
        "window": effort.length,
        "machine": cpu_name(),
        "tier": explain("dequant_matmul").chosen,
        "threads": torch.get_num_threads(),
        "klfast": klfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_results(result: DemoResult, folder: str | os.PathLike) -> None:
    """Write the table as demo.md and demo.csv, the conditions with it, into an existing folder."""
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.conditions.items())
    found = [
        *(table.markdown() for table in result.sensitivities),
        *(f"- {sentence}" for sentence in result.findings),
        "",
    ]
    lines = [
        f"`klfast demo` on the model {result.model}.",
        "",
        *found,
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|---:" * (len(HEADINGS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result.rows]
    write_atomic(Path(folder, "demo.md"), "\n".join([*lines, "", f"Conditions: {facts}.", ""]))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", *(field.name for field in fields(Row)), *result.conditions])
    for row in result.rows:
        table.writerow([result.model, *asdict(row).values(), *result.conditions.values()])
    write_atomic(Path(folder, "demo.csv"), text.getvalue())


HEADINGS = ("variant", "MB", "bits/weight", "perplexity", "KL (nats)", "top-1 agreement")


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it, in the order of HEADINGS."""
    return (
        row.variant,
        f"{row.bytes / 1e6:.3f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.perplexity:.3f}",
        f"{row.kl:.5f} ± {row.kl_stderr:.5f}",
        f"{row.top1_agreement:.2%}",
    )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _tokens(batches: list[torch.Tensor]) -> int:
    return sum(batch.numel() for batch in batches)
