"""The earlier name of klfast.checkpoint.loading."""

from klfast.checkpoint.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
