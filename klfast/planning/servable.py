"""Plans whose folders other engines load: vLLM and transformers without klfast.

They fuse some layers into one matrix, which has one precision (q, k and v; gate and up; in Qwen3.5 in_proj_qkv and z, b
and a). vLLM's kernels take integers of 4 and 8 bits by row or in groups of 32, 64 and 128, and zero points with 4 bits
alone (its MARLIN_SUPPORTED_GROUP_SIZES and query_marlin_supported_quant_types). They read no quantized head, which may
be tied to the embedding, and nothing packed where a forward takes the weight itself: Mamba's dt_proj, and the out_proj
beside it, which fused kernels multiply by. transformers (5.24) expands the experts of a model by one scheme, without
zero points, and only those that a checkpoint holds matrix by matrix: not Granite-4.0-H's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from klfast.models.families import FUSED
from klfast.quant.spec import QuantSpec

_BLOCK = re.compile(r"\.\d+\.")
_TAKEN = re.compile(r"\.dt_proj$|\.(mixer|mamba)\.out_proj$")
_STACKED = re.compile(r"\.block_sparse_moe\.experts\.\w+(\.\d+)?$")
_EXPERTS = re.compile(r"\.experts\.\w+(\.\d+)?$")  # stacks, or single experts of these
_BITS, _GROUPS = (4, 8), (-1, 32, 64, 128)
SERVED = (
    "choose INT4 or INT8 by row or in groups of 32, 64 or 128, with zero points only INT4 and not in experts, or no "
    "servable plan"
)


def unread(names: Iterable[str]) -> list[str]:
    """Return the layers that have to stay in full precision: the head, Mamba's two, Granite's experts."""
    return [name for name in names if not _BLOCK.search(name) or _TAKEN.search(name) or _STACKED.search(name)]


def is_served(spec: QuantSpec, name: str) -> bool:
    """Return True if other engines have kernels for the stored spec of a layer."""
    is_known = spec.kind == "int" and spec.bits in _BITS and spec.group_size in _GROUPS and not spec.corrected
    return is_known and (spec.symmetric or (spec.bits == 4 and not _EXPERTS.search(name)))


def unserved(names: Sequence[str], specs: Mapping[str, QuantSpec]) -> list[str]:
    """Return the layers that other engines do not load with these specs (none: full precision), in their order."""
    found = {name for name in unread(names) if name in specs}
    found |= {name for name, spec in specs.items() if not is_served(spec, name)}
    for group in fused(names):
        if len({specs.get(name) for name in group}) > 1:
            found.update(group)
    return [name for name in names if name in found]


def fused(names: Sequence[str]) -> list[list[str]]:
    """Return the layers in groups of one precision, in the order of their first members; most are alone.

    All experts of a model are one group.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        members = next((each for each in FUSED if last in each), (last,))
        key = ("", ("experts",)) if _EXPERTS.search(name) else (parent, members)
        groups.setdefault(key, []).append(name)
    return list(groups.values())
