"""Batches with padding: the layout of rows inside the model, and back.

Inside, each row is [padding | memory tokens | text], wherever the padding was given. So only zeros precede the memory
tokens in the convolution and the state, and all rows end with their last token: continuations are handled alike in each
row, and equal those without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.core.errors import InvalidInputError


@dataclass(frozen=True)
class Padding:
    """Layout of a batch with padding.

    Attributes:
        order: int64 [B, T], the input place of each token, padding first.
        counts: int64 [B, 1], the number of pads.
        memory: the number of memory tokens.
    """

    order: torch.Tensor
    counts: torch.Tensor
    memory: int

    @staticmethod
    def of(mask: torch.Tensor | None, shape: tuple[int, int], memory: int) -> Padding | None:
        """Return the layout for an attention mask [B, T], 0 for padding; None if there is no padding."""
        if mask is None:
            return None
        if tuple(mask.shape) != tuple(shape):
            raise InvalidInputError(
                f"attention_mask must be {list(shape)} as the tokens, 0 for padding, got {list(mask.shape)}"
            )
        real = (mask != 0).long()
        if bool(real.all()):
            return None
        return Padding(real.argsort(dim=1, stable=True), shape[1] - real.sum(1, keepdim=True), memory)

    def positions(self) -> torch.Tensor:
        """Return the positions, int64 [B, M + T], negative for padding."""
        return self._places() - self.counts

    def arrange(self, memory_tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Arrange [B, M, H] and [B, T, H] as [B, M + T, H]."""
        text = text.gather(1, self.order.unsqueeze(-1).expand_as(text))
        together = torch.cat((memory_tokens, text), dim=1)
        places, counts = self._places(), self.counts
        source = torch.where(
            places < counts, places + self.memory, torch.where(places < counts + self.memory, places - counts, places)
        )
        return together.gather(1, source.unsqueeze(-1).expand_as(together))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Put arranged [B, M + T, H] back: memory tokens first, then the text in its original order."""
        x = self.memory_first(x, dim=1)
        memory, text = x[:, : self.memory], x[:, self.memory :]
        return torch.cat((memory, text.gather(1, self.order.argsort(1).unsqueeze(-1).expand_as(text))), dim=1)

    def memory_first(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Reorder arranged places along ``dim`` to [memory tokens | padding | text]."""
        places, counts = self._places(), self.counts
        source = torch.where(
            places < self.memory,
            places + counts,
            torch.where(places < counts + self.memory, places - self.memory, places),
        )
        shape = [x.shape[0], *(-1 if d == dim else 1 for d in range(1, x.dim()))]
        return x.gather(dim, source.view(shape).expand_as(x))

    def _places(self) -> torch.Tensor:
        return torch.arange(self.memory + self.order.shape[1], device=self.order.device).expand(len(self.order), -1)
