"""Text and token files as batches of token ids, for calibration and evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from klfast.core.bundled import ASSETS
from klfast.core.errors import InvalidInputError
from klfast.core.io import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_TEXTS = {"calibration": ASSETS / "text" / "calibration.txt", "evaluation": ASSETS / "text" / "evaluation.txt"}
_FIRST_READ = 16  # characters read at first per wanted token; more if that does not suffice


def token_batches(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    vocab_size: int,
    length: int = 512,
    windows: int | None = None,
    batch_size: int = 4,
) -> list[torch.Tensor]:
    """Cut a text or token file into windows and stack these into batches.

    A text's tokens are cut, from its start, into windows of ``length`` tokens without overlap; the rest is dropped. A
    text shorter than one window becomes a single, shorter window. If the tokenizer puts a BOS token in front of a text
    (Llama's does, Mamba's does not), each window starts with one, which counts in ``length``.

    A token file is taken as it is: a flat list of ids is cut like a text, without a BOS; in a list of equally long
    lists each is a window, whatever ``length``.

    Args:
        source: "calibration" or "evaluation" (the bundled texts), a token file (.npy integer array, .json), or any
            other file, read as UTF-8 text.
        tokenizer: a transformers tokenizer; needed except for token files.
        vocab_size: an upper bound, exclusive, on the ids.
        length: tokens in a window, at least 2 (one to see, one to predict).
        windows: the largest number of windows, taken from the start; None for all.
        batch_size: windows in a batch; the last batch may hold fewer.

    Returns:
        int64 tensors [B, T].

    Raises:
        InvalidInputError: no such file, a text that is empty or not UTF-8, fewer than 2 tokens, ids that the model does
            not have, or a size below its minimum.
    """
    for name, value, least in (("length", length, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise InvalidInputError(f"{name} must be at least {least}, got {value}")
    path = Path(BUNDLED_TEXTS.get(os.fspath(source), os.path.expanduser(source)))
    if not path.is_file():
        raise InvalidInputError(
            f"there is no file {os.fspath(source)!r}; "
            f"give a text file, a token file or one of {', '.join(BUNDLED_TEXTS)}"
        )
    if path.suffix in (".npy", ".json"):
        rows = _cut(_read_ids(path), length, path)
    else:
        if tokenizer is None:
            raise InvalidInputError(
                f"{path} is a text and there is no tokenizer; give token ids in a .npy or .json file"
            )
        rows = _windows_of_text(path, tokenizer, length, windows)
    rows = rows[:windows]
    low, high = rows.aminmax()
    if low < 0 or high >= vocab_size:
        raise InvalidInputError(
            f"{path} holds token id {int(low if low < 0 else high)}; the model's ids lie between 0 and {vocab_size - 1}"
        )
    return list(rows.split(batch_size))


def _windows_of_text(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, windows: int | None) -> torch.Tensor:
    bos = _bos(tokenizer)
    fresh = length - len(bos)  # tokens of text in a window
    wanted = None if windows is None else windows * fresh
    with open(path, encoding="utf-8-sig") as file:
        try:
            # The end of a truncated text may tokenize differently: read on until there are more than enough tokens.
            text = file.read(-1 if wanted is None else min(wanted * _FIRST_READ, path.stat().st_size))
            ids = _tokenize(tokenizer, text)
            while wanted is not None and len(ids) < wanted + length and (more := file.read(max(len(text), 1))):
                text += more
                ids = _tokenize(tokenizer, text)
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    if not text.strip():
        raise InvalidInputError(f"{path} is empty; give a text with some thousands of words")
    rows = _cut(torch.tensor(ids, dtype=torch.int64), fresh, path, least=2 - len(bos))
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS token that the tokenizer puts in front of a text, if any."""
    start = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _cut(ids: torch.Tensor, length: int, path: Path, least: int = 2) -> torch.Tensor:
    """Cut a flat list of ids into [windows, length]; a matrix stays as it is."""
    if ids.dim() == 2:
        length = ids.shape[1]
        ids = ids.flatten()
    if len(ids) < least or length < least:
        found = f"{len(ids)} tokens" if len(ids) < least else f"windows of {length} tokens"
        raise InvalidInputError(f"{path} holds {found}; at least {least} are needed to predict one from another")
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


def _read_ids(path: Path) -> torch.Tensor:
    try:
        array = (
            np.load(path, allow_pickle=False)
            if path.suffix == ".npy"
            else np.array(parse_json(path.read_text(encoding="utf-8-sig")))
        )
    except Exception as error:  # noqa: BLE001 (numpy raises almost anything for a damaged header)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidInputError(
            f"{path} cannot be read as token ids ({reason}); give a .npy integer array or a JSON list"
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidInputError(f"{path} is an archive of arrays; save one array with numpy.save")
    if array.size == 0:
        raise InvalidInputError(f"{path} is empty; give some thousands of token ids")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise InvalidInputError(
            f"{path} must hold integers, [tokens] or [windows, tokens], got {array.dtype} {list(array.shape)}"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InvalidInputError(f"{path} holds token id {array.max()}, which no model has")
    return torch.from_numpy(array.astype(np.int64))
