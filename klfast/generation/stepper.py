"""Steps of a language model on its cache."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.dispatch import pins
from klfast.engine.engine import Engine
from klfast.engine.program import MOST_SEQUENCES
from klfast.engine.state import State
from klfast.generation.engine import engine_of
from klfast.generation.prompt_rows import PromptRows
from klfast.models.calling import CachedForward, cache_argument, mixes_rows, reads_padding, returned_cache
from klfast.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Steps(Protocol):
    """What feeds a batch of texts to a model and keeps what is carried from token to token."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""

    def reorder(self, rows: list[int]) -> None:
        """Let each row go on from the text of ``rows[i]``; one that others go on from has to stay itself.

        Raises:
            InvalidInputError: the model keeps a cache that cannot do that.
        """


def stepper(model: nn.Module, rows: PromptRows) -> Steps:
    """Return what steps over a batch that begins with ``rows``.

    That is klfast's engine where it runs the model; else the model itself, on the whole batch, or on each row where it
    cannot do that.

    Args:
        model: a causal language model of transformers.
        rows: the prompts.
    """
    ids, mask = rows.ids, rows.mask
    if len(ids) <= MOST_SEQUENCES:
        with suppress(CannotLowerError):
            return EngineStepper(engine_of(model), mask, rows.copies)
    is_padded = mask is not None and not bool(mask.all())
    if not (is_padded and reads_padding(model)) and not (len(ids) > 1 and mixes_rows(model)):
        return Stepper(model, mask)
    name = type(model).__name__
    reason = f"{name} mixes rows." if mixes_rows(model) else f"padding changes what {name} returns."
    pins.slow_path("generate", list(ids.shape), reason, how="row by row")
    return RowByRow(model, [0] * len(ids) if mask is None else (mask.shape[1] - mask.sum(1)).tolist())


class EngineStepper:
    """Feeds tokens to an engine and keeps its state.

    Args:
        engine: of the model.
        mask: int64 [B, T] of zeros and ones for the first tokens, zeros on the left; None if there is no padding.
        copies: how many rows after one another begin with the same tokens, which are fed once.
    """

    def __init__(self, engine: Engine, mask: torch.Tensor | None, copies: int) -> None:
        self._engine, self._copies = engine, copies
        self._state: State | None = None
        self._padding = None if mask is None or bool(mask.all()) else (mask.shape[1] - mask.sum(1)).tolist()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""
        if self._state is not None:
            return self._engine(ids, self._state)
        self._state, logits = self._begun(ids[:: self._copies])
        if self._copies == 1:
            return logits
        rows = [row // self._copies for row in range(len(ids))]
        self._state = self._state.select(rows)
        return logits[rows]

    def reorder(self, rows: list[int]) -> None:
        """Let each row go on from the text of ``rows[i]``; one that others go on from has to stay itself."""
        assert self._state is not None
        self._state.reorder(rows)

    def _begun(self, prompts: torch.Tensor) -> tuple[State, torch.Tensor]:
        """Return the state after different prompts, and the next token's logits."""
        state = self._engine.state(len(prompts))
        if self._padding is None:
            return state, self._engine(prompts, state)
        state.reserve(int(state.seen.max()) + prompts.shape[1])  # once for all: the rows' states are parts of it
        rows = [
            self._engine(prompts[row : row + 1, pads:], state.sequences(row, row + 1)).clone()
            for row, pads in enumerate(self._padding[:: self._copies])
        ]
        return state, torch.cat(rows)


class Stepper:
    """Feeds tokens to the model and keeps its cache, mask and positions.

    Args:
        model: a causal language model of transformers.
        mask: int64 [B, T] of zeros and ones for the first tokens, zeros on the left; None if there is no padding.

    Attributes:
        model: that model.
        forward: how it is called.
        cache: what it keeps of the tokens fed so far; None before the first.
        positions: int64 [B, T], of the tokens fed last; None before the first, or if the model takes none.
    """

    def __init__(self, model: nn.Module, mask: torch.Tensor | None) -> None:
        self.model, self.forward = model, CachedForward(model)
        self.cache: object | None = None
        self.positions: torch.Tensor | None = None
        self._masks_prompt_only = family_of(model).masks_prompt_only
        self._mask = None if mask is None or bool(mask.all()) else mask

    @property
    def is_padded(self) -> bool:
        """Whether a mask says which tokens are padding."""
        return self._mask is not None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""
        options = self._options(ids)
        output = self.forward(ids, self.cache, **options)
        cache = returned_cache(output)
        if cache is None and self.cache is None:  # the model fills a cache, but does not return it
            self.cache = self._own_cache()
            output = self.forward(ids, self.cache, **options)
        elif cache is not None:
            self.cache = cache
        logits: torch.Tensor = output.logits
        return logits[:, -1].float()

    def reorder(self, rows: list[int]) -> None:
        """Let each row go on from the text of ``rows[i]``, which begins with the same padding."""
        reorder = getattr(self.cache, "reorder_cache", None)
        if reorder is None:
            name = type(self.model).__name__
            raise InvalidInputError(f"{name} keeps a cache whose rows cannot change places; leave num_beams out")
        reorder(torch.tensor(rows, device=next(self.model.parameters()).device))

    def _options(self, ids: torch.Tensor) -> dict[str, object]:
        first = self.cache is None
        options: dict[str, object] = {}
        if self.forward.takes_positions:
            before = self.positions
            self.positions = self._first_positions(ids) if first or before is None else before[:, -1:] + 1
            options["position_ids"] = self.positions
        if self._mask is not None and (first or not self._masks_prompt_only):
            self._mask = self._mask if first else torch.cat([self._mask, self._mask.new_ones(ids.shape)], dim=1)
            options["attention_mask"] = self._mask
        return options

    def _first_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return 0, 1, 2 ... for each row, int64 [B, T]; padding counts as 0."""
        if self._mask is None:
            return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return (self._mask.cumsum(1) - 1).clamp_(min=0)

    def _own_cache(self) -> object:
        if cache_argument(self.model) == "state":
            raise InvalidInputError(f"{type(self.model).__name__} returns no state; generate cannot continue its text")
        from transformers import DynamicCache

        return DynamicCache(config=cast("PreTrainedModel", self.model).config.get_text_config(decoder=True))


class RowByRow:
    """Feeds each row of a batch to the model on its own.

    Args:
        model: as for ``Stepper``.
        padding: the number of pads in front of each row's first tokens, which are left out.
    """

    def __init__(self, model: nn.Module, padding: list[int]) -> None:
        self._rows = [Stepper(model, None) for _ in padding]
        self._padding = padding

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""
        texts = [row[:, pads:] for row, pads in zip(ids.split(1), self._padding, strict=True)]
        self._padding = [0] * len(texts)
        return torch.cat([step(text) for step, text in zip(self._rows, texts, strict=True)])

    def reorder(self, rows: list[int]) -> None:
        """Raise InvalidInputError: each row has a cache of its own, of any kind."""
        raise InvalidInputError("the model continues texts row by row, but beams change places; leave num_beams out")
