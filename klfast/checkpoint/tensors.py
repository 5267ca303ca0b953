"""Construction of a transformers model from the tensors of a saved folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from klfast.checkpoint.json_files import read_generation_config, read_json
from klfast.checkpoint.model_config import bounded, check_config, register_own
from klfast.core.errors import CheckpointError, InvalidInputError, shortened
from klfast.models.expert_names import expert_name
from klfast.models.head import head_name, is_head_tied
from klfast.models.matrices import Matrix, named_matrices, replacements, with_experts
from klfast.models.vocabulary import embedding_name, embedding_scale
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.conv1d import quantized_class
from klfast.nn.split_stack import SplitStack
from klfast.quant.formats import check_rows
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# For each quantized layer the dtype that its weight had, and its activation.
Facts = Mapping[str, tuple[torch.dtype, str]]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Tensors:
    """The tensors of a folder or file, each read on request, and only once.

    Args:
        folder: the folder or file, for messages.
        readers: functions that read a tensor, by name.
        dtype: the dtype of the model's floating-point tensors; None leaves them as they are.
        remedy: the end of messages about missing or unfit tensors.
    """

    def __init__(
        self,
        folder: Path,
        readers: Mapping[str, Callable[[], torch.Tensor]],
        dtype: torch.dtype | None = None,
        remedy: str = "save the model again",
    ) -> None:
        self.folder, self.dtype, self.remedy = folder, dtype, remedy
        self._readers = dict(readers)

    @classmethod
    def of_files(cls, folder: Path, files: list[str], device: torch.device, dtype: torch.dtype | None) -> Tensors:
        """Open safetensors files of a folder; raise CheckpointError if one is damaged or repeats a tensor."""
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            try:
                opened: Any = safe_open(folder / file, framework="pt", device=str(device))
                names: list[str] = opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file} is damaged ({error}); copy it again") from None
            if twice := readers.keys() & set(names):
                raise CheckpointError(
                    f"{folder / file} contains {min(twice)}, as does another file; save the model again"
                )
            readers.update((name, _reader(opened, name, folder / file)) for name in names)
        return cls(folder, readers, dtype)

    def names(self) -> set[str]:
        """Return the names of the tensors that have not been taken."""
        return set(self._readers)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read a tensor as stored; raise CheckpointError if it is missing or of another shape."""
        if name not in self._readers:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}; {self.remedy}")
        tensor = self._readers.pop(name)()
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} must have shape {list(shape)}, got {list(tensor.shape)}; {self.remedy}"
            )
        return tensor

    def take_quantized(self, name: str, spec: QuantSpec, shape: tuple[int, int] | None = None) -> QuantizedTensor:
        """Read a quantized weight.

        Raises:
            CheckpointError: a tensor is missing, damaged or of another shape or dtype, or corrected rows are none of N.
        """
        sizes = self.take(f"{name}.weight_shape", (2,))
        if sizes.dtype not in _INTEGERS:
            raise CheckpointError(
                f"{self.folder}: {name}.weight_shape must hold integers, got {sizes.dtype}; {self.remedy}"
            )
        stored = tuple(sizes.tolist())
        if shape not in (None, stored):
            raise CheckpointError(f"{self.folder}: {name}.weight_shape is not {list(shape)}; {self.remedy}")
        parts = [self.take(part) for part in part_names(name, spec, stored)]
        try:
            qt = QuantizedTensor(parts, stored, spec)
            if spec.corrected:  # on a GPU, too
                check_rows(qt.halves[1], stored[0])
            return qt
        except InvalidInputError as error:
            raise CheckpointError(f"{self.folder}: the tensors of {name} do not fit: {error}; {self.remedy}") from None

    def put_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Add the parts and the shape of a quantized weight, as if they had been stored."""
        parts = {part.name: tensor for part, tensor in zip(qt.stored.parts, qt.parts, strict=True)}
        for part, tensor in (parts | {"shape": torch.tensor(qt.shape, device="cpu")}).items():
            self._readers[f"{name}.weight_{part}"] = partial(torch.Tensor.detach, tensor)

    def put(self, name: str, read: Callable[[], torch.Tensor]) -> None:
        """Add a tensor, as if it had been stored, that a function reads."""
        self._readers[name] = read

    def take_float(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Read a tensor of the shape of ``like``, as stored or, if a dtype was asked for, in the dtype of ``like``."""
        tensor = self.take(name, tuple(like.shape))
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: {name} must have a dtype like {like.dtype}, got {tensor.dtype}; {self.remedy}"
            )
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(like.dtype)


def _reader(opened: Any, name: str, path: Path) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        try:
            tensor: torch.Tensor = opened.get_tensor(name)  # on the CPU as it is mapped from the file
            return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None

    return read


def empty_model(folder: Path, dtype: torch.dtype | None, stored: int) -> nn.Module:
    """Build the transformers model that a folder describes, without memory (on the meta device).

    Args:
        folder: the folder of config.json.
        dtype: dtype of its floating-point parameters; None for config.json's.
        stored: the number of tensors that its weights are stored in, which bounds the size of the model.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    content = read_json(path)
    check_config(content, path, stored)
    register_own(content)
    with buildable(path):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # it describes the files, not the model in memory
            del config.quantization_config
        model = build_empty(config, path, dtype, stored)
    generates: Any = model
    if (found := read_generation_config(folder, type(generates.generation_config))) is not None:
        generates.generation_config = found
    return model


def build_empty(config: PretrainedConfig, path: Path, dtype: torch.dtype | None, stored: int) -> nn.Module:
    """Build the model of a configuration, which ``path`` describes; otherwise as ``empty_model``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), bounded(path, stored):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, trust_remote_code=False
        )
    return model


@contextmanager
def buildable(path: Path, remedy: str = "save the model again") -> Iterator[None]:
    """Convert what transformers raises for a configuration that it cannot use to CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} does not describe a model that this transformers can build ({reason}); {remedy}"
        ) from error


def fill(model: nn.Module, tensors: Tensors, specs: Mapping[str, QuantSpec], facts: Facts) -> None:
    """Give an empty model its tensors, and replace each layer of ``specs`` by a QuantLinear.

    Tied tensors are stored once; if they are stored under several names after all, each name gets its own.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or not of the model's shape, or the model lacks a layer.
    """
    tied = is_head_tied(model)
    for name, module in replacements(model, read_quantized_layers(model, tensors, specs, facts)).items():
        model.set_submodule(name, module)
    _join_dense(model, tensors)
    if tied and (head := head_name(model)) in specs and f"{embedding_name(model)}.weight" not in tensors.names():
        embedding = QuantEmbedding(cast(QuantLinear, model.get_submodule(head)), embedding_scale(model))
        model.set_submodule(embedding_name(model), embedding)
    _fill_float(model, tensors)
    if left := tensors.names():
        reason = f"{tensors.folder} holds {len(left)} tensors that the model does not have, such as {min(left)}"
        raise CheckpointError(f"{reason}; {tensors.remedy}")
    set_tied_in_config(cast("PreTrainedModel", model).config, is_head_tied(model))


def set_tied_in_config(config: Any, tied: bool) -> None:
    """Record in a configuration whether the head is tied to the input embedding."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        part.tie_word_embeddings = tied


def read_quantized_layers(
    model: nn.Module, tensors: Tensors, specs: Mapping[str, QuantSpec], facts: Facts
) -> dict[str, QuantLinear]:
    """Return the layers of ``specs``, made of their tensors, to take the places of an empty model's matrices.

    Raises:
        CheckpointError: a tensor is missing or not of the matrix's shape, or the model lacks a matrix.
    """
    folder, known = tensors.folder, named_matrices(model)
    if any(name not in known for name in specs):
        known |= with_experts(known)
    if unknown := [name for name in specs if name not in known or name not in facts]:
        name = shortened(unknown[0], 200)
        raise CheckpointError(
            f"{folder}: config.json quantizes {name}, which the model does not have; {tensors.remedy}"
        )
    made: dict[object, tuple[Matrix, QuantLinear]] = {}  # by tensor, which layers of the empty model may share
    layers: dict[str, QuantLinear] = {}
    for name, spec in specs.items():
        one = known[name]
        first = made.get(one.key)
        if first is not None and part_names(name, spec, one.shape)[0] not in tensors.names():
            layers[name] = _same_weight(*first, one, tensors, name)
            continue
        layers[name] = _quantized_layer(one, tensors, name, spec, facts[name])
        made.setdefault(one.key, (one, layers[name]))
    return layers


def _quantized_layer(
    one: Matrix, tensors: Tensors, name: str, spec: QuantSpec, fact: tuple[torch.dtype, str]
) -> QuantLinear:
    weight_dtype, activation = fact
    qt = tensors.take_quantized(name, spec, one.shape)
    bias = None if one.bias is None else tensors.take_float(f"{name}.bias", one.bias)
    dtype = weight_dtype if tensors.dtype is None else one.tensor.dtype
    return quantized_class(one.holder)(qt, bias, activation, dtype=dtype)


def _join_dense(model: nn.Module, tensors: Tensors) -> None:
    """Put the matrices of experts that keep full precision in the place of single ones, for each SplitStack."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitStack) and module.full:
            each = [f"{expert_name(name, expert)}.weight" for expert in module.full]
            if not tensors.names().isdisjoint(each):
                tensors.put(f"{name}.dense", partial(_stacked, tensors, each))


def _stacked(tensors: Tensors, names: list[str]) -> torch.Tensor:
    first = tensors.take(names[0])
    return torch.stack([first, *(tensors.take(name, tuple(first.shape)) for name in names[1:])])


def part_names(layer: str, spec: QuantSpec, shape: tuple[int, int]) -> list[str]:
    """Return the names of a quantized layer's parts in a file."""
    return [f"{layer}.weight_{part.name}" for part in spec.format.parts(shape, spec)]


def _same_weight(first: Matrix, module: QuantLinear, one: Matrix, tensors: Tensors, name: str) -> QuantLinear:
    """Return the module of another layer with the same weight, or one that shares its weight if the biases differ."""
    if one.bias is first.bias:
        return module
    bias = None if one.bias is None else tensors.take_float(f"{name}.bias", one.bias)
    return type(module)(module.quantized, bias, module.activation, dtype=module.dtype)


def _fill_float(model: nn.Module, tensors: Tensors) -> None:
    """Give every other parameter and persistent buffer its tensor."""
    stored = tensors.names()
    for same in tied_places(model).values():
        own = [place for place in same if place[0] in stored] or same[:1]
        for name, module, leaf in own:
            tensor = tensors.take_float(name, getattr(module, leaf))
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor)
        _, holder, held = own[0]
        for name, module, leaf in same:
            if name not in stored:
                setattr(module, leaf, getattr(holder, held))


def tied_places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Return name, module and attribute of each float parameter and persistent buffer, grouped by tensor."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                places.setdefault(id(tensor), []).append((f"{prefix}.{leaf}".lstrip("."), module, leaf))
    return places


@torch.no_grad()
def initialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies ...), as transformers does for its own checkpoints.

    The initialiser of the module that owns a buffer does it, or else that of a module around it. It runs twice, on
    different content, to detect whether it has written a buffer.

    Raises:
        CheckpointError: no initialiser writes a buffer.
    """
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor._is_hf_initialized = True  # so that transformers' initialisers leave it alone
    waiting = {
        f"{prefix}.{leaf}".lstrip("."): getattr(module, leaf)
        for prefix, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
        if getattr(module, leaf) is not None
    }
    level = {name: name.rpartition(".")[0] for name in waiting}
    while waiting:
        owners = sorted({level[name] for name in waiting}, key=lambda owner: owner.count("."))
        results = []
        for content in (0, 1):
            for name, like in waiting.items():
                prefix, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(prefix), leaf, torch.full_like(like, content, device=device))
            for owner in owners:
                try:
                    _initialiser(model, owner)(model.get_submodule(owner))
                except Exception as error:  # a configuration may hold anything
                    reason = str(error).strip().split("\n")[0] or type(error).__name__
                    raise CheckpointError(
                        f"transformers cannot compute the buffers of {owner or 'the model'} ({reason}); "
                        "save the model again"
                    ) from error
            results.append({name: model.get_buffer(name) for name in waiting})
        waiting = {name: like for name, like in waiting.items() if not torch.equal(results[0][name], results[1][name])}
        if lost := [name for name in waiting if not level[name]]:
            prefix, _, leaf = lost[0].rpartition(".")
            raise CheckpointError(
                f"transformers does not compute the buffer {leaf} of {prefix or 'the model'}; "
                "this model cannot be loaded"
            )
        level = {name: level[name].rpartition(".")[0] for name in waiting}


def _initialiser(model: nn.Module, name: str) -> Callable[[nn.Module], None]:
    """Return the initialiser of the nearest transformers model around a module: a model may contain another one."""
    while name and not hasattr(model.get_submodule(name), "_init_weights"):
        name = name.rpartition(".")[0]
    return cast("PreTrainedModel", model.get_submodule(name))._init_weights
