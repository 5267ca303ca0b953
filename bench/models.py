"""Whole models with random weights, plain and with klfast's functions and weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import klfast
from klfast.benchkit.runner import distance, timed
from klfast.benchkit.settings import Settings
from klfast.core.errors import InvalidInputError
from klfast.generation.engine import engine_of
from klfast.models.families import mixer_of
from klfast.models.linears import linears
from klfast.models.matrices import matrices
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec

from . import families

_SCANS = ("klfast::gated_delta_rule", "klfast::selective_scan", "klfast::mamba_chunk_scan")
_STD = 0.02  # of the weights; with transformers' 0.1, 48 layers multiply a rounding error by 10,000


def _mamba(hidden: int, layers: int, vocab: int) -> MambaForCausalLM:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, state_size=16, initializer_range=_STD
        )
    )


def _mamba2(hidden: int, layers: int, vocab: int) -> Mamba2ForCausalLM:
    heads = 2 * hidden // 64
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_heads=heads,
            head_dim=64,
            state_size=128,
            n_groups=1,
            initializer_range=_STD,
        )
    )


MODELS = {"mamba-130m": lambda: _mamba(768, 24, 50280), "mamba2-130m": lambda: _mamba2(768, 24, 50288)}
LARGE = "mamba-1.4b"
LARGE_MODELS = {LARGE: lambda: _mamba(2048, 48, 50280)}
QUICK_MODELS = {"mamba-tiny": lambda: _mamba(128, 2, 512), "mamba2-tiny": lambda: _mamba2(128, 2, 512)}

NAMES = (*MODELS, *LARGE_MODELS, *QUICK_MODELS, *families.CONFIGS)


def require(settings: Settings) -> None:
    """Raise InvalidInputError if models are asked for that there are not."""
    for asked in settings.models:
        if not any(name.startswith(asked) for name in NAMES):
            raise InvalidInputError(f"no model's name begins with {asked!r}; there are {', '.join(NAMES)}")


def plain(name: str) -> nn.Module:
    """Return transformers' own model in float32, with the same weights each time."""
    torch.manual_seed(0)
    if name in families.CONFIGS:
        return families.make(name).eval()
    return (MODELS | LARGE_MODELS | QUICK_MODELS)[name]().eval()


def ours(name: str, specs: Sequence[QuantSpec], activation: str) -> nn.Module:
    """Return the same model with klfast's functions; linear layers take the specs, if there are any, in turn."""
    model = plain(name)
    if specs:
        plan = Plan(dict(zip(linears(model), itertools.cycle(specs), strict=False)), "uniform")
        klfast.quantize_model(model, plan, activation=activation)
    return klfast.accelerate(model)


def error(model: nn.Module, prompt: torch.Tensor) -> float:
    """Return the error of an accelerated float32 model's logits against transformers with the reference of every op.

    In float32, since random weights amplify rounding from layer to layer: after 24 layers two bfloat16 runs have little
    in common. For the same reason a model that rounds activations is checked one linear layer at a time (without
    Mamba's dt_proj, whose weight alone it uses).
    """
    if any(getattr(layer, "activation", None) == "int8" for layer in linears(model).values()):
        return _largest_layer_error(model, prompt)
    found = model(prompt, use_cache=False).logits
    expected = _on_reference(model, lambda: model(prompt, use_cache=False).logits)
    return max(distance(found, expected), distance(own_prefill(model, prompt), expected[:, -1:]))


def same_tokens(model: nn.Module, prompt: torch.Tensor, new: int) -> bool:
    """Return True if klfast.generate continues a prompt as transformers does with the reference of every op."""
    expected = _on_reference(model, lambda: generate(model, prompt, new))
    return torch.equal(klfast.generate(model, prompt, new, eos_token_id=()), expected)


def generate(model: nn.Module, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Generate the most likely tokens with transformers' own loop."""
    return model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)


def _on_reference(model: nn.Module, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    klfast.unaccelerate(model)
    try:
        with klfast.using("reference"):
            return call()
    finally:
        klfast.accelerate(model)


def _largest_layer_error(model: nn.Module, prompt: torch.Tensor) -> float:
    errors = []

    def compare(layer: nn.Module, inputs: tuple[torch.Tensor], found: torch.Tensor) -> None:
        with klfast.using("reference"):
            errors.append(distance(found, layer.forward(*inputs)))

    hooks = [layer.register_forward_hook(compare) for layer in linears(model).values()]
    model(prompt, use_cache=False)
    for hook in hooks:
        hook.remove()
    return max(errors)


def read_bytes(model: nn.Module) -> int:
    """Return the bytes of the linear layers' weights, which each decoded token reads."""
    return sum(one.nbytes for one in matrices(model).values())


def prefill(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Return the logits of a prompt's last token, which is all that generation needs of them."""
    return model(prompt, use_cache=False, logits_to_keep=1).logits


def own_prefill(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Return the same as ``klfast.generate`` computes it: by the native engine where it runs the model."""
    try:
        engine = engine_of(model)
    except klfast.CannotLowerError:
        return prefill(model, prompt)
    return engine(prompt, engine.state()).unsqueeze(1)


def shares(model: nn.Module, prompt: torch.Tensor, seconds: float) -> dict[str, float]:
    """Return the seconds in linear layers and SSM op by a profiled run, and the rest of the ``seconds`` of others.

    There is no rest if the profiled run was so much slower.
    """
    layers = linears(model)
    try:
        engine = engine_of(model)
    except klfast.CannotLowerError:
        gemm_s, scan_s = _gemm_seconds(model, layers, prompt), _scan_seconds(model, prompt)
    else:
        taken = engine.profile(prompt, engine.state())
        mixers = {name for name, module in model.named_modules() if mixer_of(type(module))}
        gemm_s, scan_s = (sum(s for name, s in taken if name in parts) for parts in (layers, mixers))
    rest_s = seconds - gemm_s - scan_s
    found = {"gemm_s": gemm_s, "scan_s": scan_s} | ({"rest_s": rest_s} if rest_s >= 0 else {})
    return {name: round(value, 5) for name, value in found.items()}


def _gemm_seconds(model: nn.Module, layers: Mapping[str, nn.Module], prompt: torch.Tensor) -> float:
    """Time the linear layers on inputs of the shapes that they have in a prefill."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, torch.randn_like(inputs[0]))))
        for layer in layers.values()
    ]
    prefill(model, prompt)
    for hook in hooks:
        hook.remove()

    def gemm() -> None:
        for layer, x in calls:
            layer(x)

    gemm()
    return min(timed(gemm) for _ in range(3))


def _scan_seconds(model: nn.Module, prompt: torch.Tensor) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        prefill(model, prompt)
    return sum(event.self_cpu_time_total for event in record.key_averages() if event.key in _SCANS) / 1e6
