"""Files from which a sweep continues: its measurements and state, and beside them the state within a step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from klfast.core import signed_json
from klfast.core.errors import CheckpointError, InvalidInputError, ModelMismatchError
from klfast.sensitivity import unfinished
from klfast.sensitivity.outcome import Outcome
from klfast.sensitivity.results import Sensitivities

_SAVE_SECONDS = 10.0
_SAVES_ARE = 2.0  # a save that takes 5 s is made every 100 s: at most a twentieth of the time
# Settings of sweeps whose resume files do not name them yet.
_BEFORE = {
    "activations": False,
    "vocabulary": "full",
    "budget": "exhaustive",
    "max_bytes": None,
    "corrected": [],
    "suffix": "exact",
}


class ResumeFile:
    """Keeps an outcome at ``path``; if that is None, keeps nothing."""

    def __init__(self, path: str | os.PathLike[str] | None, outcome: Outcome) -> None:
        self.path, self._outcome = None if path is None else os.fspath(path), outcome
        self._saved: tuple[int, ...] | None = None  # the position that the file has
        self._save_at = 0.0

    @property
    def is_due(self) -> bool:
        """True if it is time to save."""
        return self.path is not None and time.monotonic() >= self._save_at

    def save(self, and_unfinished: bool = False) -> None:
        """Write the measurements, if there are more, and the state of the current step."""
        if self.path is None:
            return
        start = time.monotonic()
        state, position, under_way = self._state(), self._outcome.state.position, self._outcome.state.unfinished
        if position != self._saved:
            sweep = {**state, "seconds": self._outcome.engine.stages.seconds, **self._counts()}
            self._outcome.sensitivities().to_json(self.path, extra={"sweep": sweep})
            self._saved = position
            if under_way is None:
                self.forget_step()
        if and_unfinished and under_way is not None:
            costs: dict[str, float] = {**self._outcome.engine.stages.seconds, **self._counts()}
            unfinished.write(self._beside, replace(under_way, costs=costs), signed_json.digest(state))
        end = time.monotonic()
        self._save_at = end + _SAVE_SECONDS * max(1.0, _SAVES_ARE * (end - start))

    def forget_step(self) -> None:
        """Remove the state within a step."""
        if self.path is not None:
            Path(self._beside).unlink(missing_ok=True)

    def load(self) -> None:
        """Continue where the file stopped, if there is one.

        Raises:
            InvalidInputError: it belongs to a sweep with other arguments.
            ModelMismatchError: it belongs to another model.
            CheckpointError: it is damaged or not a resume file.
        """
        path, remedy = self.path, "to start over delete it (--no-resume), or give `resume` another path"
        if path is None or not os.path.exists(path):
            return
        data, origin = signed_json.read(path, "a sweep's state", remedy, verified=False)
        before = Sensitivities.from_data(data, origin, remedy)
        state = data.get("sweep") if isinstance(data, dict) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} is not the resume file of a sweep; {remedy}")
        found, own = before.fingerprint, self._outcome.blank.fingerprint
        if found is None or own is None or not found.matches(own):
            raise ModelMismatchError(f"{path} is the resume file of another model's sweep; {remedy}")
        try:
            settings = {**_BEFORE, **state["settings"]}
            for name, value in self._outcome.settings.items():
                if settings[name] != value:
                    raise InvalidInputError(f"{path} is the resume file of a sweep with other {name}; {remedy}")
            self._outcome.state.load(state)
            self._load_costs({**state, **state["seconds"]})
        except InvalidInputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
        signed_json.verify(data, origin, remedy)
        self._load_step()

    def _load_step(self) -> None:
        after, device = signed_json.digest(self._state()), self._outcome.engine.chain.head.device
        self._outcome.state.unfinished = unfinished.read(self._beside, after, device)
        if self._outcome.state.unfinished is not None:
            self._load_costs(self._outcome.state.unfinished.costs)

    def _load_costs(self, costs: Mapping[str, object]) -> None:
        engine = self._outcome.engine
        seconds = engine.stages.seconds
        seconds.update({stage: signed_json.number(costs[stage], f"seconds of {stage}") for stage in seconds})
        engine.block_tokens = signed_json.whole(costs["block_tokens"], "block_tokens")
        engine.comparison.in_full = signed_json.whole(costs.get("in_full", 0), "in_full")  # files of before lack it

    def _counts(self) -> dict[str, int]:
        engine = self._outcome.engine
        return {"block_tokens": engine.block_tokens, "in_full": engine.comparison.in_full}

    def _state(self) -> dict[str, object]:
        return {"settings": self._outcome.settings, **self._outcome.state.to_data()}

    @property
    def _beside(self) -> str:
        return f"{self.path}.step"
