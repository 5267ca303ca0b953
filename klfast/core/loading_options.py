"""Options for loading a model or tokenizer by name."""

from __future__ import annotations

from typing import TypedDict


class LoadingOptions(TypedDict, total=False):
    """Keyword arguments of klfast.checkpoint.by_name's functions.

    Attributes:
        local_files_only: take a hub id from the local cache only.
        trust_remote_code: run Python code that comes with the model.
    """

    local_files_only: bool
    trust_remote_code: bool
