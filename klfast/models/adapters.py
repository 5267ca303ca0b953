"""Adapters (LoRA and similar) beside a model's weights, and the wrappers of peft and torch.compile around a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.core.errors import InvalidInputError

_MIXING = ("POLY", "XLORA")  # peft's types (0.21) whose wrapper mixes adapters


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wrapped; the model itself if it is in no such wrapper."""
    inner = getattr(model, "_orig_mod", None) if type(model).__name__ == "OptimizedModule" else None
    return inner if isinstance(inner, nn.Module) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and peft, with its adapters, or the model itself.

    Raises:
        InvalidInputError: peft's wrapper does more than call the model, so that its results differ from the model's.
    """
    while _is_pefts(model := uncompiled(model)):
        if not hasattr(model, "get_base_model"):
            refuse_wrapper(model)
        if why := _own_work(model):
            raise InvalidInputError(
                f"{type(model).__name__} is peft's wrapper of a model, and {why}, which klfast does not; call its own "
                "generate and forward"
            )
        wrapper: Any = model
        model = wrapper.get_base_model()
    return model


def _is_pefts(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "peft"


def _own_work(wrapper: Any) -> str:
    """Return a clause on what peft's wrapper does besides calling its model; empty if nothing."""
    config = getattr(wrapper, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        return "puts learned tokens in front of each text"
    if getattr(config, "alora_invocation_tokens", None):
        return "begins to adapt at certain tokens of the text"
    return "mixes adapters" if getattr(getattr(config, "peft_type", None), "value", None) in _MIXING else ""


def refuse_wrapper(model: nn.Module) -> None:
    """Raise InvalidInputError for a model inside one of peft's classes, which hides the parts that klfast needs."""
    if _is_pefts(model):
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
