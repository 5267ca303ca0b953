"""What rounding a model makes, and a folder that keeps it while it is made, place by place."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from klfast.core import lock, signed_json, signed_tensors
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.core.io import folder_atomic, remove_folder
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

_SETTINGS = "rounding.json"
_REMEDY = "to start over delete the folder (--no-resume), or give `resume` another path"


@dataclass(frozen=True)
class RoundedModel:
    """What ``round_model`` makes.

    Attributes:
        tensors: the quantized weights, by name.
        notes: why a matrix, or some of a stack's experts, were rounded to nearest: a clause, by name.
        nearest: the names of matrices that were rounded to nearest as a whole.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    nearest: set[str] = field(default_factory=set)

    def only(self, names: Collection[str]) -> RoundedModel:
        """Return the part of it that is about some matrices."""
        return RoundedModel(
            {name: self.tensors[name] for name in names},
            {name: note for name, note in self.notes.items() if name in names},
            self.nearest.intersection(names),
        )

    def add(self, other: RoundedModel) -> None:
        """Add what was made of other matrices."""
        self.tensors.update(other.tensors)
        self.notes.update(other.notes)
        self.nearest.update(other.nearest)


class Kept:
    """A folder with a file for each place whose matrices are rounded.

    Args:
        path: the folder, made if it is missing.
        settings: what the result depends on, for JSON.

    Raises:
        InvalidInputError: the folder belongs to a run with other settings, or is something else.
        CheckpointError: its settings are damaged.
        OSError: it cannot be written, or is a file.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, object]) -> None:
        self._folder = Path(path)
        known = self._folder / _SETTINGS
        if not known.exists():
            if self._folder.is_dir() and any(self._folder.iterdir()):
                raise InvalidInputError(f"{path} holds something that no rounding left there; name another folder")
            with folder_atomic(path) as beside:  # never a folder without its settings, which would be refused
                signed_json.write(settings, beside / _SETTINGS)
            return
        found, origin = signed_json.read(known, "a rounding's settings", _REMEDY)
        for name, value in settings.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise InvalidInputError(f"{origin} is of a rounding with other {name}; {_REMEDY}")

    def read(self, place: int | str, names: Sequence[str], device: torch.device) -> RoundedModel | None:
        """Return what was kept of a place; None, with a warning if it is damaged, if it has to be rounded."""
        path = self._path(place)
        if not path.exists():
            return None
        try:
            facts, tensors = signed_tensors.read(path)
            if facts["names"] != list(names):
                raise ValueError("it holds other matrices")
            found = RoundedModel(notes=dict(facts["notes"]), nearest=set(facts["nearest"]))
            for name, (spec, n, k) in facts["specs"].items():
                parsed = QuantSpec.parse(spec)
                parts = [tensors[f"{name}.{part.name}"].to(device) for part in parsed.format.parts((n, k), parsed)]
                found.tensors[name] = QuantizedTensor(parts, (n, k), parsed)
            return found
        except (OSError, ValueError, KeyError, TypeError, InvalidInputError, CheckpointError) as error:
            warnings.warn(f"{path} is damaged ({error}); its matrices are rounded again", stacklevel=2)
            return None

    def write(self, place: int | str, names: Sequence[str], rounded: RoundedModel) -> None:
        """Keep what was made of a place."""
        facts = {
            "names": list(names),
            "notes": rounded.notes,
            "nearest": sorted(rounded.nearest),
            "specs": {name: (str(qt.spec), *qt.shape) for name, qt in rounded.tensors.items()},
        }
        parts = {
            f"{name}.{part.name}": tensor
            for name, qt in rounded.tensors.items()
            for part, tensor in zip(qt.stored.parts, qt.parts, strict=True)
        }
        signed_tensors.write(self._path(place), facts, parts)

    def _path(self, place: int | str) -> Path:
        return self._folder / f"{re.sub(r'[^a-z0-9]', '_', str(place))}.safetensors"


def forget(path: str | os.PathLike[str]) -> None:
    """Remove a folder that a rounding kept its results in; one that something else made is left alone.

    Raises:
        InvalidInputError: another process is working on it.
    """
    if (Path(path) / _SETTINGS).is_file():
        with lock.held(path):
            remove_folder(path)
