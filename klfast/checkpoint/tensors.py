"""From the tensors of a saved folder to the transformers model that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from klfast.checkpoint.compressed_tensors import linear_names
from klfast.checkpoint.json_files import read_generation_config, read_json
from klfast.checkpoint.model_config import bounded, check_config
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.head import head_name, is_head_tied
from klfast.models.linears import embedding_name
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

Facts = Mapping[
    str, tuple[torch.dtype, str]
]  # of each quantized layer: the dtype that its weight had, and its activation


class Tensors:
    """The tensors of a folder, each read when it is asked for, and handed out once.

    Args:
        folder: where they come from, for messages.
        readers: what reads a tensor, by name.
        dtype: what floating-point tensors of the model become; None leaves them as they are.
    """

    def __init__(
        self, folder: Path, readers: Mapping[str, Callable[[], torch.Tensor]], dtype: torch.dtype | None = None
    ) -> None:
        self.folder, self.dtype = folder, dtype
        self._readers = dict(readers)

    @classmethod
    def of_files(cls, folder: Path, files: list[str], device: torch.device, dtype: torch.dtype | None) -> Tensors:
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            try:
                opened = safe_open(folder / file, framework="pt", device=str(device))
                names = opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file} is damaged ({error}); copy it again") from None
            if twice := readers.keys() & set(names):
                raise CheckpointError(
                    f"{folder / file} holds {min(twice)}, which another file holds, too; save the model again"
                )
            readers.update((name, _reader(opened, name, folder / file)) for name in names)
        return cls(folder, readers, dtype)

    def names(self) -> set[str]:
        return set(self._readers)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """As stored."""
        if name not in self._readers:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}; save the model again")
        tensor = self._readers.pop(name)()
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} must have shape {list(shape)}, got {list(tensor.shape)}; save the model again"
            )
        return tensor

    def take_float(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """In the shape of ``like``; in the dtype asked for, if the model is of one dtype with it."""
        tensor = self.take(name, tuple(like.shape))
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: {name} must be like {like.dtype}, got {tensor.dtype}; save the model again"
            )
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(like.dtype)


def _reader(opened, name: str, path: Path) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        try:
            return opened.get_tensor(name).clone()  # what is read is a view of the file, which may change or vanish
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from None

    return read


def empty_model(folder: Path, dtype: torch.dtype | None, stored: int) -> nn.Module:
    """The transformers model that config.json describes, without memory (on the meta device).

    Args:
        folder: holds config.json.
        dtype: of its floating-point parameters; None for what config.json says.
        stored: how many tensors its weights are stored in, which bounds the model that is built.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import klfast.models.hymba  # noqa: F401  (makes it known to AutoConfig)

    path = folder / "config.json"
    check_config(read_json(path), path, stored)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # it describes the files, not the model in memory
            del config.quantization_config
        with torch.device("meta"), bounded(path, stored):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises anything on a configuration that it cannot use
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} describes no model that this transformers can build ({reason}); save the model again"
        ) from error
    if (found := read_generation_config(folder, type(model.generation_config))) is not None:
        model.generation_config = found
    return model


def fill(model: nn.Module, tensors: Tensors, specs: Mapping[str, QuantSpec], facts: Facts) -> None:
    """Give an empty model its tensors, with a QuantLinear in the place of each layer of ``specs``.

    What the model ties is stored once; where it is stored for several names none the less, each gets its own.

    Raises:
        CheckpointError: a tensor that is missing, superfluous, or not of the model's shape; a layer that it does not have.
    """
    tied = is_head_tied(model)
    _fill_quantized(model, tensors, specs, facts)
    if tied and (head := head_name(model)) in specs and f"{embedding_name(model)}.weight" not in tensors.names():
        model.set_submodule(embedding_name(model), QuantEmbedding(model.get_submodule(head)))
    _fill_float(model, tensors)
    if left := tensors.names():
        reason = f"{tensors.folder} holds {len(left)} tensors that the model does not have, such as {min(left)}"
        raise CheckpointError(f"{reason}; save the model again")
    set_tied_in_config(model.config, is_head_tied(model))


def set_tied_in_config(config, tied: bool) -> None:
    """Let a configuration say whether the head is tied to the input embedding."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        part.tie_word_embeddings = tied


def _fill_quantized(model: nn.Module, tensors: Tensors, specs: Mapping[str, QuantSpec], facts: Facts) -> None:
    folder, layers = tensors.folder, linear_names(model)
    if unknown := [name for name in specs if name not in layers or name not in facts]:
        raise CheckpointError(
            f"{folder}: config.json quantizes {unknown[0]}, which the model does not have; save the model again"
        )
    made: dict[int, tuple[nn.Linear, QuantLinear]] = {}  # by the weight that the empty model shares between its layers
    for name, spec in specs.items():
        layer = layers[name]
        first, shape = made.get(id(layer.weight)), (layer.out_features, layer.in_features)
        if first is not None and _part_names(name, spec, shape)[0] not in tensors.names():
            model.set_submodule(name, _same_weight(*first, layer, tensors, name))
            continue
        module = _quantized_layer(layer, tensors, name, spec, facts[name])
        made.setdefault(id(layer.weight), (layer, module))
        model.set_submodule(name, module)


def _quantized_layer(
    layer: nn.Linear, tensors: Tensors, name: str, spec: QuantSpec, fact: tuple[torch.dtype, str]
) -> QuantLinear:
    folder, shape = tensors.folder, (layer.out_features, layer.in_features)
    weight_dtype, activation = fact
    if tensors.take(f"{name}.weight_shape", (2,)).tolist() != list(shape):
        raise CheckpointError(f"{folder}: {name}.weight_shape is not {list(shape)}; save the model again")
    bias = None if layer.bias is None else tensors.take_float(f"{name}.bias", layer.bias)
    parts = [tensors.take(part) for part in _part_names(name, spec, shape)]
    dtype = weight_dtype if tensors.dtype is None else layer.weight.dtype
    try:
        return QuantLinear(QuantizedTensor(parts, shape, spec), bias, activation, dtype=dtype)
    except InvalidInputError as error:
        raise CheckpointError(f"{folder}: the tensors of {name} do not fit: {error}; save the model again") from None


def _part_names(layer: str, spec: QuantSpec, shape: tuple[int, int]) -> list[str]:
    return [f"{layer}.weight_{part.name}" for part in spec.format.parts(shape, spec)]


def _same_weight(first: nn.Linear, module: QuantLinear, layer: nn.Linear, tensors: Tensors, name: str) -> QuantLinear:
    """The module of another layer that has the same weight; with a bias of its own a second one that shares the weight."""
    if layer.bias is first.bias:
        return module
    bias = None if layer.bias is None else tensors.take_float(f"{name}.bias", layer.bias)
    return QuantLinear(module.quantized, bias, module.activation, dtype=module.dtype)


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
    """Name, module and attribute of each float parameter and persistent buffer; those of one tensor together."""
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

    The initialiser of the module that owns a buffer does it, or else that of a module around it. To see whether one has
    written a buffer, it runs twice, on different content.

    Raises:
        CheckpointError: no initialiser writes a buffer.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # transformers' initialisers leave these alone
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
                    message = f"transformers cannot compute the buffers of {owner or 'the model'} ({reason}); save the model again"
                    raise CheckpointError(message) from error
            results.append({name: model.get_buffer(name) for name in waiting})
        waiting = {name: like for name, like in waiting.items() if not torch.equal(results[0][name], results[1][name])}
        if lost := [name for name in waiting if not level[name]]:
            prefix, _, leaf = lost[0].rpartition(".")
            message = f"transformers does not compute the buffer {leaf} of {prefix or 'the model'}; this model cannot be loaded"
            raise CheckpointError(message)
        level = {name: level[name].rpartition(".")[0] for name in waiting}


def _initialiser(model: nn.Module, name: str) -> Callable[[nn.Module], None]:
    """That of the nearest transformers model around a module, since a model may hold another with an initialiser of its own."""
    while name and not hasattr(model.get_submodule(name), "_init_weights"):
        name = name.rpartition(".")[0]
    return model.get_submodule(name)._init_weights
