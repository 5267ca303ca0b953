"""Root-mean-square normalisation, in Triton."""

from __future__ import annotations

import torch


def rms_norm(x, weight, gate, eps, group_size):
    from klfast.kernels import rms_norm as kernel

    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    kernel.plan(*(None if t is None else t.detach() for t in (x, weight, gate)), out, eps, group_size).run()
    return out
