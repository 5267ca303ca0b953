"""The Python files of the package mamba_ssm, with plain functions in place of what is compiled for CUDA.

KLFAST_MAMBA_SSM names the folder that .ci/mamba_ssm made.
"""

import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from klfast import ops

FOLDER = os.environ.get("KLFAST_MAMBA_SSM")
needs_mamba_ssm = pytest.mark.skipif(
    FOLDER is None or not Path(FOLDER, "mamba_ssm").is_dir(),
    reason="KLFAST_MAMBA_SSM does not name a folder with the package mamba_ssm (.ci/mamba_ssm makes one)",
)


@contextmanager
def mamba_ssm():
    """Import the package; all that it brought is gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, FOLDER)
    sys.modules |= _compiled()
    try:
        import mamba_ssm
        from mamba_ssm.modules import mamba2, mamba_simple
        from mamba_ssm.ops.triton import layer_norm, layernorm_gated

        layer_norm.RMSNorm.forward = _norm(layer_norm.rms_norm_ref)
        layernorm_gated.RMSNorm.forward = _gated_norm(layernorm_gated.rms_norm_ref)
        mamba_simple.selective_state_update = mamba2.selective_state_update = None  # Triton's; the package has another
        mamba2.mamba_chunk_scan_combined = ops.mamba_chunk_scan_combined
        yield mamba_ssm
    finally:
        sys.path.remove(FOLDER)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("mamba_ssm", "selective_scan_cuda", "causal_conv1d", "einops"):
                del sys.modules[name]


def _compiled():
    """Return the modules of CUDA functions that the package imports, with what its forwards call."""
    names = ("selective_scan_cuda", "causal_conv1d", "causal_conv1d.cpp_functions")
    scan, conv, functions = made = [ModuleType(name) for name in names]
    scan.fwd = _scan
    conv.causal_conv1d_fn, conv.causal_conv1d_update = ops.causal_conv1d_fn, ops.causal_conv1d_update
    functions.causal_conv1d_fwd_function = _convolve
    functions.causal_conv1d_bwd_function = functions.causal_conv1d_update_function = None
    return dict(zip(names, made, strict=True))


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Return y without the gate, [B, D, chunks, 2N] whose odd columns are states, and y with the gate."""
    run = partial(ops.selective_scan_fn, u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)
    y, state = run(return_last_state=True)
    return y, state.repeat_interleave(2, -1)[:, :, None], *([] if z is None else [run(z=z)])


def _convolve(x, weight, bias, seq_idx, initial_states, final_states, silu):
    assert seq_idx is initial_states is final_states is None
    return ops.causal_conv1d_fn(x, weight, bias, activation="silu" if silu else None)


def _norm(reference):
    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return reference(x, self.weight, self.bias, residual=residual, eps=self.eps, prenorm=prenorm)

    return forward


def _gated_norm(reference):
    def forward(self, x, z=None):
        how = {"group_size": self.group_size, "norm_before_gate": self.norm_before_gate}
        return reference(x, self.weight, self.bias, z=z, eps=self.eps, **how)

    return forward
