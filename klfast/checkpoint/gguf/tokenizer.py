"""The tokenizer of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """Return transformers' conversion of a file's tokenizer; None if the file has none. transformers' errors pass."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path))
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    return found
