"""Quantizing a model in memory, as a plan says."""

from __future__ import annotations

from torch import nn

from klfast.errors import InvalidInputError
from klfast.models.layers import head_name, is_head_tied, linear, linears, require_match
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.types import SCALES, Plan


def quantize_model(model: nn.Module, plan: Plan, *, scale: str | None = None, activation: str = "exact") -> nn.Module:
    """Replace each linear layer that ``plan`` names by a QuantLinear, in place.

    If the head is quantized and the input embedding is tied to it, the embedding becomes a QuantEmbedding that reads its
    rows from the head's tensor. Nothing is replaced unless every layer could be quantized. No parameter of the model takes
    gradients afterwards: dequant_matmul has none.

    Args:
        model: a transformers causal language model, with its weights on any device.
        plan: a spec for each layer to quantize; the others are left alone.
        scale: "absmax" or "mse", as in ``klfast.quantize``. By default as in the sweep that the plan was made from, or
            "absmax" if the plan does not say.
        activation: "exact" or "int8", as in ``klfast.dequant_matmul``.

    Returns:
        ``model`` itself.

    Raises:
        ModelMismatchError: the plan was made for another model.
        UnknownLayerError: the model has no linear layer of a name that the plan bears.
        InvalidInputError: a layer that is quantized already, or whose weight is not finite; a wrong argument, or another
            ``scale`` than the plan's.
    """
    if not isinstance(plan, Plan):
        raise InvalidInputError(f"quantize_model takes a Plan (see klfast.plan), got {type(plan).__name__}")
    if activation not in ("exact", "int8"):
        raise InvalidInputError(f'activation must be "exact" or "int8", got {activation!r}')
    scale = plan_scale(plan, scale)
    layers = linears(model)
    for name in plan.specs:
        if isinstance(layers.get(name), QuantLinear):
            raise InvalidInputError(f"{name} is quantized already ({layers[name].spec}); load the full-precision model again")
    if plan.fingerprint is not None:
        require_match(plan.fingerprint, model, "the plan")
    found = {name: linear(model, name) for name in plan.specs}

    modules: dict[str, nn.Module] = {}
    for name, layer in found.items():
        try:
            modules[name] = QuantLinear.from_linear(layer, plan.specs[name], activation, scale)
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error}") from None
    if plan.specs and is_head_tied(model) and (head := head_name(model)) in modules:
        modules[embedding_name(model)] = QuantEmbedding(modules[head])
    for name, module in modules.items():
        model.set_submodule(name, module.train(model.training))
    return model.requires_grad_(False)


def plan_scale(plan: Plan, asked: str | None = None) -> str:
    """How to choose scales for a plan: as ``asked``, else as in its sweep, else "absmax".

    Raises:
        InvalidInputError: ``asked`` is not what the plan was made with.
    """
    if asked is not None and plan.scale not in (None, asked):
        raise InvalidInputError(
            f"the plan was made from a sweep with scale {plan.scale}, which says nothing about {asked}; "
            f"leave scale out, or sweep with scale {asked}"
        )
    return asked or plan.scale or SCALES[0]


def embedding_name(model: nn.Module) -> str:
    """Module name of the input embedding, which must be a plain nn.Embedding to be read from a quantized head.

    Raises:
        InvalidInputError: it is of another class, which may compute something else than a row look-up.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise InvalidInputError(
            f"the input embedding is a {type(embedding).__name__}, which cannot be read from a quantized head; leave the head out of the plan"
        )
    return next(name for name, module in model.named_modules() if module is embedding)
