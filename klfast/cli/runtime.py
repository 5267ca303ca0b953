"""What every command that runs a model does first."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import nn

from klfast.checkpoint import by_name
from klfast.core import machine
from klfast.text import token_batches


def prepare(threads: int | None = None, device: str = "cpu") -> None:
    """Set the thread count, show warnings as one line each, and raise if there is no such device."""
    machine.require(device)
    if threads is not None:
        torch.set_num_threads(threads)
    warnings.showwarning = lambda message, *_, **__: print(f"klfast: warning: {message}", file=sys.stderr)


def open_batches(
    source: str,
    model_name: str,
    model: nn.Module,
    *,
    length: int,
    windows: int | None,
    batch_size: int = 4,
    **options: bool,
) -> list[torch.Tensor]:
    """Batches of a text or token file; the latter needs no tokenizer."""
    tokenizer = (
        None if os.path.splitext(source)[1] in (".npy", ".json") else by_name.load_tokenizer(model_name, **options)
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return token_batches(
        source, tokenizer, vocab_size=vocabulary, length=length, windows=windows, batch_size=batch_size
    )


def count(batches: list[torch.Tensor]) -> int:
    """Tokens in all batches."""
    return sum(batch.numel() for batch in batches)
