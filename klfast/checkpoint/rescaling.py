"""Keeps weights as their files have them, where transformers' initialisers would change them.

If ``rescale_prenorm_residual`` is set, those of Mamba, Mamba-2 and FalconMamba divide ``out_proj.weight`` by the root
of the number of layers, and not only random ones: ``from_pretrained`` of transformers 5.17 to 5.24 runs them on weights
that it has read (``_init_weights`` in their modeling files; Nemotron-H's leaves such weights alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELD = "rescale_prenorm_residual"


def as_stored(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return what a configuration must say instead, for ``from_pretrained`` or for config.json."""
    return {FIELD: False} if config.get(FIELD) else {}
