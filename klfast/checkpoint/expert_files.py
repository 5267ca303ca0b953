"""The experts of a mixture in files: matrix by matrix, under the names that transformers stacks them from.

In memory a stack is one matrix, ``experts.gate_up_proj``. Published checkpoints have ``experts.0.gate_proj``,
``experts.0.up_proj``, ``experts.1.gate_proj`` ..., which transformers stacks when it loads them (its
conversion_mapping.py), even from packed values, and which other software expects. Where transformers has no such
conversion (Granite-4.0-H, whose own checkpoints are stacked), a stack is saved as it is, unless its experts have
different precisions (``SplitStack``): then it is saved matrix by matrix, too, ``experts.0.gate_up_proj`` ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

import torch
from torch import nn

from klfast.checkpoint.tensors import Tensors
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.expert_names import expert_name
from klfast.models.families import text_config
from klfast.models.matrices import named_matrices, split_stacks
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


def saved_as(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, tuple[str, ...]]:
    """Return the stacks whose matrices a folder holds one by one, of a model with these quantized layers."""
    known, stacks = projections(model), split_stacks(model)
    return {name: known.get(name, (name.rpartition(".")[2],)) for name in stacks} | {
        name: names for name, names in known.items() if name in layers
    }


def target(stack: str, names: Sequence[str], experts: Sequence[int] | None = None) -> str:
    """Return the target in quantization_config of a stack, or of some of its experts.

    It is a pattern, by which transformers knows the experts' group.
    """
    numbers = r"\d+" if experts is None else f"({'|'.join(map(str, experts))})"
    return rf"re:{re.escape(experts_of(stack))}\.{numbers}\.({'|'.join(names)})$"


def experts_in(text: str, stack: str, names: Sequence[str]) -> list[int]:
    """Return the experts in a target that ``target`` made of some of a stack's; none for any other target."""
    first, last = target(stack, names, [0]).rsplit("(0)", 1)
    numbers = text.removeprefix(first).removesuffix(last)
    if f"{first}{numbers}{last}" != text or not re.fullmatch(r"\(\d{1,9}(\|\d{1,9})*\)", numbers):
        return []
    return [int(number) for number in numbers[1:-1].split("|")]


def targets(model: nn.Module, layers: Mapping[str, QuantLinear], saved: Projections) -> dict[str, str]:
    """Return the targets of the quantized layers, by name, that are stacks or single experts of these."""
    stacks = split_stacks(model)
    found = {stack: target(stack, names) for stack, names in saved.items() if stack not in stacks}
    for stack, held in stacks.items():
        by_spec: dict[QuantSpec, list[int]] = {}
        for expert in held.roundings:
            by_spec.setdefault(layers[expert_name(stack, expert)].spec, []).append(expert)
        for some in by_spec.values():
            found |= {expert_name(stack, expert): target(stack, saved[stack], some) for expert in some}
    return found


def ignored(model: nn.Module, saved: Projections) -> list[str]:
    """Return the patterns of the experts in full precision whose stacks have others in other precisions."""
    return [target(stack, saved[stack], held.full) for stack, held in split_stacks(model).items() if held.full]


def one_by_one(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, QuantLinear]
) -> dict[str, torch.Tensor]:
    """Return a model's tensors with those of single experts in the place of the parts of each SplitStack."""
    stacks = split_stacks(model)
    found = {name: tensor for name, tensor in tensors.items() if not any(name.startswith(f"{own}.") for own in stacks)}
    for stack, held in stacks.items():
        for expert in held.roundings:
            name = expert_name(stack, expert)
            found |= _stored(name, layers[name].quantized.to_layout(Layout.PLAIN))
        for place, expert in enumerate(held.full):
            assert held.dense is not None
            found[f"{expert_name(stack, expert)}.weight"] = held.dense[place]
    return found


def split(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, QuantLinear], saved: Projections
) -> dict[str, torch.Tensor]:
    """Return a model's tensors, ``one_by_one``, with those of single matrices in the place of stacks."""
    found = dict(tensors)
    for stack, names in saved.items():
        holder = model.get_submodule(experts_of(stack))
        assert isinstance(holder, QuantExperts)
        if stack in layers:
            if f"{stack}.weight_shape" not in found:
                continue  # it is another one as well, under whose name it is stored
            for part in (*layers[stack].part_names, "weight_shape"):
                del found[f"{stack}.{part}"]
            found |= _split(layers[stack].quantized, stack, range(holder.num_experts), names)
            continue
        for expert in range(holder.num_experts):
            own = expert_name(stack, expert)
            if own in layers and f"{own}.weight_shape" in found:
                for part in (*layers[own].part_names, "weight_shape"):
                    del found[f"{own}.{part}"]
                found |= _split(layers[own].quantized, stack, [expert], names)
            elif (weight := found.pop(f"{own}.weight", None)) is not None:
                each = weight.chunk(len(names))
                found |= {
                    f"{matrix}.weight": rows
                    for matrix, rows in zip(_matrices(stack, [expert], names), each, strict=True)
                }
    return found


def _split(
    weight: QuantizedTensor, stack: str, experts: Sequence[int], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors of single matrices, of a weight with the rows of some experts."""
    qt, each = weight.to_layout(Layout.PLAIN), _matrices(stack, experts, names)
    rows, found = qt.shape[0] // len(each), dict[str, torch.Tensor]()
    for i, name in enumerate(each):
        found |= _stored(name, qt.block(i * rows, (i + 1) * rows))
    return found


def _matrices(stack: str, experts: Sequence[int], names: Sequence[str]) -> list[str]:
    return [f"{experts_of(stack)}.{i}.{name}" for i in experts for name in names]


def _stored(name: str, matrix: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantized matrix as files hold them."""
    parts = {f"{name}.weight_{part.name}": t for part, t in zip(matrix.stored.parts, matrix.parts, strict=True)}
    return parts | {f"{name}.weight_shape": torch.tensor(matrix.shape)}


def join(tensors: Tensors, specs: Mapping[str, QuantSpec], saved: Projections) -> dict[str, QuantSpec]:
    """Put stacks in the place of single matrices: in ``tensors``, and in ``specs``, of which a copy is returned.

    Raises:
        CheckpointError: a tensor is missing, or the tensors do not fit together.
    """
    found, patterns = dict(specs), [text for text in specs if text.startswith("re:")]
    for stack, names in saved.items():
        if (spec := found.pop(target(stack, names), None)) is not None:
            found[stack] = spec
            join_one(tensors, stack, names, spec)
        elif by_target := {text: some for text in patterns if (some := experts_in(text, stack, names))}:
            each = {expert: specs[text] for text, some in by_target.items() for expert in some}
            for text in by_target:
                found.pop(text, None)
            found |= {expert_name(stack, expert): spec for expert, spec in each.items()}
            _join_experts(tensors, stack, names, each)
        else:
            raise CheckpointError(f"{tensors.folder}: config.json does not quantize {stack}; save the model again")
    return found


def _join_experts(tensors: Tensors, stack: str, names: Sequence[str], specs: Mapping[int, QuantSpec]) -> None:
    """Put the matrices of single experts, quantized or not, in the place of the files' matrices."""
    for expert, spec in specs.items():
        each = [tensors.take_quantized(name, spec) for name in _matrices(stack, [expert], names)]
        _put(tensors, stack, expert_name(stack, expert), each)
    stored = tensors.names()
    for expert in count():
        full = [f"{name}.weight" for name in _matrices(stack, [expert], names)]
        if full[0] in stored:
            tensors.put(f"{expert_name(stack, expert)}.weight", partial(_rows, tensors, full))
        elif expert not in specs:
            break


def _rows(tensors: Tensors, names: Sequence[str]) -> torch.Tensor:
    first = tensors.take(names[0])
    return torch.cat([first, *(tensors.take(name, tuple(first.shape)) for name in names[1:])])


def _put(tensors: Tensors, stack: str, name: str, each: Sequence[QuantizedTensor]) -> None:
    try:
        tensors.put_quantized(name, QuantizedTensor.joined(each))
    except InvalidInputError as error:
        raise CheckpointError(f"{tensors.folder}: {stack}: {error}; {tensors.remedy}") from None


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
        _put(tensors, stack, stack, each)


def experts_of(stack: str) -> str:
    """Return the name of the module that holds a stack."""
    return stack.rpartition(".")[0]
