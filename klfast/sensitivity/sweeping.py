"""``klfast.sweep``: how much each linear layer's quantization changes what the model predicts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from klfast import __version__, signed_json
from klfast.batches import Batches
from klfast.errors import CheckpointError, InvalidInputError, ModelMismatchError
from klfast.models.adapters import refuse_adapters
from klfast.models.chain import Chain
from klfast.models.layers import is_head_tied, linears, row_parts
from klfast.models.selection import Patterns
from klfast.progress import Progress, reporter
from klfast.sensitivity import inputs
from klfast.sensitivity.engine import COLUMNS, Candidate, Engine, Teacher
from klfast.sensitivity.prepared import prepared
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities
from klfast.tally import Tally
from klfast.types import QuantSpec

NOISE_MULTIPLE = 10  # a KL below this many noise floors is more than a tenth noise
_KL = METRICS[0]
_SAVE_SECONDS = 10.0
_STACKED = 4  # micro-batches that fit into max_batch_tokens, so that several candidates run as one batch


def sweep(
    model: nn.Module,
    batches: Batches,
    specs: QuantSpec | str | Sequence[QuantSpec | str] = ("int4-g64-sym", "int8-g64-sym"),
    metrics: str | Sequence[str] = METRICS,
    resume: str | os.PathLike[str] | None = None,
    *,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    rows: bool = False,
    scale: str = "absmax",
    max_batch_tokens: int = 8192,
    dtype: torch.dtype | None = torch.float32,
    progress: Progress = None,
) -> Sensitivities:
    """Measure each linear layer under each spec, alone, against the full-precision model; forward passes only.

    Every metric is a mean over the same tokens: all of a window but its last, which has no next token. Memory is
    bounded by ``max_batch_tokens``, not by the number of batches. The model is left as it was, also after an error.

    Args:
        model: a transformers causal language model whose blocks form a chain (Mamba, Mamba-2, FalconMamba, Hymba,
            Llama and its like).
        batches: calibration text: int64 token ids [N, T] with T >= 2, or an iterable of batches [B, T], windows [T], or
            dicts with input_ids and attention_mask (a tokenizer's output, a DataLoader). Pads are no text: every window
            is measured as if it were alone, without its padding. How windows are grouped makes no difference.
        specs: the precisions to try.
        metrics: which to report (of ``METRICS``); kl_teacher_student, which plans go by, is reported in any case.
        resume: a file that keeps the state of the sweep, rewritten every few seconds. If it exists, the sweep goes on
            from there and ends with the measurements, bit for bit, of one that was never interrupted.
            ``Sensitivities.from_json`` reads it, finished or not.
        layers: the linear layers to measure; all of them by default, the head included. Each is a name, the end of one
            ("in_proj"), a glob ("layers.0.*") or "re:" and a regular expression. If the head is tied to the embedding,
            quantizing it changes the embedding, too.
        exclude: layers to leave out, chosen in the same way.
        rows: also measure, into ``Sensitivities.rows``, each use that the rows of one layer are split between, such as the
            queries, keys, values, input and gate in Hymba's in_proj. Plans do not need it; it shows which part hurts.
        scale: how scales are chosen, as in ``klfast.quantize``.
        max_batch_tokens: at most so many tokens go through a block at a time (but at least one window).
        dtype: what a model with smaller floating-point weights computes in meanwhile. None for the model's own dtype,
            which takes less memory but raises the noise floor, at 8 bits mostly above the signal.
        progress: True or False for a progress bar on stderr or none, None for one on a terminal; or a function that
            is called with (done, total, what was just measured).

    Raises:
        InvalidInputError: no or unfit batches, specs, metrics or layers; a model that is no chain, is quantized
            already, has adapters, or shares a weight between layers; a NaN or infinity, with the layer that makes it; a resume
            file of a sweep with other arguments.
        UnknownLayerError: an entry of ``layers`` or ``exclude`` matches none of the model's.
        ModelMismatchError: a resume file of another model.
        CheckpointError: a damaged resume file, or a file that is none.
    """
    specs = inputs.parse_specs(specs)
    reported = inputs.choose_metrics(metrics)
    if scale not in ("absmax", "mse"):
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    refuse_adapters(model)
    blank = Sensitivities.of(model)  # its bytes are those of the model as it came
    names = inputs.choose_layers(model, layers, exclude)
    inputs.refuse_shared(model, names)
    inputs.refuse_damaged(blank.layers, blank.fingerprint.norms)
    windows = inputs.micro_batches(batches, inputs.vocabulary(model), max_batch_tokens // _STACKED)

    with prepared(model, dtype):
        chain = Chain(model)
        settings = {
            "specs": [str(spec) for spec in specs],
            "layers": names,
            "rows": rows,
            "calibration": inputs.digest(windows),
            "scale": scale,
            "max_batch_tokens": max_batch_tokens,
            "dtype": str(chain.head.weight.dtype),
        }
        run = _Run(blank, Engine(chain, scale, max_batch_tokens), windows, _groups(chain, names, specs, rows), settings, reported, resume)
        return run.finish(progress)


@dataclass(frozen=True)
class _Group:
    """Candidates that are measured together, between two saves.

    Attributes:
        place: the block that their layers lie in, or "head"; "noise" for the noise floor, which has no candidates.
        first: their first row in the tally.
    """

    place: int | str
    candidates: tuple[Candidate, ...]
    first: int

    @property
    def rows(self) -> int:
        return len(self.candidates) or 1

    @property
    def name(self) -> str:
        return f"block {self.place}" if isinstance(self.place, int) else self.place


def _groups(chain: Chain, names: Sequence[str], specs: Sequence[QuantSpec], rows: bool) -> list[_Group]:
    """The noise floor, then the candidates of each block, then those of the head."""
    modules = linears(chain.model)
    at: dict[int | str, list[Candidate]] = {index: [] for index in range(len(chain.blocks))} | {"head": []}
    for name in names:
        place = "head" if modules[name] is chain.head else chain.block_of(name)
        if place is None:
            raise InvalidInputError(f"{name} lies in no block and is not the head; leave it out of `layers`")
        at[place] += [Candidate(name, modules[name], spec) for spec in specs]
        for use, part in row_parts(chain.model, name).items() if rows else ():
            at[place] += [Candidate(name, modules[name], spec, use, part) for spec in specs]
    groups = [_Group("noise", (), 0)]
    for place, candidates in at.items():
        if candidates:
            groups.append(_Group(place, tuple(candidates), groups[-1].first + groups[-1].rows))
    return groups


class _Run:
    """The loop over micro-batches and groups, and what it has found so far."""

    def __init__(
        self,
        blank: Sensitivities,
        engine: Engine,
        windows: Sequence[torch.Tensor],
        groups: Sequence[_Group],
        settings: dict[str, object],
        reported: Sequence[str],
        path: str | os.PathLike[str] | None,
    ) -> None:
        self.blank, self.engine, self.windows, self.groups = blank, engine, windows, groups
        self.settings, self.reported, self.path = settings, reported, path
        self.rows = groups[-1].first + groups[-1].rows
        self.tally = Tally(self.rows, len(COLUMNS))
        self.micro_batch, self.group = 0, 0  # what comes next
        if path is not None and os.path.exists(path):
            self._load()

    def finish(self, progress: Progress) -> Sensitivities:
        self._save()  # a path that cannot be written is better found out now
        done = self.micro_batch * self.rows + (self.groups[self.group].first if self.micro_batch < len(self.windows) else 0)
        with reporter(progress, "sweep", len(self.windows) * self.rows, done) as advance:
            while self.micro_batch < len(self.windows):
                self._measure_micro_batch(advance)
        return self._result()

    def _measure_micro_batch(self, advance) -> None:
        ids = self.windows[self.micro_batch].to(self.engine.chain.head.weight.device)
        teacher = self.engine.teach(ids)
        saved = time.monotonic()
        for group in self.groups[self.group :]:
            self.tally.add(group.first, self._measure(teacher, group), ids.shape[1] - 1)
            self.group += 1
            if time.monotonic() > saved + _SAVE_SECONDS and self.group < len(self.groups):
                self._save()
                saved = time.monotonic()
            if self.group == len(self.groups):
                self.micro_batch, self.group = self.micro_batch + 1, 0
                self._save()
            advance(group.rows, group.name)

    def _measure(self, teacher: Teacher, group: _Group) -> torch.Tensor:
        if group.place == "noise":
            return self.engine.measure_noise(teacher, seed=self.micro_batch)
        if group.place == "head":
            return self.engine.measure_head(teacher, group.candidates, is_head_tied(self.engine.chain.model))
        return self.engine.measure_block(teacher, group.place, group.candidates)

    def _result(self) -> Sensitivities:
        """What has been measured so far."""
        floor, provenance = {}, self._provenance()
        if self.tally.tokens(0):
            floor, ce_teacher = self._metrics(self.tally.mean(0)), self.tally.mean(0)[COLUMNS.index("ce_teacher")]
            if math.isfinite(ce_teacher):
                provenance["ce_teacher"] = ce_teacher
        measurements, rows = {}, {}
        for group in self.groups:
            for row, candidate in enumerate(group.candidates, group.first):
                if tokens := self.tally.tokens(row):
                    mean = self._metrics(self.tally.mean(row))
                    below = mean[_KL] < NOISE_MULTIPLE * floor[_KL]
                    measurement = Measurement(mean, self._metrics(self.tally.stderr(row)), tokens, below)
                    if candidate.use is None:
                        measurements[candidate.name, candidate.spec] = measurement
                    else:
                        rows[candidate.name, candidate.use, candidate.spec] = measurement
        return replace(self.blank, measurements=measurements, rows=rows, noise_floor=floor, provenance=provenance)

    def _metrics(self, values: Sequence[float]) -> dict[str, float]:
        return {name: value for name, value in zip(COLUMNS, values, strict=True) if name in self.reported}

    def _provenance(self) -> dict[str, object]:
        model = self.engine.chain.model
        return {
            "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
            "family": type(model).__name__,
            "windows": sum(len(ids) for ids in self.windows),
            "micro_batches": [self.micro_batch, len(self.windows)],
            "calibration_sha256": self.settings["calibration"],
            "scale": self.settings["scale"],
            "dtype": self.settings["dtype"],
            "klfast": __version__,
            "torch": torch.__version__,
            # Seconds by stage, and what ran, in tokens through the whole network (without the head).
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.engine.seconds.items()},
            "token_forwards": round(self.engine.block_tokens / len(self.engine.chain.blocks)),
        }

    def _save(self) -> None:
        if self.path is not None:
            state = {
                "settings": self.settings,
                "next": [self.micro_batch, self.group],
                "sums": self.tally.to_data(),
                "seconds": self.engine.seconds,
                "block_tokens": self.engine.block_tokens,
            }
            self._result().to_json(self.path, extra={"sweep": state})

    def _load(self) -> None:
        """Go on where the resume file stopped, if it is that of a sweep with the same arguments."""
        remedy = "to start anew delete it (--no-resume), or give `resume` another path"
        data, origin = signed_json.read(self.path, "a sweep's state", remedy, verified=False)
        before = Sensitivities.from_data(data, origin, remedy)
        state = data.get("sweep")
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path} is not the resume file of a sweep; {remedy}")
        if before.fingerprint is None or not before.fingerprint.matches(self.blank.fingerprint):
            raise ModelMismatchError(f"{self.path} is the resume file of another model's sweep; {remedy}")
        try:
            for name, value in self.settings.items():
                if state["settings"][name] != value:
                    raise InvalidInputError(f"{self.path} is the resume file of a sweep with other {name}; {remedy}")
            self.micro_batch, self.group = map(int, state["next"])
            if not (0 <= self.micro_batch <= len(self.windows) and 0 <= self.group < len(self.groups)):
                raise CheckpointError(f"it stops at step {state['next']}")
            self.tally.load(state["sums"])
            self.engine.seconds.update({stage: float(state["seconds"][stage]) for stage in self.engine.seconds})
            self.engine.block_tokens = int(state["block_tokens"])
            signed_json.verify(data, origin, remedy)
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise CheckpointError(f"{self.path} is damaged ({error}); {remedy}") from error
