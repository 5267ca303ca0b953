"""Saving and loading quantized models, in the ``pack-quantized`` format of compressed-tensors."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from klfast import __version__
from klfast.checkpoint_format import (
    MANIFEST, quantization_config, read_generation_config, read_json, read_layer_facts, read_manifest, read_specs, write_manifest,
)
from klfast.convert import embedding_name
from klfast.errors import CheckpointError, InvalidInputError
from klfast.files import folder_atomic, write_atomic
from klfast.models.layers import head_name, is_head_tied, linears
from klfast.models.native_ssm import accelerate_or_warn
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.types import QuantizedTensor, QuantSpec, dtype_name


def save_quantized(
    model: nn.Module, directory: str | os.PathLike, tokenizer=None, *, overwrite: bool = False, max_shard_size: int | str = "5GB"
) -> None:
    """Save a model that holds QuantLinear layers.

    The folder gets config.json, model.safetensors (or shards of it and their index), generation_config.json, the
    tokenizer's files and klfast.json (digests of all of these; files may be added later, but none of these altered). It
    appears under its name only when it is complete.

    Other readers: the compressed-tensors package (0.20) decompresses each layer bit for bit as
    ``QuantizedTensor.dequantize`` does, and loads whole models. ``from_pretrained`` of transformers (5.23) reads
    symmetric specs, but no asymmetric ones, and no Mamba with a quantized out_proj or dt_proj, whose missing ``.weight``
    its initialisers touch. A quantized head that is tied to the input embedding is stored once, under the head's name,
    which only klfast reads: leave the head out of the plan, or untie it, for a folder that others are to serve.

    Args:
        model: from ``klfast.quantize_model`` or ``klfast.load_quantized``.
        directory: the folder to make; its parent must exist.
        tokenizer: anything with ``save_pretrained``.
        overwrite: replace the folder if ``save_quantized`` wrote what is there.
        max_shard_size: bytes, or text such as "5GB".

    Raises:
        InvalidInputError: nothing is quantized; groups that the format cannot store; the folder exists.
    """
    layers = {name: module for name, module in linears(model).items() if isinstance(module, QuantLinear)}
    if not layers:
        raise InvalidInputError("no layer of the model is quantized; use klfast.quantize_model first, or the model's own save_pretrained")
    target = Path(directory).resolve()
    _check_target(target, overwrite)
    config = copy.deepcopy(model.config)
    config.quantization_config = quantization_config(
        {name: (module.spec, module.in_features) for name, module in layers.items()},
        (name for name in linears(model) if name not in layers),
    )
    config.architectures = [type(model).__name__]
    config.dtype = dtype_name(model.dtype)
    with folder_atomic(target) as folder:
        config.save_pretrained(folder)
        _write_tensors(_distinct_tensors(model), folder, max_shard_size)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        facts = {name: {"dtype": dtype_name(module.dtype), "activation": module.activation} for name, module in layers.items()}
        write_manifest(folder, klfast_version=__version__, torch_version=torch.__version__, layers=facts)


def load_quantized(
    directory: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, verify: bool = True
) -> nn.Module:
    """Load a model saved by ``save_quantized``, in evaluation mode.

    The model is built without memory and filled tensor by tensor: the full-precision weight of a quantized layer never
    exists. Nothing is unpickled and no code from the folder runs.

    Args:
        directory: the folder.
        device: where the tensors go.
        dtype: float32, bfloat16 or float16 for what is not quantized (scales stay as they are); None for that of the
            saved model.
        verify: compare each file's SHA-256 with the saved one.

    Returns:
        The transformers model, with QuantLinear layers and klfast's native SSM functions (``klfast.accelerate``); its
        parameters take no gradients.

    Raises:
        CheckpointError: a file or tensor that is missing, superfluous, truncated or altered, or a folder that
            ``save_quantized`` did not write.
    """
    folder = Path(directory)
    manifest = read_manifest(folder, verify)
    model = _empty_model(folder, dtype)
    tensors = _Tensors(folder, manifest, device, dtype)
    tied = is_head_tied(model)
    specs = _fill_quantized(model, tensors, manifest)
    if tied and (head := head_name(model)) in specs:
        model.set_submodule(embedding_name(model), QuantEmbedding(model.get_submodule(head)))
    _fill_float(model, tensors)
    if left := tensors.names():
        raise CheckpointError(f"{folder} holds {len(left)} tensors that the model does not have, such as {min(left)}; save the model again")
    _initialise_buffers(model, torch.device(device))
    return accelerate_or_warn(model.eval())


class _Tensors:
    """The tensors of a folder, each handed out once."""

    def __init__(self, folder: Path, manifest: dict, device: torch.device | str, dtype: torch.dtype | None) -> None:
        self.folder, self.dtype = folder, dtype
        self._tensors: dict[str, torch.Tensor] = {}
        for file in (name for name in manifest["files"] if name.endswith(".safetensors")):
            try:
                with safe_open(folder / file, framework="pt", device=str(device)) as opened:
                    # a copy: the tensors of a file are views of it, and would change or vanish with it
                    self._tensors.update((name, opened.get_tensor(name).clone()) for name in opened.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file} is damaged ({error}); copy it again") from None

    def names(self) -> set[str]:
        return set(self._tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """As stored."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}; save the model again")
        tensor = self._tensors.pop(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.folder}: {name} must have shape {list(shape)}, got {list(tensor.shape)}; save the model again")
        return tensor

    def take_float(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """In the shape of ``like``; in the dtype asked for, if the model is of one dtype with it."""
        tensor = self.take(name, tuple(like.shape))
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(f"{self.folder}: {name} must be like {like.dtype}, got {tensor.dtype}; save the model again")
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(like.dtype)


def _empty_model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The transformers model that config.json describes, without memory (on the meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import klfast.models.hymba  # noqa: F401  (makes it known to AutoConfig)

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        del config.quantization_config  # it describes the files, not the model in memory
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises anything on a configuration that it cannot use
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder / 'config.json'} describes no model that this transformers can build ({reason}); save the model again") from error
    if (found := read_generation_config(folder, type(model.generation_config))) is not None:
        model.generation_config = found
    return model


def _fill_quantized(model: nn.Module, tensors: _Tensors, manifest: dict) -> dict[str, QuantSpec]:
    """Put a QuantLinear in the place of each layer that config.json quantizes, and return their specs."""
    folder = tensors.folder
    try:
        specs = read_specs(read_json(folder / "config.json")["quantization_config"])
    except (KeyError, TypeError, AttributeError, InvalidInputError) as error:
        raise CheckpointError(f"{folder}: the description of the quantized layers is damaged ({error}); save the model again") from None
    facts, layers = read_layer_facts(folder, manifest), linears(model)
    if unknown := [name for name in specs if name not in layers or name not in facts]:
        raise CheckpointError(f"{folder}: config.json quantizes {unknown[0]}, which the model does not have; save the model again")
    for name, spec in specs.items():
        layer, (weight_dtype, activation) = layers[name], facts[name]
        shape = (layer.out_features, layer.in_features)
        if tensors.take(f"{name}.weight_shape", (2,)).tolist() != list(shape):
            raise CheckpointError(f"{folder}: {name}.weight_shape is not {list(shape)}; save the model again")
        bias = None if layer.bias is None else tensors.take_float(f"{name}.bias", layer.bias)
        packed, scale = tensors.take(f"{name}.weight_packed"), tensors.take(f"{name}.weight_scale")
        zero_point = None if spec.symmetric else tensors.take(f"{name}.weight_zero_point")
        dtype = weight_dtype if tensors.dtype is None else layer.weight.dtype
        try:
            module = QuantLinear(QuantizedTensor(packed, scale, zero_point, shape, spec), bias, activation, dtype=dtype)
        except InvalidInputError as error:
            raise CheckpointError(f"{folder}: the tensors of {name} do not fit: {error}; save the model again") from None
        model.set_submodule(name, module)
    return specs


def _fill_float(model: nn.Module, tensors: _Tensors) -> None:
    """Give every other parameter and persistent buffer its tensor; what is tied stays tied, and is stored once."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                places.setdefault(id(tensor), []).append((f"{prefix}.{leaf}".lstrip("."), module, leaf))
    stored = tensors.names()
    for same in places.values():
        name = next((name for name, _, _ in same if name in stored), same[0][0])
        _, module, leaf = same[0]
        tensor = tensors.take_float(name, getattr(module, leaf))
        if leaf in module._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        for _, module, leaf in same:
            setattr(module, leaf, tensor)


def _initialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies ...), as transformers does for its own checkpoints."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # transformers' initialisers leave these alone
    for name, module in model.named_modules():
        missing = [leaf for leaf in module._non_persistent_buffers_set if getattr(module, leaf) is not None]
        for leaf in missing:
            buffer = torch.empty_like(getattr(module, leaf), device=device)
            setattr(module, leaf, buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer)
        if missing:
            model._init_weights(module)
        for leaf in missing:
            if getattr(module, leaf).isnan().any():
                raise CheckpointError(f"transformers does not compute the buffer {leaf} of {name or 'the model'}; this model cannot be loaded")


def _distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, but each of several tied tensors once, under its first name."""
    found: dict[tuple, str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        found.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else (name,), name)
    return {name: state[name].contiguous() for name in found.values()}


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write model.safetensors, or shards and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes private files
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise InvalidInputError(f"there is no folder {target.parent} to save into; make it first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise InvalidInputError(f"{target} is a file; name a folder")
    if not (target / MANIFEST).is_file():
        raise InvalidInputError(f"{target} holds something that save_quantized did not write; name another folder")
    if not overwrite:
        raise InvalidInputError(f"{target} holds a saved model; name another folder or pass overwrite=True")
