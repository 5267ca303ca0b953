"""What klfast raises; the public name of ``klfast.core.errors``."""

from klfast.core.errors import (
    CheckpointError,
    InfeasibleBudgetError,
    InvalidInputError,
    KernelUnavailableError,
    KlfastError,
    ModelMismatchError,
    SlowPathWarning,
    UnknownLayerError,
)

__all__ = [
    "CheckpointError",
    "InfeasibleBudgetError",
    "InvalidInputError",
    "KernelUnavailableError",
    "KlfastError",
    "ModelMismatchError",
    "SlowPathWarning",
    "UnknownLayerError",
]
