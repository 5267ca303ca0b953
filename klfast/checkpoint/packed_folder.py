"""Folders of others with packed weights: transformers reads them, but only with klfast's layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from klfast.core.errors import CheckpointError, InvalidInputError, KernelUnavailableError

_required: ContextVar[bool] = ContextVar("klfast_packed_required", default=False)


def is_required() -> bool:
    """Return True if weights that klfast cannot run must not go transformers' own way."""
    return _required.get()


@contextmanager
def packed_or_refused(folder: Path) -> Iterator[None]:
    """Have transformers' from_pretrained run a folder's packed weights on klfast's kernels in this block.

    Raises:
        InvalidInputError: the package compressed-tensors is missing, or klfast's quantizer is not registered.
        CheckpointError: the files are damaged, or klfast has no kernels for such weights.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils import is_compressed_tensors_available

    if not is_compressed_tensors_available():
        raise InvalidInputError(
            f"reading {folder} needs the package compressed-tensors, which is not installed: "
            "pip install 'klfast[compressed-tensors]'"
        )
    if not AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__.startswith("klfast."):
        raise InvalidInputError(f"reading {folder} needs klfast's quantizer; call klfast.register_quantizer() first")
    token = _required.set(True)
    try:
        yield
    except KernelUnavailableError as error:
        if isinstance(error.__cause__, CheckpointError):
            raise error.__cause__ from None
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"cannot load the model of {folder}: {reason}; load the full-precision model instead"
        ) from error
    finally:
        _required.reset(token)
