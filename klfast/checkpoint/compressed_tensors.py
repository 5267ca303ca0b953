"""compressed-tensors' ``quantization_config`` in the config.json of a saved folder.

It follows the ``pack-quantized`` format of that package: one config group for each distinct spec, its targets the full
names of the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from klfast.checkpoint.json_files import read_json
from klfast.core.errors import CheckpointError, InvalidInputError, shortened
from klfast.models.expert_names import expert_name
from klfast.models.linears import linear_names
from klfast.models.matrices import split_stacks
from klfast.nn import QuantLinear
from klfast.quant.spec import QuantSpec, storable_spec


def quantization_config(layers: Mapping[str, tuple[QuantSpec, int]], unquantized: Iterable[str]) -> dict[str, object]:
    """Return the ``quantization_config`` of a model.

    Args:
        layers: spec and in_features of each quantized layer, by name.
        unquantized: names of the other linear layers.

    Raises:
        InvalidInputError: the format cannot store a layer's groups.
    """
    groups: dict[QuantSpec, list[str]] = {}
    for name, (spec, in_features) in layers.items():
        stored = storable_spec(spec, in_features)
        if stored.group_length(in_features) != spec.group_length(in_features):
            raise InvalidInputError(
                f"{name}: the file format has no shorter last group, which {spec} needs at {in_features} inputs; "
                f"plan {stored} for it (klfast.plan does)"
            )
        groups.setdefault(stored, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": names, **spec.format.to_compressed_tensors(spec)}
            for i, (spec, names) in enumerate(groups.items())
        },
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def model_quantization_config(model: nn.Module, targets: Mapping[str, str] | None = None) -> dict[str, object]:
    """Return the ``quantization_config`` (a dict, as in config.json) of a model with QuantLinear layers.

    ``targets`` has the names, or patterns, of layers that files call otherwise.

    Raises:
        InvalidInputError: nothing is quantized, or the format cannot store a layer's groups.
    """
    layers = quantized_layers(model)
    called = targets or {}
    specs = {called.get(name, name): (module.spec, module.in_features) for name, module in layers.items()}
    return quantization_config(specs, [name for name in linear_names(model) if name not in layers])


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return a model's QuantLinear layers, under each of their names; raise InvalidInputError if there are none.

    Those of a SplitStack are its quantized experts, each a layer of its own.
    """
    layers = {name: module for name, module in linear_names(model).items() if isinstance(module, QuantLinear)}
    for stack, held in split_stacks(model).items():
        layers |= {expert_name(stack, expert): layer for expert, layer in held.layers()}
    if not layers:
        raise InvalidInputError(
            "no layer of the model is quantized; use klfast.quantize_model first, or the model's own save_pretrained"
        )
    return layers


def read_specs(folder: Path) -> dict[str, QuantSpec]:
    """Return the spec of each layer in the ``quantization_config`` of a folder's config.json.

    This is the inverse of ``quantization_config``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    config = read_json(folder / "config.json")
    specs: dict[str, QuantSpec] = {}
    try:
        for group in config["quantization_config"]["config_groups"].values():
            specs.update(dict.fromkeys(group["targets"], QuantSpec.from_compressed_tensors(group)))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else shortened(str(error), 200)
        raise CheckpointError(
            f"{folder}: the description of the quantized layers is damaged ({reason}); save the model again"
        ) from None
    return specs


def with_corrected(specs: Mapping[str, QuantSpec], corrected: Mapping[str, int]) -> dict[str, QuantSpec]:
    """Return the specs with their numbers of corrected rows, of which ``quantization_config`` says nothing."""
    return {name: replace(spec, corrected=corrected.get(name, 0)) for name, spec in specs.items()}
