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
    end = metadata.get("tokenizer.ggml.eos_token_id")
    if end is not None and found.eos_token_id != end:  # transformers 5.17 takes the token that begins texts
        found.eos_token = found.convert_ids_to_tokens(int(end))
    return found
