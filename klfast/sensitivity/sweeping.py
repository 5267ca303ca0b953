"""``klfast.sweep``: how much each linear layer's quantization changes the model's predictions."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from klfast import __version__
from klfast.core import signed_json
from klfast.core.errors import CheckpointError, InvalidInputError, ModelMismatchError
from klfast.core.progress import Progress, reporter
from klfast.core.window_stats import WindowStats
from klfast.models.adapters import refuse_adapters
from klfast.models.batches import Batches
from klfast.models.block_chain import Chain
from klfast.models.head import is_head_tied
from klfast.models.selection import Patterns
from klfast.models.sizes import warn_unquantizable
from klfast.quant.spec import QuantSpec
from klfast.sensitivity import inputs, lock, unfinished
from klfast.sensitivity.adaptive import ALLOWED, PARTS, Schedule
from klfast.sensitivity.measure import COLUMNS, SAMPLED, Engine, Teacher
from klfast.sensitivity.measuring_mode import prepared
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities
from klfast.sensitivity.steps import Step, from_group, steps
from klfast.sensitivity.unfinished import Unfinished

NOISE_MULTIPLE = 10  # a KL below this many noise floors is more than a tenth noise
_KL = METRICS[0]
_SAVE_SECONDS = 10.0
_SAVES_ARE = 2.0  # a save that takes 5 s is made every 100 s: at most a twentieth of the time
# Settings of sweeps whose resume files do not name them yet.
_BEFORE = {"activations": False, "vocabulary": "full", "budget": "exhaustive", "max_bytes": None}
_STACKED = 4  # micro-batches that fit into max_batch_tokens, so that several candidates run as one batch


def sweep(
    model: nn.Module,
    batches: Batches,
    specs: QuantSpec | str | Sequence[QuantSpec | str] = ("int4-g64-sym", "int8-g64-sym"),
    metrics: str | Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    rows: bool = False,
    activations: bool = False,
    scale: str = "absmax",
    vocabulary: str | int | None = None,
    budget: str = "exhaustive",
    max_bytes: int | None = None,
    max_batch_tokens: int = 8192,
    dtype: torch.dtype | None = torch.float32,
    progress: Progress = None,
) -> Sensitivities:
    """Measure each linear layer under each spec, alone, against the full-precision model; forward passes only.

    Every metric is a mean over the same tokens: all of a window except its last, which has no next token. Memory is
    bounded by ``max_batch_tokens``, not by the number of batches. The model is left as it was, even after an error.
    Layers that share a weight (Zamba's) are measured once, under the first of their names: it changes in all of them.

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
        rows: also measure, into ``Sensitivities.rows``, each use that the rows of a fused layer are split between, such
            as the gate, input, B, C and step size in Mamba-2's in_proj, and each expert of a mixture (``layers`` can
            leave those out, which are many). Plans do not need it; it shows what hurts.
        activations: also measure, into ``Sensitivities.activations``, each layer with its weight exact and its input
            rounded to int8, in the groups of each spec. ``klfast.plan(activation="auto")`` needs it.
        scale: how scales are chosen, as in ``klfast.quantize``.
        vocabulary: "full" to compare all logits, or how many vocabulary entries a token to compare instead, half of
            them its likeliest, half drawn from the others; "sampled" for 128. Gives kl_teacher_student and delta_ce
            alone, with an error of sampling that is far below the standard error over windows, and part of it.
            Candidates above 0.1 nat, those of which the sample is not sure, and the quantized head are compared in
            full. The same text has the same sample in every sweep. By default "full", of adaptive sweeps "sampled".
        budget: "exhaustive" to measure every layer under every spec on all of the text, or "adaptive" for at most a
            tenth of that work: one spec a layer on a part of the text, from which the others follow by the squared
            errors of their weights, then what plans still depend on, in its own right and on more of the text. Gives
            kl_teacher_student and delta_ce; ``Measurement.is_derived`` marks what was not measured.
        max_bytes: of the plan that an adaptive sweep is for, as in ``klfast.plan``; by default plans of 1.05, 1.2 and
            1.5 times the smallest size.
        max_batch_tokens: most tokens that go through a block at a time (but at least one window).
        dtype: the dtype to compute in if the model's floating-point weights are smaller. None for the model's own,
            which takes less memory but raises the noise floor, at 8 bits mostly above the signal.
        progress: True or None for a bar on stderr if that is a terminal, else for a line every half a minute; False for
            nothing; or a function that is called with (done, total, what was just measured).

    Raises:
        InvalidInputError: batches, specs, metrics or layers are missing or invalid; the model is not a chain, is
            already quantized or has adapters; a layer, which is named, lies outside the blocks, or makes a NaN or
            infinity; the resume file belongs to a sweep with other arguments, or another process is working on it.
        UnknownLayerError: an entry of ``layers`` or ``exclude`` matches none of the model's.
        ModelMismatchError: the resume file belongs to another model.
        CheckpointError: the resume file is damaged or not a resume file.
    """
    refuse_adapters(model)
    parsed = inputs.parse_specs(specs)
    is_adaptive = inputs.is_adaptive(budget, max_bytes, beside=rows or activations)
    vocabulary_rows = inputs.vocabulary_rows(
        vocabulary or ("sampled" if is_adaptive else "full"), inputs.vocabulary(model)
    )
    is_partial = is_adaptive or vocabulary_rows is not None
    reported = inputs.choose_metrics(metrics, SAMPLED if is_partial else METRICS)
    if scale not in ("absmax", "mse"):
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    blank = Sensitivities.of(model)  # before ``prepared`` changes dtypes, and with them the bytes
    names = inputs.choose_layers(model, layers, exclude)
    assert blank.fingerprint is not None  # ``of`` makes one
    inputs.refuse_damaged(blank.layers, blank.fingerprint.norms)
    if layers is None:
        warn_unquantizable(model, "sweep")
    parts = PARTS if is_adaptive else 1
    windows = inputs.micro_batches(batches, inputs.vocabulary(model), max_batch_tokens // _STACKED, parts)

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
            "budget": budget,
            "max_bytes": max_bytes,
        }
        order = steps(chain, names, parsed, rows, activations)
        engine = Engine(chain, scale, max_batch_tokens, vocabulary_rows)
        schedule = None
        if is_adaptive:
            sizes = blank.layers, blank.other_bytes, max_bytes, len(chain.blocks)
            schedule = Schedule(order, *sizes, len(windows), scale)
        run = _Run(blank, engine, windows, order, settings, reported, resume, schedule)
        with nullcontext() if resume is None else lock.held(resume):
            return run.finish(progress)


class _Run:
    """The loop over micro-batches and steps, and its results so far."""

    def __init__(
        self,
        blank: Sensitivities,
        engine: Engine,
        windows: Sequence[torch.Tensor],
        steps: Sequence[Step],
        settings: dict[str, object],
        reported: Sequence[str],
        path: str | os.PathLike[str] | None,
        schedule: Schedule | None,
    ) -> None:
        self.blank, self.engine, self.windows, self.steps = blank, engine, windows, steps
        self.settings, self.reported, self.path = settings, reported, None if path is None else os.fspath(path)
        self.rows = steps[-1].first + steps[-1].rows
        # Work before each step; the last entry is that of a whole micro-batch.
        self.work = list(accumulate((step.work for step in steps), initial=0.0))
        self.tally = WindowStats(self.rows, len(COLUMNS))
        self.schedule = schedule
        # Of each row: the number of micro-batches (the first ones) that it has had, and is to have after this round.
        self.had: dict[int, int] = {}
        self.goals = dict.fromkeys(range(self.rows), len(windows)) if schedule is None else schedule.first()
        self.micro_batch, self.step = 0, 0  # the next ones
        self.unfinished: Unfinished | None = None  # state within that step
        self.is_saved, self.save_at = False, 0.0
        self.advance: Callable[..., None] = lambda *_: None

    def finish(self, progress: Progress) -> Sensitivities:
        if self.path is not None and os.path.exists(self.path):
            self._load(self.path)
        self._save()  # so that a path that cannot be written is found out now
        self.engine.pause = self._pause
        try:
            with reporter(progress, "sweep", self._total(), self._done()) as self.advance:
                self.advance(0, "", self._share(self.unfinished))
                while True:
                    while self.micro_batch < len(self.windows):
                        self._measure_micro_batch()
                    if not self._start_round():
                        break
        except KeyboardInterrupt:
            self._save(and_unfinished=True)
            raise
        if self.path is not None:
            Path(self._beside).unlink(missing_ok=True)
        return self._result()

    def _start_round(self) -> bool:
        """Go through the text again for what an adaptive sweep needs more of; False if that is nothing."""
        if self.schedule is None:
            return False
        self.had = {**self.had, **self.goals}
        self.goals = self.schedule.following(self.tally, self.had)
        if self.goals:
            self.micro_batch, self.step = 0, 0
        self.is_saved = False
        self._save()
        return bool(self.goals)

    def _due(self, step: Step) -> tuple[Step, list[int]]:
        """Return a step's candidates, and their rows, that the current micro-batch is to be measured on."""
        rows = [
            row
            for row in range(step.first, step.first + step.rows)
            if self.had.get(row, 0) <= self.micro_batch < self.goals.get(row, 0)
        ]
        return replace(step, candidates=tuple(step.candidates[r - step.first] for r in rows if step.candidates)), rows

    def _measure_micro_batch(self) -> None:
        teacher = None
        for step in self.steps[self.step :]:
            due, rows = self._due(step)
            if rows:
                teacher = teacher or self._teach()
                sums = self._measure(teacher, due, self.unfinished)
                self._require_finite(due, sums)
                for row, of_row in zip(rows, sums.split(1), strict=True):
                    self.tally.add(row, of_row, teacher.passage.input_ids.shape[1] - 1)
                self.is_saved = False
            self.step, self.unfinished = self.step + 1, None
            if self.step == len(self.steps):
                self.micro_batch, self.step = self.micro_batch + 1, 0
            if not self.is_saved and (self.step == 0 or time.monotonic() >= self.save_at):
                self._save()
            if rows:
                self.advance(len(rows), step.name, self._share())

    def _teach(self) -> Teacher:
        return self.engine.teach(self.windows[self.micro_batch].to(self.engine.chain.head.device))

    def _total(self) -> int:
        """Return the number of measurements, at most."""
        every = len(self.windows) * self.rows
        return every if self.schedule is None else max(len(self.schedule.first()), math.ceil(ALLOWED * every))

    def _done(self) -> int:
        """Return the number of measurements so far."""
        under_way = sum(
            max(0, min(goal, self.micro_batch + self._is_before(row)) - self.had.get(row, 0))
            for row, goal in self.goals.items()
        )
        return sum(self.had.values()) + under_way

    def _is_before(self, row: int) -> bool:
        return self.micro_batch < len(self.windows) and row < self.steps[self.step].first

    def _measure(self, teacher: Teacher, step: Step, unfinished: Unfinished | None) -> torch.Tensor:
        if step.place == "noise":
            return self.engine.measure_noise(teacher, self.micro_batch, unfinished)
        if isinstance(step.place, int):
            return self.engine.measure_block(teacher, step.place, step.candidates, unfinished)
        (head,) = step.candidates
        return self.engine.measure_head(teacher, head, is_head_tied(self.engine.chain.model), unfinished)

    def _require_finite(self, step: Step, sums: torch.Tensor) -> None:
        """Raise InvalidInputError, naming the candidate, for a sum that is NaN or infinite: files cannot hold it."""
        broken = (~sums.isfinite()).nonzero()
        if len(broken):
            row, column, _ = broken[0].tolist()
            who = step.candidates[row] if step.candidates else "the noise floor"
            raise InvalidInputError(
                f"{COLUMNS[column]} of {who} is NaN or infinite; leave this layer out of `layers`, or sweep other specs"
            )

    def _pause(self, unfinished: Unfinished) -> None:
        """Save if it is time, and report progress, between two blocks of a step."""
        if self.path is not None:
            self.unfinished = unfinished
            if time.monotonic() >= self.save_at:
                self._save(and_unfinished=True)
        step = self.steps[self.step]
        self.advance(0, step.name, self._share(unfinished))

    def _share(self, unfinished: Unfinished | None = None) -> float:
        """Return the share of the work that is done, 0 to 1."""
        if self.schedule is not None:
            return min(1.0, self._done() / self._total())
        done = self.micro_batch * self.work[-1] + self.work[self.step]
        if unfinished is not None:
            step, windows = self.steps[self.step], len(self.windows[self.micro_batch])
            under_way = len(unfinished.carry.hidden) / windows * unfinished.block / len(self.engine.chain.blocks)
            done += step.work * min(1.0, (len(unfinished.finals) + under_way) / step.rows)
        return done / (len(self.windows) * self.work[-1])

    def _result(self) -> Sensitivities:
        """Return the measurements so far."""
        floor: dict[str, float] = {}
        provenance = self._provenance()
        if self.tally.tokens(0):
            floor, ce_teacher = self._metrics(self.tally.mean(0)), self.tally.mean(0)[COLUMNS.index("ce_teacher")]
            if math.isfinite(ce_teacher):
                provenance["ce_teacher"] = ce_teacher
        measurements, rows, activations = {}, {}, {}
        found = self._measured(floor)
        for step in self.steps:
            for row, candidate in enumerate(step.candidates, step.first):
                if measurement := found.get(row):
                    if candidate.inputs_of:
                        group = candidate.spec.group_length(candidate.matrix.shape[1])
                        activations[candidate.name, group] = measurement
                    elif candidate.use is None:
                        measurements[candidate.name, candidate.spec] = measurement
                    else:
                        rows[candidate.name, candidate.use, candidate.spec] = measurement
        return replace(
            self.blank,
            measurements=measurements,
            rows=rows,
            activations=activations,
            noise_floor=floor,
            provenance=provenance,
        )

    def _measured(self, floor: Mapping[str, float]) -> dict[int, Measurement]:
        """Return the measurements by row, with those that follow from others."""
        found = {}
        for row in range(1, self.rows):
            if tokens := self.tally.tokens(row):
                mean = self._metrics(self.tally.mean(row))
                found[row] = Measurement(mean, self._metrics(self.tally.stderr(row)), tokens)
        if self.schedule is not None:
            found |= self.schedule.derived(found)
        return {
            row: replace(one, below_noise=one.mean[_KL] < NOISE_MULTIPLE * floor[_KL]) for row, one in found.items()
        }

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
            "vocabulary": self.settings["vocabulary"],  # "full", or entries a token
            "budget": self.settings["budget"],
            "compared_in_full": self.engine.in_full,  # candidates, once for each micro-batch
            "dtype": self.settings["dtype"],
            "klfast": __version__,
            "torch": torch.__version__,
            # Seconds by stage, and the work done, in tokens through the whole network (without the head).
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.engine.seconds.items()},
            "token_forwards": round(self.engine.block_tokens / len(self.engine.chain.blocks)),
        }

    @property
    def _beside(self) -> str:
        return f"{self.path}.step"

    def _state(self) -> dict[str, object]:
        return {
            "settings": self.settings,
            "steps": len(self.steps),
            "next": [self.micro_batch, self.step],
            "sums": self.tally.to_data(),
            **({} if self.schedule is None else {"had": list(self.had.items()), "goals": list(self.goals.items())}),
        }

    def _save(self, and_unfinished: bool = False) -> None:
        """Write the measurements, if they have changed, and the state of the current step."""
        if self.path is None:
            return
        start = time.monotonic()
        state = self._state()
        if not self.is_saved:
            state_and_costs = {**state, "seconds": self.engine.seconds, **self._counts()}
            self._result().to_json(self.path, extra={"sweep": state_and_costs})
            self.is_saved = True
            if self.unfinished is None:
                Path(self._beside).unlink(missing_ok=True)
        if and_unfinished and self.unfinished is not None:
            costs: dict[str, float] = {**self.engine.seconds, **self._counts()}
            unfinished.write(self._beside, replace(self.unfinished, costs=costs), signed_json.digest(state))
        end = time.monotonic()
        self.save_at = end + _SAVE_SECONDS * max(1.0, _SAVES_ARE * (end - start))

    def _load(self, path: str) -> None:
        """Continue where the resume file stopped, if it belongs to a sweep with the same arguments."""
        remedy = "to start over delete it (--no-resume), or give `resume` another path"
        data, origin = signed_json.read(path, "a sweep's state", remedy, verified=False)
        before = Sensitivities.from_data(data, origin, remedy)
        state = data.get("sweep") if isinstance(data, dict) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} is not the resume file of a sweep; {remedy}")
        found, own = before.fingerprint, self.blank.fingerprint
        if found is None or own is None or not found.matches(own):
            raise ModelMismatchError(f"{path} is the resume file of another model's sweep; {remedy}")
        try:
            settings = {**_BEFORE, **state["settings"]}
            for name, value in self.settings.items():
                if settings[name] != value:
                    raise InvalidInputError(f"{path} is the resume file of a sweep with other {name}; {remedy}")
            self.micro_batch, self.step = (signed_json.whole(number, "its next step") for number in state["next"])
            if "steps" not in state:
                self.step = from_group(self.steps, self.step)
            elif state["steps"] != len(self.steps):
                raise ValueError(f"it has {state['steps']} steps, not {len(self.steps)}")
            if not (0 <= self.micro_batch <= len(self.windows) and 0 <= self.step < len(self.steps)):
                raise ValueError(f"it stops at step {state['next']}")
            self.tally.load(state["sums"])
            if self.schedule is not None:
                self.had, self.goals = (_row_counts(state[name]) for name in ("had", "goals"))
            self._load_costs({**state, **state["seconds"]})
        except InvalidInputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
        signed_json.verify(data, origin, remedy)
        self.unfinished = unfinished.read(
            self._beside, signed_json.digest(self._state()), self.engine.chain.head.device
        )
        if self.unfinished is not None:
            self._load_costs(self.unfinished.costs)

    def _load_costs(self, costs: Mapping[str, object]) -> None:
        self.engine.seconds.update(
            {stage: signed_json.number(costs[stage], f"seconds of {stage}") for stage in self.engine.seconds}
        )
        self.engine.block_tokens = signed_json.whole(costs["block_tokens"], "block_tokens")
        self.engine.in_full = signed_json.whole(costs.get("in_full", 0), "in_full")  # files of before lack it

    def _counts(self) -> dict[str, int]:
        return {"block_tokens": self.engine.block_tokens, "in_full": self.engine.in_full}


def _row_counts(data: object) -> dict[int, int]:
    pairs = signed_json.is_a(list, data, "its rounds")
    return {signed_json.whole(row, "a row"): signed_json.whole(count, "micro-batches") for row, count in pairs}
