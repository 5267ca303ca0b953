"""The tensors of a GGUF file for an empty model: packed where klfast's formats hold them, else numbers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn

from klfast.checkpoint.compressed_tensors import linear_names
from klfast.checkpoint.gguf.blocks import codes_and_scale, exact_spec
from klfast.checkpoint.gguf.conversion import Conversion, conversion, moves
from klfast.checkpoint.gguf.file import GgufFile
from klfast.checkpoint.tensors import Tensors, part_names
from klfast.core.dtypes import dtype_name
from klfast.models.head import head_name, is_head_tied
from klfast.models.vocabulary import input_embedding
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec, storable_spec
from klfast.quant.tensor import QuantizedTensor

Weights = Literal["exact", "dense"] | QuantSpec
REMEDY = "fetch or convert it again"


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

    def _add(self, parameter: str, layer: str | None) -> None:
        """Add a parameter, which is the weight of a linear layer or of none."""
        file, names = self._file, self._made.sources[parameter]
        values = partial(_values, file, self._made, parameter)
        if self._weights == "dense" or not any(map(file.is_quantized, names)):
            self._readers[parameter] = values
            return
        if layer is not None and (exact := _exact(file, self._made, parameter)) is not None:
            self._add_quantized(layer, *exact)
            return
        shape = file.shape(names[0])
        if layer is not None and isinstance(self._weights, QuantSpec):
            spec = storable_spec(self._weights, shape[1])
            self._add_quantized(layer, spec, lambda: quantize(values(), spec))
            changed, after = self._rounded, spec.nbytes((shape[0], shape[1]))
        else:
            self._readers[parameter] = values
            changed, after = self._expanded, len(names) * math.prod(shape) * self._dtype.itemsize
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
            hint = 'gguf="int8-g32-asym" (--gguf) quantizes linear layers anew'
            found.append(f"expanded to {dtype_name(self._dtype)}: {self._expanded}; {hint}")
        if self._rounded.kinds:
            found.append(f"quantized anew to {self._weights}: {self._rounded}")
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


def _layers(model: nn.Module, made: Conversion) -> dict[str, str]:
    """Return the linear layer of each parameter that can be quantized; a tied embedding's is the head."""
    layers = {f"{name}.weight": name for name in linear_names(model)}
    if is_head_tied(model) and type(embedding := input_embedding(model)) is nn.Embedding:
        head = head_name(model)
        if f"{head}.weight" not in made.sources:
            layers |= {f"{name}.weight": head for name, module in model.named_modules() if module is embedding}
    return layers


def _values(file: GgufFile, made: Conversion, parameter: str) -> torch.Tensor:
    return made.convert(parameter, {name: file.values(name) for name in made.sources[parameter]})


def _exact(file: GgufFile, made: Conversion, parameter: str) -> tuple[QuantSpec, Callable[[], QuantizedTensor]] | None:
    """Return the spec that holds a parameter exactly, and its reader; None if there is no such spec."""
    name, *others = made.sources[parameter]
    stored, shape = exact_spec(file.kind(name)), file.shape(name)
    if others or stored is None or (moved := moves(made, parameter, name, shape, stored.group_size)) is None:
        return None
    spec = storable_spec(stored, shape[1])

    def read() -> QuantizedTensor:
        codes, scale = codes_and_scale(file, name)
        n, k = codes.shape
        codes = codes[moved.rows].view(n, *scale.shape[1:], -1)[:, moved.groups].reshape(n, k)
        return QuantizedTensor(spec.format.encode(codes, scale[moved.rows][:, moved.groups], None), (n, k), spec)

    return spec, read
