"""Checks for adapters (LoRA and similar) beside a model's weights."""

from __future__ import annotations

from torch import nn

from klfast.core.errors import InvalidInputError


def refuse_wrapper(model: nn.Module) -> None:
    """Raise InvalidInputError for a model inside one of peft's classes, which hides the parts that klfast needs."""
    if type(model).__module__.partition(".")[0] == "peft":
        raise InvalidInputError(
            f"{type(model).__name__} is peft's wrapper of a model; "
            "pass model.get_base_model(), which keeps LoRA's adapters"
        )


def refuse_adapters(model: nn.Module) -> None:
    """Raise InvalidInputError if a layer of the model is wrapped in an adapter, which changes its result."""
    if any(isinstance(getattr(module, "base_layer", None), nn.Module) for module in model.modules()):
        raise InvalidInputError(
            f"{type(model).__name__} holds adapters; merge them first and pass what peft's merge_and_unload() returns"
        )
    refuse_wrapper(model)
