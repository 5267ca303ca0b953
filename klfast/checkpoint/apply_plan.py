"""Quantization of a model in memory by a plan."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from klfast.checkpoint.plan_choices import choices
from klfast.checkpoint.transformers_view import description, set_own, ties_left
from klfast.core.arguments import ACTIVATIONS
from klfast.core.errors import InvalidInputError
from klfast.core.progress import Progress
from klfast.models.adapters import refuse_wrapper, uncompiled
from klfast.models.batches import Batches
from klfast.models.expert_names import expert_in, expert_name
from klfast.models.fingerprint import require_match
from klfast.models.head import head_name, is_head_tied
from klfast.models.linears import refuse_moving_weights
from klfast.models.matrices import Matrix, named_matrices, replacements, sharers, with_experts
from klfast.models.sizes import warn_unquantizable
from klfast.models.vocabulary import embedding_name, embedding_scale
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.conv1d import quantized_class
from klfast.planning.everywhere import plan_everywhere
from klfast.planning.plan_file import Plan
from klfast.quant.rounding import quantize
from klfast.quant.spec import ROUNDINGS, SCALES, QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.rounded import RoundedModel
from klfast.rounding.walk import round_model


def quantize_model(
    model: nn.Module,
    plan: Plan | QuantSpec | str,
    *,
    scale: str | None = None,
    activation: str | None = None,
    rounding: str = "nearest",
    calibration: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> nn.Module:
    """Replace each linear layer that ``plan`` names by a QuantLinear, and experts by QuantExperts, in place.

    If the head is quantized and the input embedding is tied to it, the embedding becomes a QuantEmbedding that reads
    its rows from the head's tensor. Layers that share a weight continue to share it: it is quantized once. The model's
    configuration then describes the quantized layers (``quantization_config``), so that its own save_pretrained writes
    a folder that transformers loads; where that is impossible, save_pretrained raises. A warning tells if a large part
    of the model is in classes that klfast does not know (gpt-oss's experts) and stays as it is.

    A plan may name a stack of experts, or single ones of it, "...experts.gate_up_proj.17" for expert 17, each with a
    spec of its own; experts that it does not name keep full precision.

    Either everything is replaced or nothing, even if interrupted. Biases and other parameters stay the same objects,
    except what is left of a stack in full precision.

    Args:
        model: a transformers causal language model, or one of the package mamba_ssm (MambaLMHeadModel), with its
            weights on any device.
        plan: a spec for each layer to quantize; the others are left alone. Or one spec for every layer, the head and
            experts included, such as "int4-g64-sym".
        scale: "absmax" or "mse", as in ``klfast.quantize``. By default as in the sweep that the plan was made from, or
            "absmax" if the plan does not record it.
        activation: "exact" or "int8" in every layer, as in ``klfast.dequant_matmul``, or "auto": in each what the plan
            records. By default what the plan records, or "exact" if it records nothing.
        rounding: "nearest", or "gptq": each weight is rounded so that the output of its layer, on calibration text,
            changes least, block by block (docs/ROUNDING.md). The format is the same. It takes some minutes, and needs a
            model whose blocks form a chain, as a sweep does. What the text does not reach (an expert with few tokens)
            is rounded to nearest; a warning says what and why.
        calibration: token ids for "gptq", as for ``klfast.sweep``; 16,000 tokens or more.
        resume: for "gptq", a folder that keeps what is rounded, block by block. If it exists, rounding goes on from
            there, to the same result. It is no longer needed once the model is saved.
        progress: of "gptq", as for ``klfast.sweep``.

    Returns:
        ``model`` itself.

    Raises:
        ModelMismatchError: the plan was made for another model.
        UnknownLayerError: the plan names a linear layer that the model does not have.
        InvalidInputError: a layer is already quantized, or its weight is not finite or not in memory; a quantized head
            is tied to an embedding that does more than look up rows and scale them; there are different specs or
            activations for one shared weight, or for a stack and one of its experts; the model is an RWKV with
            ``rescale_every`` or in peft's wrapper; an argument is invalid, ``scale`` differs from the plan's, or "auto"
            finds no activations in the plan; rounding is "gptq" and there is no calibration text, or the model is not a
            chain.
    """
    given, model = model, uncompiled(model)
    refuse_wrapper(model)
    if isinstance(plan, (QuantSpec, str)):
        plan = plan_everywhere(model, QuantSpec.of(plan))
    if not isinstance(plan, Plan):
        raise InvalidInputError(
            f"quantize_model takes a Plan (see klfast.plan) or a spec for all layers, got {type(plan).__name__}"
        )
    activations = plan_activations(plan, activation)
    _check_rounding(rounding, calibration, resume)
    scale = plan_scale(plan, scale)
    refuse_moving_weights(model)
    groups = {names[0]: names for names in sharers(model)}
    known = named_matrices(model)
    known |= with_experts(known)
    for name in (name for name in plan.specs if name in known):
        _refuse_unfit(name, known[name], plan.specs[name])
    if plan.fingerprint is not None:
        require_match(plan.fingerprint, model, "the plan")
    chosen = choices(model, plan, activations)
    with_embedding = bool(chosen) and is_head_tied(model) and head_name(model) in chosen
    embedded_times = embedding_scale(model) if with_embedding else None

    rounded = RoundedModel()
    if calibration is not None:
        specs = {name: spec for name, (spec, _) in chosen.items()}
        rounded = round_model(model, specs, calibration, scale=scale, resume=resume, progress=progress)
        _tell(rounded)
    layers: dict[str, QuantLinear] = {}
    for name, (spec, mode) in chosen.items():
        same = {each: known[each] for each in _names(name, groups)}
        if (qt := rounded.tensors.get(name)) is None:
            qt = _to_nearest(name, known[name], spec, scale)
        layers |= _quantized(same, qt, mode, "nearest" if name in rounded.nearest else rounding)
    modules = replacements(model, layers)
    if with_embedding:
        embedding = QuantEmbedding(layers[head_name(model)], embedded_times)
        modules[embedding_name(model)] = embedding.train(model.training)
    if chosen:
        warn_unquantizable(model, "quantize_model")
    _swap(model, modules)
    return given


def _check_rounding(rounding: str, calibration: Batches | None, resume: object) -> None:
    if rounding not in ROUNDINGS:
        raise InvalidInputError(f'rounding must be "nearest" or "gptq", got {rounding!r}')
    if rounding == "gptq" and calibration is None:
        raise InvalidInputError('rounding="gptq" needs calibration text: pass calibration=klfast.token_batches(...)')
    if rounding != "gptq" and calibration is not None:
        raise InvalidInputError('only rounding="gptq" reads calibration text; pass that, or no calibration')
    if rounding != "gptq" and resume is not None:
        raise InvalidInputError('only rounding="gptq" can be resumed; pass that, or no resume')


def _tell(rounded: RoundedModel) -> None:
    """Warn, in one line, of what was rounded to nearest, and why."""
    if rounded.notes:
        listed = ", ".join(f"{name} ({why})" for name, why in rounded.notes.items())
        warnings.warn(f"quantize_model: rounded to nearest: {listed}", stacklevel=3)


def _names(first: str, groups: Mapping[str, list[str]]) -> list[str]:
    """Return all names of the matrix, or of the single expert's, that has this one first."""
    if first in groups:
        return groups[first]
    of = expert_in(first)
    assert of is not None
    return [expert_name(stack, of[1]) for stack in groups[of[0]]]


def _refuse_unfit(name: str, one: Matrix, spec: QuantSpec) -> None:
    if one.is_of_experts and spec.corrected:
        raise InvalidInputError(f"{name} holds experts, whose rows cannot be corrected; plan {spec.base} for it")
    if why := spec.why_unfit(one.shape[0]):
        raise InvalidInputError(f"{name}: {why}")
    if one.is_quantized:
        how = one.holder.spec if isinstance(one.holder, QuantLinear) else "its experts in several precisions"
        raise InvalidInputError(f"{name} is quantized already ({how}); load the full-precision model again")
    if one.tensor.is_meta:
        raise InvalidInputError(
            f"{name} has no weight in memory (it is on the meta device); load the model without offloading it"
        )


def _to_nearest(name: str, one: Matrix, spec: QuantSpec, scale: str) -> QuantizedTensor:
    try:
        return quantize(one.weight, spec, scale=scale)
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from None


def _quantized(
    same: Mapping[str, Matrix], qt: QuantizedTensor, activation: str, rounding: str
) -> dict[str, QuantLinear]:
    """Return the replacements of matrices that are one, by name; layers with one bias get one module."""
    dtype = next(iter(same.values())).tensor.dtype
    made: dict[int, QuantLinear] = {}  # by bias
    found = {}
    for name, one in same.items():
        bias: Any = one.bias
        if id(bias) not in made:
            layer = quantized_class(one.holder)(qt, bias, activation, dtype=dtype).train(one.holder.training)
            layer.rounding = rounding
            layer.bias = bias  # the same parameter, so that optimizers and requires_grad stay as they are
            made[id(bias)] = layer
        found[name] = made[id(bias)]
    return found


def _swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put the modules in their places, and describe them to transformers; after an interruption nothing has changed."""
    attributes = ties_left(model, {model.get_submodule(name) for name in modules})
    with ExitStack() as undo:
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            home = model.get_submodule(parent)._modules
            undo.callback(home.__setitem__, leaf, home[leaf])
            home[leaf] = module
        for owner, name, value in [*attributes, *(description(model) if modules else [])]:
            undo.callback(set_own, owner, name, vars(owner).get(name))
            set_own(owner, name, value)
        undo.pop_all()


def plan_scale(plan: Plan, asked: str | None = None) -> str:
    """Return the scale method for a plan: the one asked for, else its sweep's, else "absmax".

    Raises:
        InvalidInputError: ``asked`` differs from the plan's.
    """
    if asked is not None and plan.scale not in (None, asked):
        raise InvalidInputError(
            f"the plan was made from a sweep with scale {plan.scale}, which does not apply to {asked}; "
            f"leave scale out, or sweep with scale {asked}"
        )
    return asked or plan.scale or SCALES[0]


def plan_activations(plan: Plan, asked: str | None = None) -> dict[str, str]:
    """Return the activation of each layer of a plan: the one asked for, else the plan's, else "exact".

    Raises:
        InvalidInputError: there is no such activation, or "auto" was asked for and the plan records none.
    """
    if asked not in (None, "auto", *ACTIVATIONS):
        raise InvalidInputError(f'activation must be "exact", "int8" or "auto", got {asked!r}')
    if asked == "auto" and plan.specs and not plan.activations:
        raise InvalidInputError(
            'the plan records no activations; make it with activation="auto" (klfast plan --activation auto)'
        )
    if asked is None or asked == "auto":
        return {name: plan.activations.get(name, "exact") for name in plan.specs}
    return dict.fromkeys(plan.specs, asked)
