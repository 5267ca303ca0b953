"""What klfast raises. Each message is one line that names the thing at fault and the remedy."""

from pathlib import Path


class KlfastError(Exception):
    """Base of all of klfast's own errors."""


class InvalidInputError(KlfastError, ValueError):
    """A tensor, text or argument that an operation cannot take (dtype, shape, device, NaN, empty ...)."""


class UnknownLayerError(KlfastError, KeyError):
    """A layer name that the model does not have, or that cannot be quantized."""

    __str__ = Exception.__str__  # KeyError would show the message quoted


class ModelMismatchError(KlfastError, ValueError):
    """Sensitivities or a plan made for another model."""


class InfeasibleBudgetError(KlfastError, ValueError):
    """No plan meets the budget."""


class CheckpointError(KlfastError):
    """A file that is truncated, tampered with, or not what it should be."""


class KernelUnavailableError(KlfastError, RuntimeError):
    """An implementation that was asked for cannot run here, or a slow path under KLFAST_STRICT=1."""


class SlowPathWarning(UserWarning):
    """The plain-torch reference runs where a kernel was expected."""


def one_line(error: BaseException, most: int = 400) -> str:
    """Any error as one line for a report: of a long one (a compiler's) the beginning and the end, the home folder as "~"."""
    return shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", most)


def shortened(text: str, most: int = 400) -> str:
    """A line for a report: of a long one the beginning and the end, the home folder as "~"."""
    text = text.replace(str(Path.home()), "~")
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
