"""Attributes that tell transformers about quantized layers: the remaining ties, and how to save the model."""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import partial
from typing import Any

from torch import nn

from klfast.checkpoint.compressed_tensors import model_quantization_config
from klfast.core.errors import InvalidInputError
from klfast.nn import QuantConv1D, QuantEmbedding, QuantExperts, QuantLinear


def set_own(owner: object, name: str, value: object) -> None:
    """Set an attribute of the instance; None removes it."""
    vars(owner).pop(name, None)
    if value is not None:
        setattr(owner, name, value)


def tell_transformers(model: nn.Module) -> None:
    """Set the attributes of a model with quantized layers that its tie_weights and save_pretrained read."""
    quantized = {module for module in model.modules() if isinstance(module, (QuantLinear, QuantEmbedding))}
    for owner, name, value in [*ties_left(model, quantized), *description(model)]:
        set_own(owner, name, value)


def ties_left(model: nn.Module, quantized: Set[nn.Module]) -> list[tuple[nn.Module, str, dict[str, str]]]:
    """Return the changed ties of the models in ``model`` without those modules: (owner, attribute, its new value)."""
    found: list[tuple[nn.Module, str, dict[str, str]]] = []
    parts: Iterable[Any] = model.modules()
    for part in parts:
        if not getattr(part, "_tied_weights_keys", None) or not hasattr(part, "get_expanded_tied_weights_keys"):
            continue
        names = {name for name, module in part.named_modules(remove_duplicate=False) if module in quantized}
        try:
            ties = part.get_expanded_tied_weights_keys(all_submodels=False)
        except ValueError:  # a pattern that no longer matches anything
            ties = dict(part._tied_weights_keys)
        for attribute, before in (
            ("_tied_weights_keys", ties),
            ("all_tied_weights_keys", getattr(part, "all_tied_weights_keys", {})),  # with those of the models inside
        ):
            left = {
                target: source
                for target, source in before.items()
                if not {target.rpartition(".")[0], source.rpartition(".")[0]} & names
            }
            if left != before:
                found.append((part, attribute, left))
    return found


def description(model: nn.Module) -> list[tuple[object, str, object]]:
    """Return attributes that make transformers' save_pretrained write a loadable folder, or raise; so for resizing.

    Each is (owner, attribute, value).
    """
    if (config := getattr(model, "config", None)) is None:
        return []
    if not describes_transformers(config):
        return [(model, "save_pretrained", partial(_refuse_saving, model))]
    try:
        found = model_quantization_config(model)
    except InvalidInputError:  # groups that do not divide a row
        found = None
    tied = any(isinstance(module, QuantEmbedding) for module in model.modules())
    readable = found is not None and not _only_klfasts(model)
    return [
        (config, "quantization_config", found),
        (model, "save_pretrained", None if readable else partial(_refuse_saving, model)),
        (model, "resize_token_embeddings", partial(_refuse_resizing, model) if tied else None),
    ]


def not_transformers(model: nn.Module) -> str:
    """Return why a model whose configuration is not transformers' cannot be saved."""
    return (
        f"{type(model).__name__} is not a transformers model, and no format holds it quantized; quantize and save the "
        "one that klfast.load_model reads from the same folder"
    )


def _only_klfasts(model: nn.Module) -> str:
    """Return which module no quantization_config describes as it is, and why, a clause; empty if each has one."""
    found = ((name, _why_only_klfasts(module)) for name, module in model.named_modules())
    return next((f"{name} {why}" for name, why in found if why), "")


def _why_only_klfasts(module: nn.Module) -> str:
    if isinstance(module, QuantEmbedding):
        return "is tied to the quantized head"
    if isinstance(module, QuantExperts):
        return "holds quantized experts"
    if isinstance(module, QuantConv1D):
        return "is a Conv1D"
    if not isinstance(module, QuantLinear) or not (module.spec.corrected or module.activation != "exact"):
        return ""
    return "has corrected rows" if module.spec.corrected else "rounds its input to int8"


def describes_transformers(config: object) -> bool:
    """Return True for a transformers configuration; mamba_ssm's models have one of their own."""
    return hasattr(config, "save_pretrained")


def _refuse_resizing(model: nn.Module, *args: object, **kwargs: object) -> None:
    raise InvalidInputError(
        f"the embedding of this {type(model).__name__} reads its rows from the quantized head, whose size is fixed; "
        "resize the full-precision model and quantize it again"
    )


def _refuse_saving(model: nn.Module, *args: object, **kwargs: object) -> None:
    if not describes_transformers(model.config):
        raise InvalidInputError(not_transformers(model))
    if not (why := _only_klfasts(model)):
        model_quantization_config(model)  # raises: groups do not divide a row
    raise InvalidInputError(
        f"transformers could not load this quantized {type(model).__name__} from the folder that save_pretrained would "
        f"write, since {why}; use klfast.save_quantized(model, folder)"
    )
