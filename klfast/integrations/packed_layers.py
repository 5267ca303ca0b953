"""Exchange of linear layers for packed ones in a transformers model that is being loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klfast.checkpoint.compressed_tensors import with_corrected
from klfast.checkpoint.manifest import MANIFEST, read_corrected, read_layer_facts, read_manifest, read_roundings
from klfast.checkpoint.tensors import Facts, Tensors, read_quantized_layers
from klfast.checkpoint.transformers_view import tell_transformers
from klfast.core.errors import CheckpointError, InvalidInputError, KernelUnavailableError
from klfast.dispatch import registry
from klfast.integrations import packed_experts
from klfast.integrations.schemes import Schemes
from klfast.models.matrices import is_linear, named_matrices, replacements
from klfast.models.vocabulary import embedding_name, embedding_scale
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.conv1d import is_conv1d
from klfast.quant.formats import ROWS, check_rows
from klfast.quant.spec import QuantSpec

_REMEDY = "fetch or save it again"
# A weight, or a zero point that an expert with a symmetric spec has beside those of its stack.
_PACKED = re.compile(r"\.weight_packed$|\.experts\.\d+\.\w+\.weight_zero_point$")

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import PreTrainedModel


def put_in(
    model: PreTrainedModel, config: QuantizationConfig, files: Collection[str], device_map: Any
) -> dict[str, str]:
    """Put layers without values into a model: QuantLinear, QuantExperts, and a QuantEmbedding for a head stored alone.

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
    manifest = _manifest(folder)
    facts = None if manifest is None else read_layer_facts(folder, manifest)
    roundings = {} if manifest is None else read_roundings(folder, manifest)
    schemes = Schemes(config)
    specs = _linear_specs(model, schemes)
    try:
        tensors = _without_values(folder, files, model)
        specs |= packed_experts.join(model, tensors, schemes)
        if manifest is not None:
            specs = with_corrected(specs, read_corrected(folder, manifest))
        _require_kernels({spec.base.format.name for spec in specs.values()}, _device_types(device_map))
        stored = tensors.names()
        _require_places(folder, stored, specs)
        shared = _shared(model, specs, stored)
        own = {name: spec for name, spec in specs.items() if name not in shared}
        layers = read_quantized_layers(model, tensors, own, facts or _usual_facts(model, specs))
        _check_rows(folder, files, layers)
        embeddings = _tied_embeddings(model, layers, stored)
    except (CheckpointError, InvalidInputError) as error:
        if facts is not None:
            raise
        raise KernelUnavailableError(f"{str(error).removesuffix(f'; {_REMEDY}')}.") from error
    for name in layers.keys() & roundings:
        layers[name].rounding = roundings[name]
    emptied = {name: nn.Identity() for name in shared}
    for name, module in {**replacements(model, layers), **embeddings, **emptied}.items():
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


def _linear_specs(model: nn.Module, schemes: Schemes) -> dict[str, QuantSpec]:
    """Return the spec of each quantized linear layer, under each of its names."""
    specs = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            continue  # compressed-tensors quantizes no others (0.20, quantization/lifecycle/apply.py), nor a Conv1D
        if (spec := schemes.spec(name, module)) is not None:
            if type(module) is not nn.Linear and not is_conv1d(module):
                kind = type(module).__name__
                raise KernelUnavailableError(f"{name} is quantized, but is a {kind}, not an nn.Linear.")
            specs[name] = spec
    return specs


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


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return klfast.json, after a check of all files; None if klfast did not write the folder."""
    return read_manifest(folder, verify=True) if (folder / MANIFEST).is_file() else None


def _usual_facts(model: nn.Module, specs: Collection[str]) -> Facts:
    return {name: (one.tensor.dtype, "exact") for name, one in named_matrices(model).items() if name in specs}


def _without_values(folder: Path, files: Collection[str], model: PreTrainedModel) -> Tensors:
    """Return the files' tensors on the meta device, except the weights' shapes, which are compared.

    They have the names that transformers gives them.
    """
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
    names = _names_in(model, readers)
    return Tensors(folder, {names[name]: read for name, read in readers.items()}, model.dtype, _REMEDY)


def _check_rows(folder: Path, files: Collection[str], layers: Mapping[str, QuantLinear]) -> None:
    """Raise CheckpointError if corrected rows in the files are none of their layer's."""
    real = Tensors.of_files(folder, list(files), torch.device("cpu"), None)
    for name, layer in layers.items():
        if layer.spec.corrected:
            try:
                check_rows(real.take(f"{name}.weight_{ROWS}"), layer.out_features)
            except InvalidInputError as error:
                raise CheckpointError(f"{folder}: the tensors of {name} do not fit: {error}; {_REMEDY}") from None


def _names_in(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of each tensor of a file; Kimi-Linear and Nemotron-H were published with others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return {
        name: name if name.rpartition(".")[0] in modules else rename_source_key(name, renamings, [])[0]
        for name in stored
    }


def _require_places(folder: Path, stored: Collection[str], specs: Collection[str]) -> None:
    packed = {name.rpartition(".weight_")[0] for name in stored if _PACKED.search(name)}
    if not (strange := packed.difference(specs)):
        return
    if all(re.search(r"\.experts\.\d+\.", name) for name in strange):
        raise KernelUnavailableError(f"klfast does not know experts with the matrix {min(strange)}, or its spec.")
    raise CheckpointError(
        f"{folder} holds the packed weight of {min(strange)}, which is not a linear layer of this model; load it with "
        "the class that it was saved from (AutoModelForCausalLM), or with klfast.load_quantized"
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
