"""Hymba models with random weights for the suite, and their check, block by block, against the reference of every op."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import klfast
from klfast.models.hymba import HymbaCache, HymbaConfig, HymbaForCausalLM
from klfast.models.layers import linears
from klfast.types import Plan, QuantSpec

from .contest import distance

CONFIGS = {
    "hymba-1.5b": HymbaConfig(),  # the released size
    "hymba-tiny": HymbaConfig(
        vocab_size=512, hidden_size=160, intermediate_size=320, num_hidden_layers=4, num_attention_heads=5, num_key_value_heads=5,
        num_memory_tokens=16, sliding_window=32, global_attn_idx=[0, 3], kv_reuse_group=[[1, 2]],
    ),
}  # fmt: skip
INT4, INT8 = QuantSpec(4, 64), QuantSpec(8, 64)
_SENSITIVE = ("x_proj", "dt_proj", "lm_head")  # small, or known to hurt at 4 bits


def build(name: str) -> HymbaForCausalLM:
    """A model in bfloat16 with the initial weights of training; the same each time."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # at once: float32 first would take twice the memory
    try:
        return HymbaForCausalLM(CONFIGS[name]).eval()
    finally:
        torch.set_default_dtype(usual)


def variant(plain: HymbaForCausalLM, precision: str) -> HymbaForCausalLM:
    """The same weights, not copied, with klfast's functions: "bf16", "int4", or "mixed".

    Mixed: the last block and the layers that are usually sensitive in 8 bits, the rest in 4.
    """
    with torch.device("meta"):
        model = HymbaForCausalLM(plain.config).eval()
    model.load_state_dict(plain.state_dict(), assign=True)
    model.tie_weights()
    if precision != "bf16":
        last = f"layers.{plain.config.num_hidden_layers - 1}."
        wide = {layer for layer in linears(model) if precision == "mixed" and (last in layer or set(_SENSITIVE) & set(layer.split(".")))}
        klfast.quantize_model(model, Plan({layer: INT8 if layer in wide else INT4 for layer in linears(model)}, "uniform"))
    return klfast.accelerate(model)


def error(model: HymbaForCausalLM, tokens: int = 8) -> float:
    """The largest error of a block's, or the head's, contribution: in a prefill, a continued chunk and a decoding step.

    Each is computed once more with the reference of every op from the same input: over many layers random weights blow
    a rounding up until two correct results have little in common.
    """
    errors: list[float] = []
    hooks = [layer.register_forward_pre_hook(_remember, with_kwargs=True) for layer in model.model.layers]
    hooks += [layer.register_forward_hook(functools.partial(_compare, errors), with_kwargs=True) for layer in model.model.layers]
    hooks.append(model.lm_head.register_forward_hook(functools.partial(_compare_head, errors)))
    ids = torch.randint(0, 512, (1, tokens + 4))
    cache = HymbaCache(model.config)
    try:
        for part in ids.split([tokens, 3, 1], dim=1):
            model(part, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return max(errors)


def _remember(layer: nn.Module, arguments: tuple, options: dict) -> None:
    layer.bench_state = copy.deepcopy(options["cache"].layers[layer.mamba.layer])


def _compare(errors: list[float], layer: nn.Module, arguments: tuple, options: dict, found: tuple) -> None:
    (x,), index, cache = arguments, layer.mamba.layer, options["cache"]
    after, cache.layers[index] = cache.layers[index], layer.bench_state
    del layer.bench_state
    with klfast.using("reference"):
        expected = layer.forward(x, **options)
    errors += [distance(found[0] - x, expected[0] - x)]
    errors += [distance(t, vars(cache.layers[index])[name]) for name, t in vars(after).items() if t is not None]
    cache.layers[index] = after


def _compare_head(errors: list[float], head: nn.Module, arguments: tuple, found: torch.Tensor) -> None:
    with klfast.using("reference"):
        errors.append(distance(found, head.forward(*arguments)))


def step_by_step(model: HymbaForCausalLM, cache: HymbaCache, token: torch.Tensor, new: int) -> torch.Tensor:
    """The likeliest ``new`` tokens after ``token`` [1, 1] and what the cache has seen; the cache stays as it is."""
    cache, tokens = copy.deepcopy(cache), []
    for _ in range(new):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)
