"""Steps of a language model on its cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.dispatch import pins
from klfast.engine.builder import MOST_SEQUENCES
from klfast.engine.engine import Engine
from klfast.generation.engine import engine_of
from klfast.models.calling import cache_argument, mixes_rows, reads_padding, returned_cache
from klfast.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stepper(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what steps over a batch that begins with ``ids``.

    That is klfast's engine where it runs the model; else the model itself, on the whole batch, or on each row where it
    cannot do that.

    Args:
        model: a causal language model of transformers.
        ids: int64 [B, T].
        mask: int64 [B, T] of zeros and ones, zeros on the left; None if there is no padding.
    """
    if len(ids) <= MOST_SEQUENCES:
        with suppress(CannotLowerError):
            return EngineStepper(engine_of(model), len(ids), mask)
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
        sequences: rows of the batch.
        mask: int64 [B, T] of zeros and ones for the first tokens, zeros on the left; None if there is no padding.
    """

    def __init__(self, engine: Engine, sequences: int, mask: torch.Tensor | None) -> None:
        self._engine, self._state = engine, engine.state(sequences)
        self._padding = None if mask is None or bool(mask.all()) else (mask.shape[1] - mask.sum(1)).tolist()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""
        if self._padding is None:
            return self._engine(ids, self._state)
        padding, self._padding = self._padding, None
        self._state.reserve(ids.shape[1])  # once for all, so that the rows' states are parts of it
        rows = [
            self._engine(ids[row : row + 1, pads:], self._state.sequences(row, row + 1)).clone()
            for row, pads in enumerate(padding)
        ]
        return torch.cat(rows)


class Stepper:
    """Feeds tokens to the model and keeps its cache, mask and positions.

    Args:
        model: a causal language model of transformers.
        mask: int64 [B, T] of zeros and ones for the first tokens, zeros on the left; None if there is no padding.
    """

    def __init__(self, model: nn.Module, mask: torch.Tensor | None) -> None:
        self._model = model
        self._cache: object | None = None
        self._positions: torch.Tensor | None = None
        self._name, self._masks_prompt_only = cache_argument(model), family_of(model).masks_prompt_only
        accepted = inspect.signature(model.forward).parameters
        self._fixed: dict[str, object] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._fixed["logits_to_keep"] = 1
        self._wants_positions = "position_ids" in accepted
        self._mask = None if mask is None or bool(mask.all()) else mask

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed int64 [B, T] ids, which follow those fed before; return the next token's logits, float32 [B, V]."""
        options = self._options(ids)
        output = self._model(input_ids=ids, **{self._name: self._cache}, **options)
        cache = returned_cache(output)
        if cache is None and self._cache is None:  # the model fills a cache, but does not return it
            self._cache = self._own_cache()
            output = self._model(input_ids=ids, **{self._name: self._cache}, **options)
        elif cache is not None:
            self._cache = cache
        logits: torch.Tensor = output.logits
        return logits[:, -1].float()

    def _options(self, ids: torch.Tensor) -> dict[str, object]:
        first, options = self._cache is None, dict(self._fixed)
        if self._wants_positions:
            before = self._positions
            self._positions = self._first_positions(ids) if first or before is None else before[:, -1:] + 1
            options["position_ids"] = self._positions
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
        if self._name == "state":
            raise InvalidInputError(
                f"{type(self._model).__name__} returns no {self._name}; generate cannot continue its text"
            )
        from transformers import DynamicCache

        return DynamicCache(config=cast("PreTrainedModel", self._model).config.get_text_config(decoder=True))


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
