"""Hymba models with random weights for the suite, and their check, part by part, against the reference of every op."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import klfast
from klfast.benchkit.runner import distance
from klfast.engine.engine import Engine
from klfast.engine.state import State
from klfast.models.hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from klfast.models.hymba.mixer import HymbaMixer
from klfast.models.linears import linears
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec

CONFIGS = {
    "hymba-1.5b": HymbaConfig(),  # the released size
    "hymba-tiny": HymbaConfig(
        vocab_size=512,
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_memory_tokens=16,
        sliding_window=32,
        global_attn_idx=[0, 3],
        kv_reuse_group=[[1, 2]],
    ),
}
INT4, INT8 = QuantSpec(4, 64), QuantSpec(8, 64)
_SENSITIVE = ("x_proj", "dt_proj", "lm_head")  # small, or known to suffer at 4 bits


def build(name: str) -> HymbaForCausalLM:
    """Return a model in bfloat16 with the initial weights of training, the same each time."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # directly, since float32 would take twice the memory
    try:
        return HymbaForCausalLM(CONFIGS[name]).eval()
    finally:
        torch.set_default_dtype(usual)


def variant(plain: HymbaForCausalLM, precision: str) -> HymbaForCausalLM:
    """Return a model with the same weights, not copied, and klfast's functions: "bf16", "int4", or "mixed".

    Mixed: the last block and usually sensitive layers in 8 bits, the rest in 4.
    """
    with torch.device("meta"):
        model = HymbaForCausalLM(plain.config).eval()
    model.load_state_dict(plain.state_dict(), assign=True)
    model.tie_weights()
    if precision != "bf16":
        last = f"layers.{plain.config.num_hidden_layers - 1}."
        wide = {
            layer
            for layer in linears(model)
            if precision == "mixed" and (last in layer or set(_SENSITIVE) & set(layer.split(".")))
        }
        klfast.quantize_model(
            model, Plan({layer: INT8 if layer in wide else INT4 for layer in linears(model)}, "uniform")
        )
    return klfast.accelerate(model)


def error(model: HymbaForCausalLM, tokens: int = 8) -> float:
    """Return the largest error of a mixer, a feed-forward part or the head, in a prefill, a continued chunk and a step.

    Each is recomputed with the reference of every op from the same input: over many layers, random weights amplify
    rounding until two correct results have little in common.
    """
    errors: list[float] = []
    hooks = [
        part.register_forward_hook(functools.partial(_compare, errors))
        for part in [*(layer.moe for layer in model.model.layers), model.lm_head]
    ]
    for mixer in (layer.mamba for layer in model.model.layers):
        hooks += [
            mixer.register_forward_pre_hook(_remember),
            mixer.register_forward_hook(functools.partial(_compare_mixer, errors)),
        ]
    ids, cache = torch.randint(0, 512, (1, tokens + 4)), HymbaCache(model.config)
    try:
        for part in ids.split([tokens, 3, 1], dim=1):
            model(part, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return max(errors)


def _compare(errors: list[float], module: nn.Module, arguments: tuple, found: torch.Tensor) -> None:
    with klfast.using("reference"):
        errors.append(distance(found, module.forward(*arguments)))


def _remember(mixer: HymbaMixer, arguments: tuple) -> None:
    mixer.bench_state = copy.deepcopy(arguments[-1].layers[mixer.layer])


def _compare_mixer(errors: list[float], mixer: HymbaMixer, arguments: tuple, found: tuple) -> None:
    """Compare the output and the updated cache, both computed from the same previous cache."""
    cache = arguments[-1]
    after, cache.layers[mixer.layer] = cache.layers[mixer.layer], mixer.bench_state
    del mixer.bench_state
    with klfast.using("reference"):
        errors.append(distance(found[0], mixer.forward(*arguments)[0]))
    errors += [distance(t, vars(cache.layers[mixer.layer])[name]) for name, t in vars(after).items() if t is not None]
    cache.layers[mixer.layer] = after


def step_by_step(model: HymbaForCausalLM, cache: HymbaCache, token: torch.Tensor, new: int) -> torch.Tensor:
    """Return the ``new`` most likely tokens after a cache and ``token`` [1, 1]; the cache is not changed."""
    cache, tokens = copy.deepcopy(cache), []
    for _ in range(new):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def steps_of_engine(engine: Engine, state: State, token: torch.Tensor, new: int) -> torch.Tensor:
    """Return the ``new`` most likely tokens after an engine's state and ``token`` [1, 1]; the state is not changed."""
    state, tokens = state.copy(), []
    for _ in range(new):
        token = engine(token, state).argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, dim=1)
