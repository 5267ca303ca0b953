"""Whether a tokenizer has tokens for which its model has no embedding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def warn_beyond(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any], folder: Path) -> None:
    """Warn if a folder's tokenizer has more tokens than its config.json gives the model embeddings.

    Fewer are usual: many models round the number of their embeddings up, those of mamba_ssm to a multiple that their
    configuration names.
    """
    text = config.get("text_config")
    embedded = (text if isinstance(text, dict) else config).get("vocab_size")
    if not isinstance(embedded, int):
        return
    multiple = config.get("pad_vocab_size_multiple", 1)
    if isinstance(multiple, int) and multiple > 0:
        embedded += -embedded % multiple
    if len(tokenizer) > embedded:
        warnings.warn(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {embedded} embeddings; text with the "
            "others cannot be read, so fetch the model's own tokenizer or add rows to the model",
            stacklevel=4,
        )
