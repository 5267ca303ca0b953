"""How ``klfast.generate`` runs a model, and why: the part of ``klfast.explain`` that takes models."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from klfast.acceleration.forwards import is_own
from klfast.core.errors import CannotLowerError
from klfast.generation.engine import lower
from klfast.generation.graph_stepper import how_steps_ran
from klfast.models.adapters import unwrapped
from klfast.models.families import mixer_of, norm_of
from klfast.models.linears import linears
from klfast.nn.experts import QuantExperts
from klfast.nn.linear import QuantLinear
from klfast.nn.split_stack import SplitStack


@dataclass(frozen=True)
class ModelExplanation:
    """How a model's tokens are computed.

    Attributes:
        engine: True if the native engine runs it, else the model's own forward.
        reason: why the engine does not run it; empty if it does.
        steps: how the decode steps of the last long text on a GPU ran, as a graph or why not; empty if there was none.
        layers: by layer, what computes it, a clause each.
    """

    engine: bool
    reason: str
    steps: str
    layers: dict[str, str]

    def __str__(self) -> str:
        first = "the native engine runs the model" if self.engine else f"the model's own forward runs: {self.reason}"
        if self.steps:
            first += f"; its decode steps on the GPU were {self.steps}"
        return "\n".join([first, *(f"  {name}: {what}" for name, what in self.layers.items())])


def explain_model(model: nn.Module) -> ModelExplanation:
    """Return how ``generate`` would run a causal language model now."""
    model = unwrapped(model)
    try:
        names = lower(model).names
    except CannotLowerError as error:
        return ModelExplanation(False, str(error), how_steps_ran(model), _modules(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for name, count in Counter(names).items():
        what = f"a native instruction{_rounding(modules.get(name))}"
        layers[f"{name} x{count}" if count > 1 else name] = what
    return ModelExplanation(True, "", "", layers)


def _modules(model: nn.Module) -> dict[str, str]:
    """Return what computes the mixers, norms and matrices of a model that runs its own forward."""
    matrices = set(linears(model).values())
    found = {}
    for name, module in model.named_modules():
        if module in matrices or isinstance(module, QuantExperts):
            quantized = isinstance(module, (QuantLinear, QuantExperts))
            found[name] = _with(module, "klfast's kernels" if quantized else "torch") + _rounding(module)
        elif mixer_of(type(module)) or norm_of(type(module)):
            found[name] = _with(module, "transformers' own functions")
    return found


def _with(module: nn.Module, otherwise: str) -> str:
    return "klfast's kernels" if is_own(module.__dict__.get("forward")) else otherwise


def _rounding(module: nn.Module | None) -> str:
    """Return a clause on the inputs that a layer rounds, or any stack of experts; empty if none."""
    layers = module.modules() if isinstance(module, (QuantExperts, SplitStack)) else [module]
    rounds = any(isinstance(layer, QuantLinear) and layer.activation == "int8" for layer in layers)
    return ", int8 activations" if rounds else ""
