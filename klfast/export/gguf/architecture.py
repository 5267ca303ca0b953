"""What llama.cpp calls a family, its tensors and its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from klfast.core.errors import InvalidInputError
from klfast.export.gguf.change import Change, share

if TYPE_CHECKING:
    import gguf
    import torch
    from transformers import PretrainedConfig

Shape = tuple[int, ...]
_NO_CHANGE = Change()
SILU = ("silu", "swish")
_HEAD = {"lm_head.weight": "output.weight"}  # which the package gguf leaves out of LFM2's, since the released are tied


class FileTensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: in the file.
        source: the model's tensor that it is made of.
        change: what happens to it.
    """

    name: str
    source: str
    change: Change


def _nothing(config: Any) -> Mapping[str, Any]:
    return {}


def _none(config: Any) -> None:
    return None


@dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp's terms.

    Attributes:
        kind: its name in the package gguf, of ``gguf.MODEL_ARCH``.
        describe: writes the sizes and constants that only this family has; it gets the writer, the configuration and
            the shapes of the file's tensors, by name.
        changes: function from the configuration to the tensors that do not go in as they are, by their names in the
            file without the block.
        renamed: {regular expression of a part of a tensor's name: what the package gguf knows it as}; several names
            share its rows.
        biases: the tensors beside which llama.cpp reads a bias.
        misfit: function from the configuration to what llama.cpp cannot say of it; None if it can say all.
        remark: function from the configuration to what llama.cpp computes a little differently; None for nothing.
        extra: function from the configuration to tensors that the file has beside the model's.
        activations: the settings of the configuration that name an activation, each with transformers' names of the one
            that llama.cpp computes.
    """

    kind: str
    describe: Callable[[gguf.GGUFWriter, Any, Mapping[str, Shape]], None]
    changes: Callable[[Any], Mapping[str, Change]] = _nothing
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    misfit: Callable[[Any], str | None] = _none
    remark: Callable[[Any], str | None] = _none
    extra: Callable[[Any], Mapping[str, torch.Tensor]] = _nothing
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"hidden_act": SILU})

    @property
    def name(self) -> str:
        """The architecture's name in files."""
        import gguf

        return str(gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[self.kind]])

    def tensors(self, config: PretrainedConfig, shapes: Mapping[str, Shape]) -> list[FileTensor]:
        """Return the file's tensors for a model's, given by name.

        Raises:
            InvalidInputError: llama.cpp has no place for one of them, or something else that it cannot say.
        """
        if (reason := self._other_activation(config) or self.misfit(config)) is not None:
            raise InvalidInputError(f"llama.cpp's architecture {self.name} {reason}; nothing is written")
        changes = self.changes(config)
        return [
            FileTensor(name, source, _joined(changes.get(_without_block(name)), shapes[source], part, parts))
            for source in shapes
            for name, part, parts in self._names(config, source)
        ]

    def _other_activation(self, config: Any) -> str | None:
        for setting, known in self.activations.items():
            if (given := getattr(config, setting)) not in known:
                return f"computes {known[0]} for {setting}, this model {given}"
        return None

    def _names(self, config: Any, source: str) -> Iterator[tuple[str, int, int]]:
        """Yield each name in the file of a model's tensor, with its place among them and their number."""
        import gguf

        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.kind], config.num_hidden_layers)
        known_as = [source]
        for old, new in self.renamed.items():
            if re.search(old, source):
                known_as = [re.sub(old, each, known) for known in known_as for each in new]
        for part, known in enumerate(known_as):
            name = table.get_name(known, try_suffixes=(".weight", ".bias")) or _HEAD.get(known)
            if name is None or (name.endswith(".bias") and _without_block(name)[: -len(".bias")] not in self.biases):
                raise InvalidInputError(
                    f"llama.cpp's architecture {self.name} has no place for {source}; nothing is written"
                )
            yield f"{name}.weight" if name.endswith("_exps") else name, part, len(known_as)


def _without_block(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "", name)


def _joined(change: Change | None, shape: Shape, part: int, parts: int) -> Change:
    change = change or _NO_CHANGE
    return change if parts == 1 else change.after_rows(share(shape, part, parts))
