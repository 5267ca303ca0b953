"""Exchange of linear layers for packed ones in a transformers model that is being loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klfast.checkpoint.manifest import MANIFEST, read_layer_facts, read_manifest
from klfast.checkpoint.tensors import Facts, Tensors, read_quantized_layers
from klfast.checkpoint.transformers_view import tell_transformers
from klfast.core.errors import CheckpointError, InvalidInputError, KernelUnavailableError
from klfast.dispatch import registry
from klfast.models.linears import linear_names
from klfast.models.matrices import is_linear
from klfast.models.vocabulary import embedding_name, embedding_scale
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.conv1d import is_conv1d
from klfast.quant.spec import QuantSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from transformers import PreTrainedModel


def put_in(
    model: PreTrainedModel, config: QuantizationConfig, files: Collection[str], device_map: Any
) -> dict[str, str]:
    """Put QuantLinear layers without values into a model, and a QuantEmbedding where only a tied head is stored.

    Args:
        model: on the meta device; its weights are not tied yet.
        config: which layers are quantized, and how.
        files: the paths of the weight files.
        device_map: from_pretrained's; None stands for the CPU.

    Returns:
        For ``finish``, the layers that share another's weight, {name: that layer}: they have no tensors meanwhile,
        since transformers would look for them in the files.

    Raises:
        KernelUnavailableError: klfast cannot run some of these weights, as the message says in one sentence. The model
            is unchanged.
        CheckpointError: a file is damaged, or differs from what ``klfast.save_quantized`` wrote.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise KernelUnavailableError("klfast reads packed weights from safetensors files only.")
    folder = Path(next(iter(files))).parent
    specs, facts = _specs(model, config), _layer_facts(folder)
    _require_kernels({spec.format.name for spec in specs.values()}, _device_types(device_map))
    try:
        tensors = _without_values(folder, files, model.dtype)
        stored = tensors.names()
        _require_places(folder, stored, specs, config)
        shared = _shared(model, specs, stored)
        own = {name: spec for name, spec in specs.items() if name not in shared}
        layers = read_quantized_layers(model, tensors, own, facts or _usual_facts(model, specs))
        embeddings = _tied_embeddings(model, layers, stored)
    except (CheckpointError, InvalidInputError) as error:
        if facts is not None:
            raise
        raise KernelUnavailableError(f"{str(error).removesuffix('; save the model again')}.") from error
    for name, module in {**layers, **embeddings, **{name: nn.Identity() for name in shared}}.items():
        model.set_submodule(name, module)
    tell_transformers(model)
    return shared


def finish(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Give the loaded layers the layout of their device's kernels, and have the model saved as a quantized one."""
    from transformers import PreTrainedModel

    for name, first in shared.items():
        model.set_submodule(name, model.get_submodule(first))
    for part in model.modules():
        if isinstance(part, QuantLinear):
            part.to(part.quantized.device)
        elif isinstance(part, PreTrainedModel):  # whose mixers avoid .weight, with larger errors, where this is set
            vars(part.config).pop("_is_quantized", None)
    tell_transformers(model)


# Which layers, and whether klfast runs them ------------------------------------------------------------------------


def _specs(model: nn.Module, config: QuantizationConfig) -> dict[str, QuantSpec]:
    """Return the spec of each linear layer that a config quantizes, under each of its names."""
    from compressed_tensors.utils.match import is_match, match_targets

    if config.kv_cache_scheme is not None:
        raise KernelUnavailableError("klfast does not quantize the cache.")
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    specs = {}
    for name, module in model.named_modules(remove_duplicate=False):
        quantizable = is_linear(module) or isinstance(module, nn.Embedding)
        if not quantizable or is_match(name, module, config.ignore or ()):
            continue  # compressed-tensors quantizes no others (0.20, quantization/lifecycle/apply.py), nor a Conv1D
        if targets := match_targets(name, module, schemes):
            if type(module) is not nn.Linear and not is_conv1d(module):
                kind = type(module).__name__
                raise KernelUnavailableError(f"{name} is quantized, which is no nn.Linear but a {kind}.")
            specs[name] = _spec(schemes[targets[0]], config.format)
    return specs


def _spec(scheme: QuantizationScheme, usual_format: str) -> QuantSpec:
    if (scheme.format or usual_format) != "pack-quantized":
        raise KernelUnavailableError(f"some layers are in the format {scheme.format or usual_format}.")
    if scheme.weights is None or scheme.input_activations is not None or scheme.output_activations is not None:
        raise KernelUnavailableError("klfast does not quantize activations in the way that this model asks for.")
    try:
        return QuantSpec.from_compressed_tensors(scheme.model_dump())
    except InvalidInputError as error:
        raise KernelUnavailableError(f"{error}.") from error


def _device_types(device_map: Any) -> set[str]:
    if device_map is None:
        return {"cpu"}
    if isinstance(device_map, str):  # "auto" and the like: transformers fills the accelerator first
        accelerator = torch.accelerator.current_accelerator()
        return {"cpu"} if accelerator is None else {accelerator.type}
    return {torch.device(place).type for place in device_map.values() if place != "disk"}


def _require_kernels(formats: Collection[str], devices: Collection[str]) -> None:
    for device in devices:
        if not registry.has_kernel("dequant_matmul", device.upper()):
            raise KernelUnavailableError(registry.why_no_kernel(device, "dequant_matmul"))
        if reason := registry.why_no_format("dequant_matmul", device.upper(), formats):
            raise KernelUnavailableError(reason)


# What the files hold -----------------------------------------------------------------------------------------------


def _layer_facts(folder: Path) -> Facts | None:
    """Return what klfast.json says, after a check of all files; None if klfast did not write the folder."""
    return read_layer_facts(folder, read_manifest(folder, verify=True)) if (folder / MANIFEST).is_file() else None


def _usual_facts(model: nn.Module, specs: Collection[str]) -> Facts:
    return {name: (module.weight.dtype, "exact") for name, module in linear_names(model).items() if name in specs}


def _without_values(folder: Path, files: Collection[str], dtype: torch.dtype) -> Tensors:
    """Return the files' tensors on the meta device, except the weights' shapes, which are compared."""
    from transformers.modeling_utils import load_state_dict

    real = Tensors.of_files(folder, list(files), torch.device("cpu"), None)
    readers: dict[str, Callable[[], torch.Tensor]] = {name: partial(real.take, name) for name in real.names()}
    for file in files:
        empty: dict[str, torch.Tensor] = load_state_dict(file, map_location="meta")
        readers.update(
            (name, partial(torch.Tensor.detach, tensor))
            for name, tensor in empty.items()
            if not name.endswith(".weight_shape")
        )
    return Tensors(folder, readers, dtype)


def _require_places(folder: Path, stored: Collection[str], specs: Collection[str], config: QuantizationConfig) -> None:
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    strange = packed.difference(specs)
    if strange and all(re.search(r"\.experts\.\d+\.", name) for name in strange):
        _require_one_kind_of_experts(folder, config)
        raise KernelUnavailableError("transformers stacks experts; klfast.load_quantized keeps them packed.")
    if strange:
        raise CheckpointError(
            f"{folder} holds the packed weight of {min(strange)}, which is no linear layer of this model; load it with "
            "the class that it was saved from (AutoModelForCausalLM), or with klfast.load_quantized"
        )


def _require_one_kind_of_experts(folder: Path, config: QuantizationConfig) -> None:
    """Raise CheckpointError unless transformers decompresses the experts: it reads all of them as one kind (5.23)."""
    kinds = {
        (group.weights.num_bits, group.weights.symmetric)
        for group in config.config_groups.values()
        if group.weights is not None
        and any(target.startswith("re:") and "experts" in target for target in group.targets)
    }
    if len(kinds) > 1 or (kinds and not all(symmetric for _, symmetric in kinds)):
        raise CheckpointError(
            f"{folder} holds experts of several precisions, or with zero points, which transformers cannot read; "
            "load it with klfast.load_quantized"
        )


def _shared(model: PreTrainedModel, specs: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Return the layers whose weight is stored under the name of another, which they share: {name: that name}."""
    ties = {target.removesuffix(".weight"): source for target, source in model.all_tied_weights_keys.items()}
    return {
        name: source.removesuffix(".weight")
        for name, source in ties.items()
        if name in specs and source.removesuffix(".weight") in specs and f"{name}.weight_packed" not in stored
    }


def _tied_embeddings(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], stored: Collection[str]
) -> dict[str, QuantEmbedding]:
    found = {}
    for target, source in model.all_tied_weights_keys.items():
        head = layers.get(target.removesuffix(".weight"))
        if head is not None and source not in stored:
            embedding = embedding_name(model)
            if source != f"{embedding}.weight":
                raise CheckpointError(f"{target} is tied to {source}, which is not the input embedding")
            found[embedding] = QuantEmbedding(head, embedding_scale(model))
    return found
