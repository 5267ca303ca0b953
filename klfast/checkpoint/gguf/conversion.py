"""How transformers makes a model's parameters of a GGUF file's tensors: names, orders of rows, changed values.

transformers has two readers, a newer one for the families in ``GGUF_ARCHS`` and an older one for the others. Both are
asked for one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from klfast.checkpoint.gguf.file import GgufFile
from klfast.core.errors import CheckpointError


class Conversion(Protocol):
    """The way from a file's tensors to a model's parameters, which transformers knows.

    Attributes:
        sources: the tensors of the file that each parameter of the model is made of.
    """

    sources: dict[str, list[str]]

    def convert(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a parameter, made of its sources in float32 (or, to see where they go, in any dtype)."""


def conversion(file: GgufFile, model: nn.Module) -> Conversion:
    """Return transformers' conversion of a file for the model that it describes."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    return (_ByRules if is_gguf_arch_supported(file.architecture) else _ByProcessor)(file, model)


class _ByProcessor:
    """The older reader: a class for each family, in transformers' modeling_gguf_pytorch_utils.py.

    Names are those of the gguf package. (transformers' get_gguf_hf_weights_map asks it for them, but builds its table
    of names once for each module of the model.)
    """

    def __init__(self, file: GgufFile, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
        self._names = self._parameters(file, model)
        self.sources: dict[str, list[str]] = {}
        for name in file.tensors:  # experts are listed without .weight
            if (parameter := self._names.get(name) or self._names.get(name.removesuffix(".weight"))) is not None:
                self.sources.setdefault(parameter, []).append(name)

    def _parameters(self, file: GgufFile, model: Any) -> dict[str, str]:
        """Return the parameter that each tensor of the file is a part of; experts without .weight."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
        if kind is None:
            raise CheckpointError(
                f"{file.path}: this version of the package gguf does not know the architecture {file.architecture!r}; "
                "a newer one may"
            )
        table = get_tensor_name_map(kind, model.config.num_hidden_layers)
        found: dict[str, str] = {}
        for parameter in model.state_dict():
            name, dot, end = self._processor.preprocess_name(parameter).rpartition(".")
            if end not in ("weight", "bias"):
                name, dot, end = f"{name}{dot}{end}", "", ""
            inner = name.removeprefix(f"{model.base_model_prefix}.")  # Bloom is converted from its base model
            if (stored := table.get_name(name) or table.get_name(inner)) is not None:
                found.setdefault(f"{stored}{dot}{end}", parameter)
            else:
                self._processor.perform_fallback_tensor_mapping(found, f"{dot}{end}", "", parameter)
        return found

    def convert(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        joined: dict[str, torch.Tensor] = {}  # experts: where the processor collects the parts of one parameter
        for name, tensor in tensors.items():
            found = self._processor.process(
                weights=tensor.numpy(), name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": joined}
            )
        return joined[parameter] if parameter in joined else torch.from_numpy(found.weights)


class _ByRules:
    """The newer reader: a list of renamings and operations for each family, in transformers' integrations/gguf."""

    def __init__(self, file: GgufFile, model: Any) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        rules = get_gguf_conversion_mapping(file.architecture, model.config)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        self._patterns: dict[str, str | None] = {}
        self.sources: dict[str, list[str]] = {}
        known = model.state_dict().keys()
        for name in file.tensors:
            parameter, self._patterns[name] = rename_source_key(name, renamings, converters)
            if parameter in known:
                self.sources.setdefault(parameter, []).append(name)

    def convert(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        patterns = {name: self._patterns[name] for name in tensors}
        values: dict[str, Any] = {patterns[name] or name: tensor for name, tensor in tensors.items()}
        for rule in {self._converters[pattern] for pattern in patterns.values() if pattern is not None}:
            for operation in rule.operations:
                values = operation.convert(
                    values,
                    source_patterns=rule.source_patterns,
                    target_patterns=rule.target_patterns,
                    full_layer_name=parameter,
                )
        (value,) = values.values()
        return value


class Moves(NamedTuple):
    """Where a conversion takes a matrix from, if it only moves rows and whole groups of columns.

    Attributes:
        rows: the source of each row, int64 [N]; the sources lie one behind the other, in each expert anew.
        groups: the source of each group of columns, int64 [G].
    """

    rows: torch.Tensor
    groups: torch.Tensor


def moves(
    made: Conversion, parameter: str, shapes: Mapping[str, tuple[int, ...]], group: int, transposed: bool = False
) -> Moves | None:
    """Return where a conversion takes each row and group from; None if it does anything else.

    The conversion is applied to the numbers of the rows and of the columns instead of the values: of a matrix, or of
    the first two experts of a stack, between which it knows no difference.

    Args:
        made: the conversion.
        parameter: one that it makes.
        shapes: of the parameter's sources, [N, K] or [E, N, K].
        group: columns of a group.
        transposed: the parameter holds a matrix as [K, N].
    """
    (*experts, _, k), *others = shapes.values()
    if len(experts) > 1 or any((*shape[:-2], shape[-1]) != (*experts, k) for shape in others):
        return None
    shown, heights = [min(count, 2) for count in experts], [shape[-2] for shape in shapes.values()]
    shape = (*shown, n := sum(heights), k)
    rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int32).view(*shape[:-1], 1)
    columns = torch.arange(k, dtype=torch.int32)
    places = (rows.split(heights, -2), [columns] * len(heights))
    found = [
        made.convert(
            parameter,
            {name: one.expand(*shown, height, k) for name, height, one in zip(shapes, heights, each, strict=True)},
        )
        for each in places
    ]
    found = [one.T for one in found] if transposed else found
    if any(one.shape != shape for one in found):
        return None
    rows_found, columns_found = found[0][..., :1], found[1].flatten(0, -2)[:1]
    groups, one_expert = columns_found.view(-1, group), rows_found.flatten()[:n]
    if not (
        (found[0].stride(-1) == 0 or torch.equal(found[0], rows_found.expand(shape)))
        and (not any(found[1].stride()[:-1]) or torch.equal(found[1], columns_found.expand(shape)))
        and torch.equal(one_expert.sort().values, rows.flatten()[:n])
        and torch.equal(rows_found, rows - rows.flatten()[:n].view(-1, 1) + one_expert.view(-1, 1))
        and torch.equal(columns_found.sort().values, columns.expand(1, -1))
        and torch.equal(groups, groups[:, :1] // group * group + columns[:group])
    ):
        return None
    firsts = n * torch.arange(math.prod(experts))
    return Moves((firsts[:, None] + one_expert).flatten(), groups[:, 0].long() // group)
