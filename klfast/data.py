"""The earlier name of klfast.text."""

from klfast.text import token_batches

__all__ = ["token_batches"]
