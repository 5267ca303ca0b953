"""Root-mean-square normalisation, by the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends.cpu.extension import resources, view
from klfast.dispatch.arguments import RmsNorm


def rms_norm(a: RmsNorm) -> torch.Tensor:
    """Normalise in the wider of x's and weight's dtypes."""
    out = torch.empty(a.x.shape, dtype=torch.promote_types(a.x.dtype, a.weight.dtype))
    _C.rms_norm(*map(view, (a.x, a.weight, a.gate, out)), *a.x.shape, a.group_size, a.eps, *a[5:], *resources())
    return out
