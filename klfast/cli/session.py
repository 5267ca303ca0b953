"""What every command that runs a model does first."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import nn

from klfast import loading
from klfast.data import token_batches
from klfast.device import facts


def prepare(threads: int | None = None, device: str = "cpu") -> None:
    """Set the thread count, show warnings as one line each, and raise if there is no such device."""
    facts.require(device)
    if threads is not None:
        torch.set_num_threads(threads)
    warnings.showwarning = lambda message, *_, **__: print(f"klfast: warning: {message}", file=sys.stderr)


def open_batches(source: str, model_name: str, model: nn.Module, *, length: int, windows: int | None, batch_size: int = 4, **options: bool) -> list[torch.Tensor]:
    """Batches of a text or token file; the latter needs no tokenizer."""
    tokenizer = None if os.path.splitext(source)[1] in (".npy", ".json") else loading.load_tokenizer(model_name, **options)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return token_batches(source, tokenizer, vocab_size=vocabulary, length=length, windows=windows, batch_size=batch_size)


def count(batches: list[torch.Tensor]) -> int:
    """Tokens in all batches."""
    return sum(batch.numel() for batch in batches)


class Stream:
    """The text of tokens that come one at a time; shown after the prompt as it grows, but for characters that still lack bytes."""

    def __init__(self, tokenizer, prompt: str, prompt_ids: list[int], show: bool) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._prompt, self._prompt_ids, self._show, self._shown = tokenizer, prompt, prompt_ids, show, 0

    def __call__(self, token: torch.Tensor) -> None:
        if self._show and not self.ids:  # not before: an error has its line for itself
            print(self._prompt, end="", flush=True)
        self.ids.append(int(token))
        text = self.text
        if self._show and not text.endswith("\ufffd"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    @property
    def text(self) -> str:
        # After the prompt: on its own, a tokenizer like Llama's would drop the space before the first word.
        before, whole = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (self._prompt_ids, self._prompt_ids + self.ids))
        return whole[len(before) :]

    def rest(self) -> str:
        """What has not been shown yet."""
        return self.text[self._shown :]
