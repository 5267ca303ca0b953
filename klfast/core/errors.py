"""Exceptions and warnings of klfast. Each message is one line that names the cause and the remedy."""

from pathlib import Path

_LONGEST = 1000  # characters of a message


class KlfastError(Exception):
    """Base class of klfast's errors: a printable line of at most 1,000 characters, whatever texts it quotes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))


class InvalidInputError(KlfastError, ValueError):
    """A tensor, text or argument that an operation does not accept (dtype, shape, device, NaN, empty ...)."""


class UnknownLayerError(KlfastError, KeyError):
    """A layer that the model lacks or that cannot be quantized."""

    __str__ = Exception.__str__  # KeyError would quote the message


class ModelMismatchError(KlfastError, ValueError):
    """Sensitivities or a plan made for another model."""


class InfeasibleBudgetError(KlfastError, ValueError):
    """No plan meets the budget."""


class CheckpointError(KlfastError):
    """A file that is truncated, altered or of the wrong kind."""


class KernelUnavailableError(KlfastError, RuntimeError):
    """A requested implementation that cannot run here, or a slow path under KLFAST_STRICT=1."""


class ClusterError(KlfastError):
    """A Ray cluster that cannot be reached, is gone, or failed."""


class CannotLowerError(KlfastError):
    """A model that the native engine, or a graph on a GPU, cannot run; the message is a clause that says why."""


class SlowPathWarning(UserWarning):
    """The plain-torch reference runs where a kernel was expected."""


def printable(text: str) -> str:
    """Return text, such as a message that quotes a file, as a line for a terminal: no control characters, not long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2 - 3]} ... {text[-_LONGEST // 2 + 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def one_line(error: BaseException, most: int = 400) -> str:
    """Format an error as one line, shortened as by ``shortened``."""
    return shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", most)


def shortened(text: str, most: int = 400) -> str:
    """Elide the middle of a long text (a compiler's message, for example); write the home directory as "~"."""
    text = text.replace(str(Path.home()), "~")
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
