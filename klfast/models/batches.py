"""Conversion of token ids (tensors, lists, a tokenizer's output, a DataLoader) to rows without padding."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from klfast.core.errors import InvalidInputError

Batches = torch.Tensor | np.ndarray | Mapping[str, object] | Iterable[object]  # see ``read``
_AS = "give tensors [B, T] or [T], or dicts with input_ids and attention_mask"


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, int64 [T] each, without their padding.

    Attributes:
        rows: one tensor per row.
        is_ragged: there was padding, or the rows differ in length.
    """

    rows: list[torch.Tensor]
    is_ragged: bool

    def equal_lengths(self, max_tokens: int | None = None) -> list[torch.Tensor]:
        """Return all rows as int64 [B, T] without padding: one for each length, or more to respect ``max_tokens``."""
        groups: dict[int, list[torch.Tensor]] = {}
        for row in self.rows:
            groups.setdefault(len(row), []).append(row)
        found = []
        for length, rows in groups.items():
            most = len(rows) if max_tokens is None else max(1, max_tokens // length)
            found += [torch.stack(rows[start : start + most]) for start in range(0, len(rows), most)]
        return found


def is_single(batches: object) -> bool:
    """Return True for one batch with all rows, False for an iterable of batches."""
    return isinstance(batches, (torch.Tensor, np.ndarray, Mapping))


def read(batches: Batches, vocabulary: int) -> list[Batch]:
    """Return all batches, checked and without padding: rows are cut to their text, and equal lengths run together.

    That is exact for every model, unlike a mask: state-space layers, for example, would read the pads. A padded row
    with fewer than two tokens of text predicts nothing and is ignored.

    Args:
        batches: int64 ids [N, T], or an iterable of batches: int64 [B, T] or [T] (one row); dicts, such as a tokenizer
            or a DataLoader makes, with input_ids and, for padded rows, an attention_mask of zeros and ones, padding on
            either side (other entries are ignored). NumPy arrays of integers and lists of lists of integers, which may
            differ in length, are converted.
        vocabulary: ids must lie below it, except those of pads.

    Raises:
        InvalidInputError: no row at all, another type, dtype or shape, a row of fewer than 2 tokens, an id that the
            model does not have, or a mask that does not fit its ids or has gaps.
    """
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise InvalidInputError(f"batches must be token ids, got {type(batches).__name__}; {_AS}")
    found = [
        _batch(batch, number, vocabulary) for number, batch in enumerate([batches] if is_single(batches) else batches)
    ]
    if not any(batch.rows for batch in found):
        what = (
            "no row has two tokens besides its padding"
            if any(batch.is_ragged for batch in found)
            else "batches is empty"
        )
        raise InvalidInputError(f"there is no text to measure on: {what}; give at least one row of 2 tokens")
    return found


def _batch(batch: object, number: int, vocabulary: int) -> Batch:
    ids, mask = batch, None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise InvalidInputError(
                f"batch {number} has no input_ids, only {', '.join(map(str, batch)) or 'nothing'}; {_AS}"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows = _rows(ids, number)
    lengths = {len(row) for row in rows}
    is_padded = False
    if mask is not None:
        texts = _without_pads(rows, mask, number)
        is_padded = any(len(text) < len(row) for text, row in zip(texts, rows, strict=True))
        rows = [text for text in texts if len(text) > 1] if is_padded else texts
    if short := [len(row) for row in rows if len(row) < 2]:
        raise InvalidInputError(
            f"batch {number} has windows of {short[0]} tokens; they need at least 2, one to see and one to predict"
        )
    if rows:
        low, high = (int(bound) for bound in torch.cat(rows).aminmax())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            known = f"the model's ids lie between 0 and {vocabulary - 1}"
            raise InvalidInputError(f"batch {number} holds token id {wrong}; {known}; was another tokenizer used?")
    return Batch(rows, is_padded or len(lengths) > 1)


def _rows(ids: object, number: int) -> list[torch.Tensor]:
    """Return rows of int64 ids; raise InvalidInputError for anything else."""
    if isinstance(ids, (list, tuple)) and len(ids) == 1 and getattr(ids[0], "ndim", 0) == 2:
        ids = ids[0]  # a DataLoader of a TensorDataset
    rows = _split(ids)
    if rows is None or any(row.dtype != torch.int64 for row in rows):
        raise InvalidInputError(
            f"batch {number} must be an int64 tensor [B, T] of token ids, got {_described(ids)}; {_AS}"
        )
    return rows


def _without_pads(rows: list[torch.Tensor], mask: object, number: int) -> list[torch.Tensor]:
    masks = _split(mask)
    fits = masks is not None and [len(row) for row in masks] == [len(row) for row in rows]
    if masks is None or not fits or any(((row != 0) & (row != 1)).any() for row in masks):
        raise InvalidInputError(
            f"the attention_mask of batch {number} must hold a zero or a one for each of its token ids, "
            f"got {_described(mask)}"
        )
    found = []
    for row, real in zip(rows, masks, strict=True):
        places = real.nonzero().flatten()
        first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if end - first != len(places):
            raise InvalidInputError(
                f"the attention_mask of batch {number} has gaps; pads must stand before or after the text"
            )
        found.append(row[first:end])
    return found


def _split(values: object) -> list[torch.Tensor] | None:
    """Return the rows of a matrix, or a vector as one row, as tensors; None for anything else."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf":
            return None
        values = torch.from_numpy(values.astype({"b": np.bool_, "f": np.float64}.get(values.dtype.kind, np.int64)))
    if isinstance(values, torch.Tensor):
        return None if values.dim() not in (1, 2) else [values] if values.dim() == 1 else list(values)
    if not isinstance(values, (list, tuple)):
        return None
    if values and all(isinstance(value, numbers.Integral) for value in values):
        try:
            return [torch.tensor(values)]
        except (RuntimeError, ValueError, OverflowError):  # beyond 64 bits
            return None
    rows = []
    for value in values:
        row = _split(value) if getattr(value, "ndim", 1) == 1 else None
        if row is None or len(row) != 1:
            return None
        rows.append(row[0])
    return rows


def _described(values: object) -> str:
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return f"{values.dtype} {list(values.shape)}"
    if isinstance(values, (list, tuple)) and values:
        kinds = " and ".join(dict.fromkeys(_described(value) for value in values[:3]))
        return f"a {type(values).__name__} of {kinds}"
    return type(values).__name__
