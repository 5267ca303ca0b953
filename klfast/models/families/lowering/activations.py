"""Activation functions of models, as the engine names them."""

from __future__ import annotations

from klfast.core.errors import CannotLowerError

_GATES = {
    "silu": "silu_gate",
    "swish": "silu_gate",
    "siluactivation": "silu_gate",
    "geluactivation": "gelu_gate",
    "gelutanh": "gelu_tanh_gate",
    "newgeluactivation": "gelu_tanh_gate",
}


def activation_gate(activation: object) -> str:
    """Return the combination of ``Builder.combine`` that multiplies an activation, of transformers', by another row."""
    name = _name(activation)
    if name.lower() not in _GATES:
        raise CannotLowerError(f"an activation is {name}")
    return _GATES[name.lower()]


def require_silu(activation: object) -> None:
    """Require that an activation, by its name, function or module, is SiLU."""
    _require(activation, "silu", "swish", "siluactivation")


def require_squared_relu(activation: object) -> None:
    """Require that an activation is the square of ReLU."""
    _require(activation, "relu2", "relusquaredactivation")


def _require(activation: object, *names: str) -> None:
    if (name := _name(activation)).lower() not in names:
        raise CannotLowerError(f"an activation is {name}")


def _name(activation: object) -> str:
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    return str(name)
