"""What a sweep has found so far, as sensitivities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from klfast import __version__
from klfast.sensitivity.comparison import COLUMNS
from klfast.sensitivity.measure import Engine
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities
from klfast.sensitivity.state import State
from klfast.sensitivity.steps import NOISE

NOISE_MULTIPLE = 10  # a KL below this many noise floors is more than a tenth noise
_KL = METRICS[0]


@dataclass(frozen=True)
class Outcome:
    """A sweep's model, arguments and state.

    Attributes:
        blank: the model's sensitivities, without measurements.
        settings: the arguments that decide what is measured.
        reported: names of metrics.
    """

    blank: Sensitivities
    settings: Mapping[str, object]
    reported: Sequence[str]
    engine: Engine
    state: State

    def sensitivities(self) -> Sensitivities:
        """Return the measurements so far."""
        tally = self.state.tally
        floor: dict[str, float] = {}
        provenance = self._provenance()
        if tally.tokens(NOISE):
            mean = tally.mean(NOISE)
            floor, ce_teacher = self._metrics(mean), mean[COLUMNS.index("ce_teacher")]
            if math.isfinite(ce_teacher):
                provenance["ce_teacher"] = ce_teacher
        measurements, rows, activations, broken = {}, {}, {}, []
        found = self._measured(floor)
        for step in self.state.steps:
            for row, candidate in enumerate(step.candidates, step.first):
                if tally.is_broken(row):
                    broken.append(str(candidate))
                elif measurement := found.get(row):
                    if candidate.inputs_of:
                        group = candidate.spec.group_length(candidate.matrix.shape[1])
                        activations[candidate.name, group] = measurement
                    elif candidate.use is None:
                        measurements[candidate.name, candidate.spec] = measurement
                    else:
                        rows[candidate.name, candidate.use, candidate.spec] = measurement
        if broken:
            provenance["not_finite"] = broken
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
        tally, found = self.state.tally, {}
        for row in range(NOISE + 1, self.state.rows):
            if (tokens := tally.tokens(row)) and not tally.is_broken(row):
                mean, stderr = self._metrics(tally.mean(row)), self._metrics(tally.stderr(row))
                found[row] = Measurement(mean, stderr, tokens, windows=tally.windows(row))
        if self.state.schedule is not None:
            found |= self.state.schedule.derived(found, tally)
        return {
            row: replace(one, below_noise=one.mean[_KL] < NOISE_MULTIPLE * floor[_KL]) for row, one in found.items()
        }

    def _metrics(self, values: Sequence[float]) -> dict[str, float]:
        return {name: value for name, value in zip(COLUMNS, values, strict=True) if name in self.reported}

    def _provenance(self) -> dict[str, object]:
        engine, settings = self.engine, self.settings
        model = engine.chain.model
        return {
            "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
            "family": type(model).__name__,
            "windows": sum(self.state.windows),
            "micro_batches": [self.state.micro_batch, len(self.state.windows)],
            "calibration_sha256": settings["calibration"],
            "scale": settings["scale"],
            "vocabulary": settings["vocabulary"],  # "full", or entries a token
            "budget": settings["budget"],
            "compared_in_full": engine.comparison.in_full,  # candidates, once for each micro-batch
            "dtype": settings["dtype"],
            "suffix": settings["suffix"],
            "klfast": __version__,
            "torch": torch.__version__,
            # Seconds by stage, and the work done, in tokens through the whole network (without the head).
            "seconds": {stage: round(seconds, 3) for stage, seconds in engine.stages.seconds.items()},
            "token_forwards": round(engine.block_tokens / len(engine.chain.blocks)),
        }
