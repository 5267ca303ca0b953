"""The tensors of a GGUF file for an empty model: packed where klfast's formats hold them, else numbers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from klfast.checkpoint.gguf.blocks import codes_and_scale, exact_spec
from klfast.checkpoint.gguf.conversion import Conversion, conversion, moves
from klfast.checkpoint.gguf.file import GgufFile
from klfast.checkpoint.tensors import Tensors, part_names
from klfast.core.dtypes import dtype_name
from klfast.models.head import head_name, is_head_tied
from klfast.models.matrices import named_matrices
from klfast.models.vocabulary import input_embedding
from klfast.nn.conv1d import is_conv1d
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec, storable_spec
from klfast.quant.tensor import QuantizedTensor

Weights = Literal["exact", "dense"] | QuantSpec
REMEDY = "fetch or convert it again"


class _Layer(NamedTuple):
    """A matrix of the model, and whether its parameter holds it as [K, N]."""

    name: str
    transposed: bool = False


class _Changed:
    """Quantized tensors that do not stay as they are stored.

    Attributes:
        kinds: how many of each type.
        before, after: their bytes.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.before = self.after = 0

    def __str__(self) -> str:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{listed} ({self.before / 1e6:.1f} MB become {self.after / 1e6:.1f} MB)"


class Source:
    """The tensors of a file for an empty model, and what becomes of their precision.

    Attributes:
        specs: of each layer that stays or becomes quantized.
    """

    def __init__(self, file: GgufFile, model: nn.Module, dtype: torch.dtype, weights: Weights) -> None:
        self._file, self._dtype, self._weights = file, dtype, weights
        self._made = conversion(file, model)
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self._expanded, self._rounded = _Changed(), _Changed()
        self.specs: dict[str, QuantSpec] = {}
        layers = _layers(model, self._made)
        for parameter in self._made.sources:
            self._add(parameter, layers.get(parameter))
        used = {name for names in self._made.sources.values() for name in names}
        self._left_out = [*sorted(file.tensors.keys() - used), *_rope_scaling_left_out(file, model)]

    def _add(self, parameter: str, layer: _Layer | None) -> None:
        """Add a parameter, which is the weight of a layer or of none."""
        file, names = self._file, self._made.sources[parameter]
        values = partial(_values, file, self._made, parameter)
        if self._weights == "dense" or not any(map(file.is_quantized, names)):
            self._readers[parameter] = values
            return
        if layer is not None and (exact := _exact(file, self._made, parameter, layer.transposed)) is not None:
            self._add_quantized(layer.name, *exact)
            return
        n, k = sum(math.prod(file.shape(name)[:-1]) for name in names), file.shape(names[0])[-1]
        if layer is not None and isinstance(self._weights, QuantSpec):
            spec, transposed = storable_spec(self._weights, k), layer.transposed
            self._add_quantized(layer.name, spec, lambda: quantize(_matrix(values(), transposed), spec))
            changed, after = self._rounded, spec.nbytes((n, k))
        else:
            self._readers[parameter] = values
            changed, after = self._expanded, n * k * self._dtype.itemsize
        changed.kinds[file.kind(names[0]) + ("" if layer else " outside linear layers")] += len(names)
        changed.before += sum(int(file.tensors[name].n_bytes) for name in names)
        changed.after += after

    def _add_quantized(self, layer: str, spec: QuantSpec, weight: Callable[[], QuantizedTensor]) -> None:
        self.specs[layer] = spec
        once = cache(weight)  # its parts are taken one by one
        self._readers[f"{layer}.weight_shape"] = lambda: torch.tensor(once().shape)
        for i, part in enumerate(part_names(layer, spec, (1, 1))):
            self._readers[part] = partial(lambda i: once().parts[i], i)

    def tensors(self, device: torch.device) -> Tensors:
        """Hand over the tensors that ``fill`` takes; each is forgotten once it is read."""
        readers, self._readers = self._readers, {}
        on_device = {name: partial(lambda read: read().to(device), read) for name, read in readers.items()}
        return Tensors(self._file.path, on_device, self._dtype, REMEDY)

    def warn(self) -> None:
        """Say in one line which tensors change their precision, and what is left out."""
        found = []
        if self._expanded.kinds:
            hint = '; gguf="int8-g32-asym" (--gguf) quantizes linear layers anew' if self._weights == "exact" else ""
            found.append(f"expanded to {dtype_name(self._dtype)}: {self._expanded}{hint}")
        if self._rounded.kinds:
            found.append(f'quantized anew to {self._weights}: {self._rounded}; gguf="exact" (--gguf) expands them')
        if left := self._left_out:
            found.append(f"left out by transformers: {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else ""))
        if found:
            what = "has content that klfast cannot keep as stored"
            warnings.warn(f"{self._file.path} {what}; {'; '.join(found)}", stacklevel=4)


def _rope_scaling_left_out(file: GgufFile, model: Any) -> list[str]:
    """Return the key of a factor for rotary positions that the model's configuration does not have."""
    rotary = getattr(model.config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") != "default":
        return []
    return [key for key, value in file.metadata.items() if key.endswith(".rope.scaling.factor") and value not in (0, 1)]


def _layers(model: nn.Module, made: Conversion) -> dict[str, _Layer]:
    """Return the layer of each parameter that can be quantized; a tied embedding's is the head."""
    layers = {
        name if one.is_stack else f"{name}.weight": _Layer(name, is_conv1d(one.holder))
        for name, one in named_matrices(model).items()
    }
    if is_head_tied(model) and type(embedding := input_embedding(model)) is nn.Embedding:
        head = head_name(model)
        if f"{head}.weight" not in made.sources:
            layers |= {f"{name}.weight": _Layer(head) for name, module in model.named_modules() if module is embedding}
    return layers


def _values(file: GgufFile, made: Conversion, parameter: str) -> torch.Tensor:
    return made.convert(parameter, {name: file.values(name) for name in made.sources[parameter]})


def _matrix(values: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return a layer's parameter as a matrix [N, K]."""
    return values.T if transposed else values.flatten(0, -2)


def _exact(
    file: GgufFile, made: Conversion, parameter: str, transposed: bool
) -> tuple[QuantSpec, Callable[[], QuantizedTensor]] | None:
    """Return the spec that holds a parameter exactly, and its reader; None if there is no such spec."""
    names = made.sources[parameter]
    stored, *others = {exact_spec(file.kind(name)) for name in names}
    if stored is None or others:
        return None
    moved = moves(made, parameter, {name: file.shape(name) for name in names}, stored.group_size, transposed)
    if moved is None:
        return None
    n, k = len(moved.rows), file.shape(names[0])[-1]
    spec = storable_spec(stored, k)

    def read() -> QuantizedTensor:
        sources = zip(*(codes_and_scale(file, name) for name in names), strict=True)
        codes, scale = (torch.cat(each, -2).flatten(0, -2)[moved.rows] for each in sources)
        codes = codes.view(n, scale.shape[1], -1)[:, moved.groups].view(n, k)
        return QuantizedTensor(spec.format.encode(codes, scale[:, moved.groups], None), (n, k), spec)

    return spec, read
