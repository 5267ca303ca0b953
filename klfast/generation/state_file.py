"""Files of an engine's state: a text read once goes on at any time."""

from __future__ import annotations

import json
import os
import weakref

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.core.io import write_atomic
from klfast.engine.engine import Engine
from klfast.engine.stamps import stamp
from klfast.engine.state import State
from klfast.generation.engine import engine_of
from klfast.models.adapters import unwrapped
from klfast.models.fingerprint import Fingerprint, fingerprint, require_match

_FORMAT = "klfast state 1"

_fingerprints: weakref.WeakKeyDictionary[Engine, tuple[object, Fingerprint]] = weakref.WeakKeyDictionary()


def save_state(path: str | os.PathLike[str], state: State, model: nn.Module) -> None:
    """Write the state of a model's engine to a safetensors file, with the model's fingerprint.

    Raises:
        CannotLowerError: no engine runs the model.
        InvalidInputError: the state is another model's.
        OSError: as for ``klfast.core.io.write_atomic``.
    """
    model = unwrapped(model)
    engine, used = engine_of(model), int(state.seen.max())
    if state.specs != engine.state().specs:
        raise InvalidInputError("the state belongs to another model's engine; give the model that made it")
    tensors = {"seen": state.seen}
    for i, (spec, tensor) in enumerate(zip(state.specs, state.tensors, strict=True)):
        tensors[f"state.{i}"] = spec.places(tensor, 0, used).contiguous()
    own = _fingerprint(model, engine)
    facts = {"structure": own.structure, "norms": own.norms}
    write_atomic(path, save(tensors, {"format": _FORMAT, "model": json.dumps(facts)}))


def load_state(path: str | os.PathLike[str], model: nn.Module) -> State:
    """Read a state that ``save_state`` wrote.

    Raises:
        CannotLowerError: no engine runs the model.
        CheckpointError: the file is damaged or no state, or its tensors do not fit the engine.
        ModelMismatchError: it is the state of another model.
        OSError: the file cannot be read.
    """
    model = unwrapped(model)
    engine, name = engine_of(model), os.fspath(path)
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{name} is not a klfast state; give a file that save_state wrote")
        facts = json.loads(metadata["model"])
        made_for = Fingerprint(str(facts["structure"]), tuple(map(float, facts["norms"])))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} is damaged ({error}); save the state again") from None
    require_match(made_for, model, f"the state {name}")
    return _fitted(name, tensors, engine)


def _fitted(name: str, tensors: dict[str, torch.Tensor], engine: Engine) -> State:
    seen = tensors.pop("seen", torch.empty(0))
    if seen.dtype != torch.int64 or seen.dim() != 1 or not len(seen) or int(seen.min()) < 0:
        raise CheckpointError(f"{name} holds no numbers of tokens; save the state again")
    specs, used = engine.state().specs, int(seen.max())
    if len(tensors) != len(specs):
        raise CheckpointError(f"{name} holds {len(tensors)} tensors, not {len(specs)}; save the state again")
    for i, spec in enumerate(specs):
        found, sizes = tensors.get(f"state.{i}"), spec.sizes(len(seen), used)
        if found is None or list(found.shape) != sizes or found.dtype != spec.dtype:
            has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(f"{name}: state.{i} must be {spec.dtype} {sizes}, got {has}; save it again")
    state = engine.state(len(seen))
    state.reserve(used)
    for i, (spec, tensor) in enumerate(zip(specs, state.tensors, strict=True)):
        spec.places(tensor, 0, used).copy_(tensors[f"state.{i}"])
    state.seen.copy_(seen)
    return state


def _fingerprint(model: nn.Module, engine: Engine) -> Fingerprint:
    """Return the model's fingerprint, which is dear, computed once until tensors are written to."""
    stamps = [stamp(t) for t in (*model.parameters(), *model.buffers()) if t.is_cpu]
    if (known := _fingerprints.get(engine)) is None or known[0] != stamps:
        known = _fingerprints[engine] = stamps, fingerprint(model)
    return known[1]
