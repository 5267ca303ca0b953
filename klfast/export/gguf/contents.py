"""What a file holds of a model: the type, shape and numbers of each tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.export.gguf import blocks
from klfast.export.gguf.architecture import Architecture, FileTensor, Shape
from klfast.export.gguf.change import Change
from klfast.export.gguf.families import ARCHITECTURES, WITH_EXPERTS
from klfast.export.gguf.weights import Weight, shapes, weights
from klfast.quant.tensor import QuantizedTensor

_FLOATS = {torch.bfloat16: "BF16", torch.float16: "F16"}
_SHOWN = 3  # names in an error


@dataclass(frozen=True, eq=False)
class Content:
    """A tensor of the file.

    Attributes:
        name: in the file.
        layer: the model's tensor.
        weight: its numbers.
        change: what happens to them.
        kind: the type, such as "Q4_0".
        shape: in the file, in torch's order.
        anew: why the weights of a quantized layer are rounded again; None if they are not.
    """

    name: str
    layer: str
    weight: Weight
    change: Change
    kind: str
    shape: Shape
    anew: str | None = None

    def data(self) -> np.ndarray:
        """Return the numbers as the file has them."""
        if isinstance(self.weight, QuantizedTensor) and self.anew is None:
            try:
                return blocks.encoded(self.weight, self.change).reshape(*self.shape[:-1], -1)
            except InvalidInputError as error:
                raise InvalidInputError(f"{self.layer}: {error}; nothing is written") from None
        dense = (
            self.weight.dequantize(torch.float32) if isinstance(self.weight, QuantizedTensor) else self.weight.detach()
        )
        return _encoded(self.change.of(dense).reshape(self.shape).contiguous(), self.kind)

    @property
    def scale_loss(self) -> float:
        """By how much of its norm float16 scales change a row, at most; see ``blocks.scale_loss``."""
        if isinstance(self.weight, QuantizedTensor) and self.anew is None:
            return blocks.scale_loss(self.weight, self.change)
        return 0.0


def architecture_of(model: nn.Module) -> Architecture:
    """Return what llama.cpp calls a model's family.

    Raises:
        InvalidInputError: it has none, or klfast cannot write it.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InvalidInputError(f"klfast writes no GGUF file of {config.model_type}, only of {known}")
    has_experts, with_experts = WITH_EXPERTS.get(config.model_type, (lambda _: False, None))
    return with_experts if with_experts and has_experts(config) else ARCHITECTURES[config.model_type]


def contents(model: nn.Module, architecture: Architecture, *, regroup: bool = False) -> list[Content]:
    """Return the tensors of the file; a head that is tied to the embedding is left out.

    Args:
        model: on the CPU; on the meta device for names, types and shapes alone.
        architecture: the model's.
        regroup: round layers anew whose groups no type of GGUF has; else they are an error.

    Raises:
        InvalidInputError: llama.cpp has no place for a tensor, or a layer's groups have no type.
    """
    config: Any = model.config
    held = weights(model)
    given = shapes(model, held)
    named = architecture.tensors(config, given)
    found = [_content(one, held[one.source], given[one.source]) for one in named]
    by_name = {one.name: one for one in found}
    head, embedding = by_name.get("output.weight"), by_name["token_embd.weight"]
    if head and head.weight is embedding.weight and head.change.factor == embedding.change.factor:
        found.remove(head)
    if not regroup:
        _require_exact(found)
    for name, extra in architecture.extra(config).items():
        found.append(Content(name, name, extra, Change(), "F32", tuple(extra.shape)))
    return found


def shape_after(change: Change, shape: Shape) -> Shape:
    """Return a tensor's shape after a change."""
    return tuple(change.of(torch.empty(shape, device="meta")).shape)


def _content(of: FileTensor, weight: Weight, given: Shape) -> Content:
    """Return a tensor of the file made of a weight, whose shape in full precision is given."""
    name, layer, change = of
    shape = shape_after(change, given)
    if not isinstance(weight, QuantizedTensor):
        is_matrix = len(shape) > 1 and change.values is None
        return Content(name, layer, weight, change, _FLOATS.get(weight.dtype, "F32") if is_matrix else "F32", shape)
    anew = blocks.misfit(weight.spec, weight.shape[1], change)
    exact = blocks.exact_kind(weight.spec)
    kind = exact if exact and not anew else blocks.nearest_kind(weight.spec, weight.shape[1])
    return Content(name, layer, weight, change, kind, shape, anew)


def _require_exact(found: list[Content]) -> None:
    """Raise InvalidInputError if layers would be rounded again. float16 in the place of blocks does not count."""
    lost = [f"{one.layer.removesuffix('.weight')} ({one.anew})" for one in found if one.anew and one.kind != "F16"]
    if lost:
        shown = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if lost[_SHOWN:] else "")
        raise InvalidInputError(
            f"no type of GGUF holds {shown}; plan them with groups of 32, 64 or 128, int8 symmetric, without corrected "
            "rows, or round them anew with --regroup (regroup=True); nothing is written"
        )


def _encoded(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """Return a tensor in a type of GGUF; 16 bits as they are if it has them."""
    import gguf

    if _FLOATS.get(tensor.dtype) == kind:
        return tensor.view(torch.int16).numpy()
    array: np.ndarray = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
    return array
