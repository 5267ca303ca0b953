"""Hymba (klfast.models.hymba): klfast's own code, whose layers pass keys and values to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from klfast.models.families.base import Blocks, Family, Rows, plain, split


class _Mixer(Protocol):
    rows: dict[str, int]


def _rows(mixer: _Mixer) -> Mapping[str, Rows]:
    """Return the rows of queries, keys and values (in layers that own them), the scan's input and the gate."""
    return {"in_proj": split(**mixer.rows)}


FAMILY = Family(
    model_type="hymba",
    rows={"HymbaMixer": _rows},
    blocks=Blocks("layers", carry="shared_kv"),
    logits=plain,
    widens_logits=True,
    own_code=True,
)
