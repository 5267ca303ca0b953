"""An action to run as soon as some other package's module has been imported: klfast itself does not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` once: now if the module of this name is imported, or else right after it will be."""
    if (module := sys.modules.get(name)) is not None:
        action(module)
    elif not any(isinstance(finder, _Watch) and finder.waits_for(name, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, action))


def no_longer_when_imported(name: str, action: Action) -> None:
    """Undo ``when_imported`` for a module that has not been imported."""
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not (isinstance(finder, _Watch) and finder.waits_for(name, action))
    ]


class _Watch(MetaPathFinder):
    """A finder of one module that leaves the finding to the others."""

    def __init__(self, name: str, action: Action) -> None:
        self._name, self._action = name, action

    def waits_for(self, name: str, action: Action) -> bool:
        return (self._name, self._action) == (name, action)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._done)
        return spec

    def _done(self, module: ModuleType) -> None:
        no_longer_when_imported(self._name, self._action)
        self._action(module)


class _Loader(Loader):
    """A loader that calls an action after another one has executed the module, which it leaves in its place."""

    def __init__(self, loader: Loader, action: Action) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action(module)
