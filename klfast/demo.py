"""The whole pipeline on one model: sweep, plan, quantize, compare, save, load back, generate. ``klfast demo``."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

import klfast
from klfast.checkpoint import by_name
from klfast.core.dtypes import dtype_name
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.diagnostics.explain import explain
from klfast.models.linears import linears, row_parts
from klfast.models.matrices import matrices
from klfast.models.sizes import total_bytes
from klfast.models.vocabulary import vocabulary_size
from klfast.quant.spec import QuantSpec
from klfast.reporting.grouping import depth, kind
from klfast.reporting.sweep_tables import by_kind_and_depth, by_use
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.results import Sensitivities
from klfast.text import token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from klfast.core.loading_options import LoadingOptions
    from klfast.planning.plan_file import Plan

PROMPT = "It was a fine morning, and the old man"
HEADROOM = 1.05  # size limit of mixed plans, relative to uniform INT4
INT4, INT4_FINE, INT4_COARSE, INT8 = QuantSpec(4, 64), QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(8, 64)
SPECS = (INT4_FINE, INT4, INT4_COARSE, INT8)  # halving the group size costs a quarter bit per weight
_KL = "kl_teacher_student"
BASELINE, MIXED = "full precision", "KL-planned mixed"


@dataclass(frozen=True)
class Effort:
    """Amount of text: windows of calibration and evaluation text, tokens in each window, tokens to generate."""

    calibration_windows: int
    evaluation_windows: int
    length: int
    new_tokens: int


FULL = Effort(calibration_windows=8, evaluation_windows=96, length=256, new_tokens=80)
QUICK = Effort(calibration_windows=6, evaluation_windows=16, length=256, new_tokens=40)


@dataclass(frozen=True)
class Row:
    """One variant of the model.

    Attributes:
        variant: its name.
        bytes: of the saved tensors.
        bits_per_weight: of the linear layers, including scales.
        perplexity: on the evaluation text.
        kl: mean KL(full precision || variant), nats per token.
        kl_stderr: its standard error (by windows).
        top1_agreement: how often both models find the same token most likely.
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
    """Results of the demo.

    Attributes:
        model: its name.
        sensitivities: tables of the sweep.
        findings: sentences that summarise them.
        rows: the variants.
        saved: the folder of the mixed model.
        prompt: the prompt given to it.
        continuation: the text it generated.
        conditions: texts, machine and versions.
    """

    model: str
    sensitivities: tuple[Table, ...]
    findings: tuple[str, ...]
    rows: tuple[Row, ...]
    saved: str
    prompt: str
    continuation: str
    conditions: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        """Return the results for JSON."""
        return asdict(self) | {"sensitivities": [table.data() for table in self.sensitivities]}


def run(
    name: str = "hymba",
    *,
    effort: Effort = FULL,
    out: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
    **loading: Unpack[LoadingOptions],
) -> DemoResult:
    """Run the pipeline on a model.

    Args:
        name: a bundled model, a folder or a hub id.
        effort: FULL or QUICK.
        out: the folder to save the mixed model in, which must not exist; None for a new temporary folder.
        say: called with each sentence about the progress.
        loading: local_files_only and trust_remote_code, as for ``klfast.checkpoint.by_name.load_model``.
    """
    tokenizer = by_name.load_tokenizer(name, **loading)
    model = _load(name, **loading)
    dtype, vocabulary = model.dtype, vocabulary_size(model)
    calibration = _text("calibration", tokenizer, vocabulary, effort.length, effort.calibration_windows)
    evaluation = _text("evaluation", tokenizer, vocabulary, effort.length, effort.evaluation_windows)
    say(
        f"Model {name}: {len(linears(model))} linear layers, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"stored as {dtype_name(dtype)}. Everything is computed in float32 on "
        f"{_counted(torch.get_num_threads(), 'thread')}; sizes are those of the stored tensors."
    )
    swept = _sweep(model, calibration, say)
    tables, findings = _sensitive(swept)
    plans = _plans(swept, say)
    say(f"Compare on {_tokens(evaluation)} tokens of other text.")
    rows = []
    teacher = model.float()
    with _place(out) as saved:
        for variant, plan in plans.items():
            network: nn.Module = _load(name, **loading)
            if plan is not None:
                klfast.quantize_model(network, plan)
            if variant == MIXED:
                klfast.save_quantized(network, saved, tokenizer)
                network = klfast.load_quantized(saved)
            rows.append(_measure(variant, network, teacher, evaluation, swept))
            if plan is not None:
                predicted = f"KL {plan.predicted['kl']:.5f} predicted by the layers' sum"
                say(f"{variant}: {predicted}, {rows[-1].kl:.5f} measured.")
        say(f"The KL-planned model is in {saved}; its row was measured on the model as loaded back from there.")
        return DemoResult(
            name,
            tables,
            findings,
            tuple(rows),
            str(saved),
            PROMPT,
            _continuation(saved, tokenizer, effort.new_tokens),
            _conditions(effort, calibration, evaluation, dtype),
        )


@contextmanager
def _place(out: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the folder to save in; None for one in a new temporary folder, which an error or Ctrl-C removes."""
    if out is not None:
        yield Path(out)
        return
    made = tempfile.mkdtemp(prefix="klfast-demo-")
    try:
        yield Path(made, "mixed")
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _load(name: str, **loading: Unpack[LoadingOptions]) -> PreTrainedModel:
    return cast("PreTrainedModel", by_name.load_model(name, "auto", gguf="dense", **loading))


def _text(
    which: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, count: int
) -> list[torch.Tensor]:
    """Return ``count`` windows spread over a bundled text, whose works differ in style."""
    windows = torch.cat(token_batches(which, tokenizer, vocab_size=vocabulary, length=length))
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()
    return list(windows[chosen].split(4))


def _sweep(model: nn.Module, calibration: list[torch.Tensor], say: Callable[[str], None]) -> Sensitivities:
    """Measure each layer in SPECS and, where its rows have several uses, each use in INT4."""
    specs = ", ".join(map(str, SPECS))
    say(f"Sweep: each layer alone in {specs}, on {_tokens(calibration)} tokens of calibration text.")
    swept = klfast.sweep(model, calibration, specs=SPECS, metrics=(_KL, "sqnr_db"))
    split = [layer for layer in linears(model) if row_parts(model, layer)]
    if split:
        kinds = ", ".join(dict.fromkeys(map(kind, split)))
        say(f"Sweep: each use of the rows of {_counted(len(split), 'layer')} ({kinds}) alone in {INT4}.")
        swept.rows.update(klfast.sweep(model, calibration, specs=(INT4,), metrics=(), layers=split, rows=True).rows)
    return swept


def _plans(swept: Sensitivities, say: Callable[[str], None]) -> dict[str, Plan | None]:
    """Return the plan of each variant; None for full precision."""
    uniform8, uniform4, fine4 = (klfast.plan(swept, method="uniform", spec=spec) for spec in (INT8, INT4, INT4_FINE))
    budget = int(HEADROOM * uniform4.predicted["bytes"])
    mixed = klfast.plan(swept, max_bytes=budget)
    chosen = Counter(map(str, mixed.specs.values()))
    say(
        f"Plan: at most {budget / 1e6:.3f} MB, which is uniform {INT4} plus {HEADROOM - 1:.0%}. "
        f"By KL: {', '.join(_counted(count, 'layer') + f' in {spec}' for spec, count in sorted(chosen.items()))}."
    )
    return {
        BASELINE: None,
        "uniform INT8": uniform8,
        "uniform INT4": uniform4,
        "uniform INT4, groups of 32": fine4,
        MIXED: mixed,
        "SQNR-planned mixed": klfast.plan(swept, max_bytes=budget, metric="sqnr_db"),
    }


def _continuation(saved: Path, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> str:
    """Return the text with which the saved model continues PROMPT."""
    mixed = klfast.load_quantized(saved, dtype=torch.float32)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    new = klfast.generate(mixed, ids, new_tokens, temperature=0.8, generator=torch.Generator().manual_seed(0))
    text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _sensitive(swept: Sensitivities) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Return tables and sentences on how sensitive layers are in INT4, by kind, depth and use of their rows."""
    places, uses = by_kind_and_depth(swept, _KL, INT4), by_use(swept, _KL)
    *kinds, together = places.rows
    costs = [(row[0], row[-1]) for row in kinds]
    found = [
        f"Most sensitive within the blocks: {kinds[0][0]}. One layer in {INT4} costs, in nats: {_listed(costs)}.",
        f"By depth, over all kinds: {_listed(zip(places.headings[1:-1], together[1:-1], strict=True))}.",
    ]
    outside = {
        name: m.mean[_KL] for (name, spec), m in swept.measurements.items() if spec == INT4 and depth(name) is None
    }
    if outside:
        found.append(f"Outside of the blocks: {_listed(outside.items())}.")
    for layer in dict.fromkeys(row[0] for row in uses.rows):
        parts = sorted(_uses(uses, layer).items(), key=lambda part: -part[1])
        found.append(f"Of {layer}'s rows, those for {parts[0][0]} are the most sensitive: {_listed(parts)}.")
    return tuple(table for table in (places, uses) if table.rows), tuple(found)


def _uses(table: Table, layer: Cell) -> dict[str, float]:
    """Return the cost of each use of a layer's rows."""
    return {str(use): float(kl) for of, use, kl in table.rows if of == layer and kl is not None}


def _listed(costs: Iterable[tuple[object, Cell]]) -> str:
    return ", ".join(f"{name} {cost:.2g}" for name, cost in costs)


def _measure(
    variant: str, model: nn.Module, teacher: nn.Module, batches: list[torch.Tensor], swept: Sensitivities
) -> Row:
    held = list(matrices(model).values())
    weights = sum(math.prod(info.shape) for info in swept.layers.values())
    bits = 8 * sum(one.nbytes for one in held) / weights
    total = total_bytes(model)  # before the cast: as stored
    found = klfast.evaluate(model.float(), batches, teacher, progress=None)
    kl, kl_stderr, agreement = found.kl, found.kl_stderr, found.top1_agreement
    assert kl is not None and kl_stderr is not None and agreement is not None  # since there is a teacher
    return Row(variant, total, bits, found.perplexity, kl, kl_stderr, agreement)


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


def write_results(result: DemoResult, folder: str | os.PathLike[str]) -> None:
    """Write the table with its conditions as demo.md and demo.csv into an existing folder."""
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
    """Return a row's cells as text, in the order of HEADINGS."""
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
