"""The experts of a mixture in files: matrix by matrix, under the names that transformers stacks them from.

In memory a stack is one matrix, ``experts.gate_up_proj``. Published checkpoints have ``experts.0.gate_proj``,
``experts.0.up_proj``, ``experts.1.gate_proj`` ..., which transformers stacks when it loads them (its
conversion_mapping.py), even from packed values, and which other software expects. Where transformers has no such
conversion (Granite-4.0-H, whose own checkpoints are stacked), a stack is saved as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import nn

from klfast.checkpoint.tensors import Tensors
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.families import text_config
from klfast.models.matrices import named_matrices
from klfast.nn import QuantExperts, QuantLinear
from klfast.nn.experts import stack_names
from klfast.quant.layouts import Layout
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

# Stack -> the names of an expert's matrices in it, from top to bottom, such as ("gate_proj", "up_proj").
Projections = Mapping[str, Sequence[str]]


def projections(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the stacks of a model, quantized or not, whose matrices checkpoints hold one by one."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    stacks = [
        name
        for name in named_matrices(model)
        if name.rpartition(".")[2] in stack_names(model.get_submodule(experts_of(name)))
    ]
    found: dict[str, tuple[str, ...]] = {}
    for conversion in get_checkpoint_conversion_mapping(getattr(text_config(model), "model_type", "")) or ():
        if names := stacked_names(conversion.source_patterns):
            [end] = conversion.target_patterns
            found |= {stack: names for stack in stacks if f".{stack}".endswith(f".{end.lstrip('.')}")}
    return found


def stacked_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the names of an expert's matrices that a conversion of transformers stacks, given its source patterns.

    There are none if it converts anything else.
    """
    found = [re.fullmatch(r".*\bexperts\.\*\.(\w+)\.weight", source) for source in sources]
    names = tuple(source[1] for source in found if source)
    return names if len(names) == len(found) else ()


def target(stack: str, names: Sequence[str]) -> str:
    """Return a stack's target in quantization_config: a pattern, by which transformers knows the experts' group."""
    return rf"re:{re.escape(experts_of(stack))}\.\d+\.({'|'.join(names)})$"


def split(model: nn.Module, tensors: Mapping[str, torch.Tensor], saved: Projections) -> dict[str, torch.Tensor]:
    """Return a model's tensors with those of single matrices in the place of stacks."""
    found = dict(tensors)
    for stack, names in saved.items():
        layer, experts = model.get_submodule(stack), model.get_submodule(experts_of(stack))
        assert isinstance(layer, QuantLinear) and isinstance(experts, QuantExperts)
        if f"{stack}.weight_shape" not in found:
            continue  # it is another one as well, under whose name it is stored
        for part in (*layer.part_names, "weight_shape"):
            del found[f"{stack}.{part}"]
        qt = layer.quantized.to_layout(Layout.PLAIN)
        each = [f"{experts_of(stack)}.{i}.{name}" for i in range(experts.num_experts) for name in names]
        rows = qt.shape[0] // len(each)
        for i, name in enumerate(each):
            matrix = qt.block(i * rows, (i + 1) * rows)
            found |= {
                f"{name}.weight_{part.name}": t for part, t in zip(matrix.stored.parts, matrix.parts, strict=True)
            }
            found[f"{name}.weight_shape"] = torch.tensor(matrix.shape)
    return found


def join(tensors: Tensors, specs: Mapping[str, QuantSpec], saved: Projections) -> dict[str, QuantSpec]:
    """Put stacks in the place of single matrices: in ``tensors``, and in ``specs``, of which a copy is returned.

    Raises:
        CheckpointError: a tensor is missing, or the tensors do not fit together.
    """
    found = dict(specs)
    for stack, names in saved.items():
        if (spec := found.pop(target(stack, names), None)) is None:
            raise CheckpointError(f"{tensors.folder}: config.json does not quantize {stack}; save the model again")
        found[stack] = spec
        join_one(tensors, stack, names, spec)
    return found


def join_one(tensors: Tensors, stack: str, names: Sequence[str], spec: QuantSpec) -> None:
    """Put a stack of that spec in the place of its single matrices, if there are any.

    Raises:
        CheckpointError: a tensor is missing, or the tensors do not fit together.
    """
    stored = tensors.names()
    each: list[QuantizedTensor] = []
    for i in count():
        expert = f"{experts_of(stack)}.{i}"
        if f"{expert}.{names[0]}.weight_shape" not in stored:
            break
        each += [tensors.take_quantized(f"{expert}.{name}", spec) for name in names]
    if each:
        try:
            tensors.put_quantized(stack, QuantizedTensor.joined(each))
        except InvalidInputError as error:
            raise CheckpointError(f"{tensors.folder}: {stack}: {error}; {tensors.remedy}") from None


def experts_of(stack: str) -> str:
    """Return the name of the module that holds a stack."""
    return stack.rpartition(".")[0]
