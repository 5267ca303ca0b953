"""Setup shared by the commands that run a model."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import nn

from klfast.checkpoint import by_name
from klfast.core import lock, machine
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.vocabulary import vocabulary_size
from klfast.text import token_batches

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from klfast.core.loading_options import LoadingOptions


def prepare(threads: int | None = None, device: str = "cpu") -> None:
    """Set the thread count, show warnings as one line each, and raise if the device is unavailable."""
    machine.require(device)
    if threads is not None:
        torch.set_num_threads(threads)
    warnings.showwarning = lambda message, *_, **__: print(f"klfast: warning: {message}", file=sys.stderr)


def require_plot(path: Path) -> None:
    """Raise, before the work begins, if no plot can be written to a file of that name; matplotlib is optional."""
    from klfast.reporting import plot

    try:
        plot.require_plot(path)
    except ImportError as error:
        raise InvalidInputError(str(error)) from None


def resume_collections() -> None:
    """Go on collecting garbage, but never look through what there is now: nearly all of it stays."""
    gc.freeze()
    gc.enable()


def discard(*partials: Path) -> None:
    """Remove resume files, all or, where another process is working on one, none.

    Raises:
        InvalidInputError: another process is.
    """
    with ExitStack() as locks:
        for path in partials:
            locks.enter_context(lock.held(path))
        for path in partials:
            path.unlink(missing_ok=True)


@contextmanager
def stoppable(what: Path, *partials: Path, resume: bool) -> Iterator[None]:
    """End an interrupted command with exit code 130 and a line that says how to go on.

    Args:
        what: what the line calls the resume files, which stay.
        partials: the resume files or folders; none for ``what`` itself.
        resume: False if the command was given --no-resume, which would discard them.
    """
    try:
        yield
    except KeyboardInterrupt:
        again = "the same command" if resume else "the same command without --no-resume"
        kept = f"{what} keeps what is done, and {again} continues from there"
        found = any(path.exists() for path in partials or [what])
        print(f"klfast: stopped; {kept if found else 'nothing is kept yet'}.", file=sys.stderr)
        raise typer.Exit(130) from None


def open_batches(
    source: str,
    model_name: str,
    model: nn.Module,
    *,
    length: int,
    windows: int | None,
    batch_size: int = 4,
    **loading: Unpack[LoadingOptions],
) -> list[torch.Tensor]:
    """Return batches of a text or token file; the latter needs no tokenizer."""
    if is_token_file(source):
        tokenizer = None
    elif (tokenizer := by_name.find_tokenizer(model_name, **loading)) is None:
        raise CheckpointError(
            f"{model_name} has no tokenizer for {source}; copy the model's tokenizer files into it or give token ids "
            "in a file"
        )
    return token_batches(
        source, tokenizer, vocab_size=vocabulary_size(model), length=length, windows=windows, batch_size=batch_size
    )


def is_token_file(source: str) -> bool:
    """Return True if the source of a text is a file of token ids, which needs no tokenizer."""
    return os.path.splitext(source)[1] in (".npy", ".json")
