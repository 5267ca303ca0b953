"""``klfast.sweep``: how much each linear layer's quantization changes the model's predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from klfast.core import lock
from klfast.core.errors import InvalidInputError
from klfast.core.progress import Progress
from klfast.models.adapters import refuse_adapters, uncompiled
from klfast.models.batches import Batches
from klfast.models.block_chain import Chain
from klfast.models.head import linear_head
from klfast.models.matrices import matrices
from klfast.models.selection import Patterns
from klfast.models.sizes import warn_unquantizable
from klfast.quant.spec import SCALES, QuantSpec
from klfast.sensitivity import inputs
from klfast.sensitivity.adaptive import PARTS, Schedule
from klfast.sensitivity.comparison import SAMPLED
from klfast.sensitivity.differences import Differences
from klfast.sensitivity.measure import Engine
from klfast.sensitivity.measurer import Measurer
from klfast.sensitivity.measuring_mode import prepared
from klfast.sensitivity.outcome import Outcome
from klfast.sensitivity.ray_connection import connected
from klfast.sensitivity.ray_measurer import RayMeasurer
from klfast.sensitivity.results import METRICS, Sensitivities
from klfast.sensitivity.resume_file import ResumeFile
from klfast.sensitivity.run import Run
from klfast.sensitivity.state import State
from klfast.sensitivity.steps import steps

_STACKED = {"exact": 4, "int8": 8}  # micro-batches that fit into max_batch_tokens: candidates that run as one batch
_BATCH_TOKENS, _FEWER = 8192, 4096  # the latter where they take as long


def sweep(
    model: nn.Module,
    batches: Batches,
    specs: QuantSpec | str | Sequence[QuantSpec | str] = ("int4-g64-sym", "int8-g64-sym"),
    metrics: str | Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    experts: bool = False,
    rows: bool = False,
    activations: bool = False,
    corrected: str | Sequence[str] = (),
    scale: str = "absmax",
    vocabulary: str | int | None = None,
    budget: str = "exhaustive",
    max_bytes: int | None = None,
    max_batch_tokens: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    suffix: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress = None,
) -> Sensitivities:
    """Measure each linear layer under each spec, alone, against the full-precision model; forward passes only.

    Every metric is a mean over the same tokens: all of a window except its last, which has no next token. Memory is
    bounded by ``max_batch_tokens``, not by the number of batches. The model is left as it was, even after an error.
    Layers that share a weight (Zamba's) are measured once, under the first of their names: it changes in all of them.
    Candidates that make a NaN or an infinity have no measurement; "not_finite" in the provenance names them.

    Args:
        model: a transformers causal language model whose blocks form a chain (Mamba, Mamba-2, FalconMamba, Hymba,
            Llama, Qwen3.5, LFM2, Granite-4.0-H and similar), and whose logits are a product with its head's weight,
            perhaps scaled, capped or with a bias.
        batches: calibration text: int64 token ids [N, T] with T >= 2, or an iterable of batches [B, T], windows [T], or
            dicts with input_ids and attention_mask (a tokenizer's output, a DataLoader). Padding is not text: every
            window is measured as if it were alone, without its padding. Grouping of windows makes no difference.
        specs: the precisions to try.
        metrics: which to report (of ``METRICS``); all that ``vocabulary`` gives by default. kl_teacher_student, which
            plans use, is always reported.
        resume: a file that keeps the state of the sweep, rewritten every few seconds (a step's intermediate results go
            to a second one beside it, RESUME.step). If it exists, the sweep continues from there and ends with the same
            measurements, bit for bit, as one that was never interrupted. ``Sensitivities.from_json`` reads it, finished
            or not.
        layers: the linear layers to measure; all of them by default, including the head, and of a mixture all experts'
            "gate_up_proj" (or "up_proj") as one layer, and "down_proj" as another. Each is a name, the end of one
            ("in_proj"), a glob ("layers.0.*") or "re:" and a regular expression. If the head is tied to the embedding,
            quantizing it changes the embedding, too.
        exclude: layers to leave out, chosen in the same way.
        experts: measure each expert of a mixture by itself, "...experts.gate_up_proj.17", not all of a layer as one, so
            that plans choose a precision for each. There are many: it takes as many times longer as a layer has
            experts, unless ``layers`` leaves some out. A pattern that names the stack names all of its experts.
        rows: also measure, into ``Sensitivities.rows``, each use that the rows of a fused layer are split between, such
            as the gate, input, B, C and step size in Mamba-2's in_proj, and each expert of a mixture (``layers`` can
            leave those out, which are many). Plans do not need it; it shows what hurts.
        activations: also measure, into ``Sensitivities.activations``, each layer with its weight exact and its input
            rounded to int8, in the groups of each spec. ``klfast.plan(activation="auto")`` needs it.
        corrected: uses of fused layers' rows, such as "dt" in Mamba-2's in_proj (``Sensitivities.rows`` has their
            names). Layers that have such rows are also measured with them corrected (``QuantSpec.corrected``), in each
            spec of 4 bits: one more choice for plans.
        scale: how scales are chosen, as in ``klfast.quantize``.
        vocabulary: "full" to compare all logits, or how many vocabulary entries a token to compare instead, half of
            them its likeliest, half drawn from the others; "sampled" for 128. Gives kl_teacher_student and delta_ce
            alone, with an error of sampling that is far below the standard error over windows, and part of it.
            Candidates above 0.1 nat, those of which the sample is not sure, and the quantized head are compared in
            full. The same text has the same sample in every sweep. By default "full", of adaptive sweeps "sampled".
        budget: "exhaustive" to measure every layer under every spec on all of the text, or "adaptive" for at most a
            tenth of that work (of texts of at least 10 windows): one spec a layer on a part of the text, from which the
            others follow by the squared errors of their weights, then what plans still depend on, in its own right and
            on more of the text. Gives kl_teacher_student and delta_ce; ``Measurement.is_derived`` marks what was not
            measured.
        max_bytes: of the plan that an adaptive sweep is for, as in ``klfast.plan``; by default plans of 1.05, 1.2 and
            1.5 times the smallest size.
        max_batch_tokens: most tokens that go through a block at a time (but at least one window). By default 8192, or
            4096 for suffixes in int8 and for exhaustive sweeps on the CPU.
        dtype: the dtype to compute in if the model's floating-point weights are smaller. None for the model's own,
            which takes less memory but raises the noise floor, at 8 bits mostly above the signal.
        suffix: how candidates go through the blocks behind their own. "exact" as the teacher does, or "int8": large
            linear layers multiply what differs from the teacher in int8, and add it to the teacher's result, which
            changed KLs of the bundled models by 0.3 % at most, and takes less time on CPUs with AVX-VNNI, AVX-512-VNNI
            or AMX, but memory for the teacher's results. By default "int8" there if the vocabulary is sampled, else
            "exact".
        engine: "local" to measure in this process, or "ray" on a Ray cluster (``pip install 'klfast[ray]'``): the one
            that this process is connected to, else that at RAY_ADDRESS, else one that starts here. Each worker computes
            with as many threads as this process would; results are the same for any number of workers, and those of
            "local" with as many threads on such a CPU. The model must be on the CPU.
        workers: most that measure at a time, with "ray"; by default as many as the cluster has CPUs for.
        progress: True or None for a bar on stderr if that is a terminal, else for a line every half a minute; False for
            nothing; or a function that is called with (done, total, what was just measured).

    Raises:
        InvalidInputError: batches, specs, metrics or layers are missing or invalid; the model is not a chain, is
            already quantized or has adapters; a layer, which is named, lies outside the blocks, or cannot be rounded to
            a spec; the full-precision model's hidden states or logits are NaN or infinite; the resume file belongs to a
            sweep with other arguments, or another process is working on it.
        UnknownLayerError: an entry of ``layers`` or ``exclude`` matches none of the model's.
        ModelMismatchError: the resume file belongs to another model.
        CheckpointError: the resume file is damaged or not a resume file.
        ClusterError: there is no Ray cluster at RAY_ADDRESS, or it went away; the resume file keeps what was measured.
    """
    model = uncompiled(model)
    refuse_adapters(model)
    parsed = inputs.parse_specs(specs)
    inputs.check_engine(engine, workers)
    corrected = inputs.uses(corrected)
    is_adaptive = inputs.is_adaptive(budget, max_bytes, beside=rows or activations or bool(corrected))
    if vocabulary is None:
        vocabulary = "sampled" if is_adaptive else "full"
    vocabulary_rows = inputs.vocabulary_rows(vocabulary, inputs.vocabulary(model))
    is_partial = is_adaptive or vocabulary_rows is not None
    reported = inputs.choose_metrics(metrics, SAMPLED if is_partial else METRICS)
    if scale not in SCALES:
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    blank = Sensitivities.of(model, experts)  # before ``prepared`` changes dtypes, and with them the bytes
    names = inputs.choose_layers(model, layers, exclude, experts)
    assert blank.fingerprint is not None  # ``of`` makes one
    inputs.refuse_damaged(matrices(model), blank.fingerprint.norms)
    if layers is None:
        warn_unquantizable(model, "sweep")
    parts = PARTS if is_adaptive else 1
    suffix = inputs.suffix(suffix, model, dtype, is_sampled=vocabulary_rows is not None)
    if max_batch_tokens is None:
        takes_fewer = suffix == "int8" or (not is_adaptive and linear_head(model).weight.device.type == "cpu")
        max_batch_tokens = _FEWER if takes_fewer else _BATCH_TOKENS
    most_tokens = max_batch_tokens // _STACKED[suffix]
    windows = inputs.micro_batches(batches, inputs.vocabulary(model), most_tokens, parts)

    with prepared(model, dtype):
        chain = Chain(model)
        settings = {
            "specs": [str(spec) for spec in parsed],
            "layers": names,
            "rows": rows,
            "activations": activations,
            "calibration": inputs.digest(windows),
            "scale": scale,
            "vocabulary": vocabulary_rows or "full",
            "max_batch_tokens": max_batch_tokens,
            "dtype": str(chain.head.dtype),
            "suffix": suffix,
            "budget": budget,
            "max_bytes": max_bytes,
            "corrected": corrected,
        }
        order = steps(chain, names, parsed, rows, activations, corrected)
        differences = Differences(chain.blocks) if suffix == "int8" else None
        measuring = Engine(chain, scale, max_batch_tokens, vocabulary_rows, differences)
        schedule = None
        if is_adaptive:
            sizes = blank.layers, blank.other_bytes, max_bytes, len(chain.blocks)
            schedule = Schedule(order, *sizes, len(windows), scale)
        state = State(order, [len(ids) for ids in windows], len(chain.blocks), schedule)
        outcome = Outcome(blank, settings, reported, measuring, state)
        with ExitStack() as stack:
            stack.enter_context(lock.held(resume))
            local = Measurer(measuring, order, windows)
            if engine == "ray":
                stack.enter_context(connected())
            measurer = RayMeasurer(local, workers) if engine == "ray" else local
            return Run(outcome, measurer, windows, ResumeFile(resume, outcome)).finish(progress)
