"""``ProgramBase``: a program's memory and states, and the parts of the model that it reads."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from klfast.backends.cpu.extension import DTYPE_CODES
from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.settings import hold, module_settings, plain_settings
from klfast.engine.stamps import stamp
from klfast.engine.state import StateSpec
from klfast.nn.direct_call import Place, Watch, has, plain
from klfast.nn.norm import Norm
from klfast.nn.untouched import why_foreign, why_touched

NormReader = Callable[[Any], Norm]  # from a module


def _are(found: Collection[object], expected: Collection[object]) -> bool:
    """Return whether two collections hold the same objects in the same order."""
    return len(found) == len(expected) and all(map(operator.is_, found, expected))


def _stamp(home: Mapping[str, torch.Tensor | None], name: str) -> object:
    found = home[name]
    return None if found is None else stamp(found)


MOST_SEQUENCES = 16


class ProgramBase:
    """What the instructions of a program are made with.

    Buffers have a row for each token of a run; columns of them are what instructions take and write. Weights are used
    where they lie.

    Args:
        model: the model, whose modules' names name the instructions.
        dtype: that of activations.
        rows: most tokens of a run.
        norm_of: returns what reads the parameters of a norm of a class; None for a class that is no norm.

    Attributes:
        program: the extension's.
        states: the tensors of a sequence's state.
        prefix: number of learned inputs before a sequence's tokens, the program's tokens beyond the vocabulary.
        corrected: the head's corrected rows, int32 [R], if it has any.
        correction: the buffer of what is added to their logits.
        kind: what the names of the model's classes begin with.
        kept: what must live as long as the program.
        checks: each returns False or None once a part of the model is no longer what the program has.

    Raises:
        CannotLowerError: klfast's extension is missing, or cannot take a part; or a module has hooks or a forward of
            its own.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, rows: int, norm_of: Callable[[type], NormReader | None]
    ) -> None:
        try:
            from klfast import _C
        except ImportError as error:
            raise CannotLowerError("klfast's C++ extension is not built") from error
        if dtype not in DTYPE_CODES:
            raise CannotLowerError(f"the model computes in {dtype}")
        self.dtype, self.rows, self._norm_of = dtype, rows, norm_of
        self.program = _C.Program()
        self.states: list[StateSpec] = []
        self.prefix = 0
        self.corrected: torch.Tensor | None = None
        self.correction: Columns | None = None
        self.kind = type(model).__name__.removesuffix("ForCausalLM")
        self._names = {module: name or "the model" for name, module in model.named_modules()}
        self._places: dict[int, Place] = {}  # of the tensors in ``kept``, by their id
        self._copied: set[tuple[int, str]] = set()  # places whose values are watched
        self._buffers: dict[tuple[str, int, int, int], Columns] = {}
        self._projections: dict[nn.Module, Any] = {}
        self._halves: dict[nn.Module, tuple[nn.Module, torch.Tensor, nn.Module]] = {}
        self.checks: list[Callable[[], object]] = []
        self.kept: list[object] = []
        # Not the model itself, which its engine must not keep alive.
        children = [(module._modules, tuple(module._modules.values())) for module in self._names]
        self.checks.append(lambda: all(_are(places.values(), found) for places, found in children))
        self._require_untouched(model)
        self._watch_settings(model)

    # Memory -------------------------------------------------------------------------------------------------------

    def buffer(self, name: str, width: int, dtype: torch.dtype | None = None, rows: int | None = None) -> Columns:
        """Return the whole of a buffer; the same one for the same name and size."""
        code, rows = DTYPE_CODES[dtype or self.dtype], rows or self.rows
        key = name, width, code, rows
        if key not in self._buffers:
            try:
                self._buffers[key] = Columns(self.program.buffer(width, code, rows), 0, width)
            except MemoryError:
                raise MemoryError(
                    f"no memory for runs of {self.rows} tokens; lower the model with fewer rows"
                ) from None
        return self._buffers[key]

    def state(self, *shape: int, dtype: torch.dtype, growing: int | None = None) -> int:
        """Return the number of a new tensor of the state, zero at first; see ``StateSpec``."""
        self.states.append(StateSpec(shape, dtype, growing))
        return len(self.states) - 1

    # Parts of the model -------------------------------------------------------------------------------------------

    def name(self, module: nn.Module) -> str:
        """Return a module's name in the model."""
        return self._names.get(module, type(module).__name__)

    def expect(self, module: nn.Module, *classes: str) -> None:
        """Require a module of one of these classes."""
        if type(module).__name__ not in classes:
            raise CannotLowerError(f"{self.name(module)} is a {type(module).__name__}")

    def _require_untouched(self, model: nn.Module) -> None:
        """Require that each module does what its class's author wrote, from now on: also those that nothing names."""
        kinds = {type(module) for module in self._names}
        foreign = {kind: why_foreign(kind) for kind in kinds}
        for module, name in self._names.items():
            if reason := why_touched(module) or foreign[type(module)]:
                raise CannotLowerError(f"{name} {reason}")
        whole, parts = weakref.ref(model), [module for module in self._names if module is not model]
        whole_kind, part_kinds = type(model), list(map(type, parts))
        forwards = [(kind, kind.forward) for kind in kinds]
        self.checks += (
            lambda: not any(map(why_touched, parts)) and _are(list(map(type, parts)), part_kinds),
            lambda: (found := whole()) is None or (not why_touched(found) and type(found) is whole_kind),
            lambda: all(kind.forward is forward for kind, forward in forwards),
        )

    def _watch_settings(self, model: nn.Module) -> None:
        """Watch the settings of all modules and configurations, which lowerings read, from now on."""
        whole, settings = weakref.ref(model), module_settings(vars(model))
        parts = [(module_settings(vars(module)), vars(module)) for module in self._names if module is not model]
        configs = {id(config): config for found, _ in ((settings, None), *parts) if (config := found.get("config"))}
        written = [(config, plain_settings(vars(config))) for config in configs.values()]
        self.checks += (
            lambda: all(hold(found, attributes) for found, attributes in parts),
            lambda: (found := whole()) is None or hold(settings, vars(found)),
            lambda: all(plain_settings(vars(config)) == found for config, found in written),
        )

    def tensors(self, *places: Place) -> list[Any]:
        """Return tensors, or None, by their places in modules' parameters or buffers, watched from now on."""
        if not has(*places):
            raise CannotLowerError("a parameter has been replaced by a property")
        watch = Watch(*places)
        found, watch.tensors = list(watch.tensors), ()
        if not plain(*found):
            raise CannotLowerError("a parameter is not a plain tensor of floats on the CPU")
        self.checks.append(watch.hold)
        self.kept.append(found)
        self._places.update((id(t), place) for t, place in zip(found, places, strict=True) if t is not None)
        return found

    def parameters(self, module: nn.Module, *names: str) -> list[Any]:
        """Return parameters of a module, tensors or None, watched from now on."""
        return self.tensors(*((module._parameters, name) for name in names))

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that ``tensors`` found, whose values a caller copies: they are watched, too, from now on."""
        self.watch_values(*self._places[id(tensor)])
        return tensor

    def watch_values(self, home: Mapping[str, torch.Tensor | None], name: str) -> None:
        """Watch the values of a tensor that is watched at its place, of whose values a caller makes something."""
        if (id(home), name) in self._copied:  # by another instruction, too
            return
        self._copied.add((id(home), name))
        before = _stamp(home, name)
        self.checks.append(lambda: _stamp(home, name) == before)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep a tensor made for the program."""
        self.kept.append(tensor)
        return tensor
