"""The earlier name of klfast.checkpoint.by_name."""

from klfast.checkpoint.by_name import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
