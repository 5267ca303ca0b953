"""Trainable selective scan (Mamba, Hymba) and chunked SSD (Mamba-2), to replace slow loops of transformers and klfast.

`install(arch)` replaces the functions that the mixers call:

| arch             | function               | plain torch (any device)                  | compiled (CPU)         |
|------------------|------------------------|-------------------------------------------|------------------------|
| `mamba`, `hymba` | `mamba_selective_scan` | `selective_scan`: parallel scan of chunks | `training_kernels.cpp` |
| `mamba2`         | `mamba2_chunk_scan`    | `ssd_scan`: matmuls in chunks             | the same               |
| all              | `causal_conv1d_fn`     | `F.conv1d`                                | `training_kernels.cpp` |

The compiled functions are used if there is a C++ compiler. Formulas: Mamba, arXiv 2312.00752 (eq. 2, section 3.3);
Mamba-2 / SSD, arXiv 2405.21060 (section 6). The compiled path trains Mamba 15 times faster on a CPU (0.43 against 6.5
CPU seconds for 1024 tokens of the bundled model); tests/project/test_training_scan.py compares the gradients of both
with a step-by-step loop.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SOURCE = Path(__file__).with_name("training_kernels.cpp")


# ---------------------------------------------------------------------------------------------------------------------
# Plain torch


def selective_scan(u, step, A, B, C, D, z, chunk=32):
    """Return (scan(u) + D u) silu(z).

    The scan is h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t, with delta = softplus(step).
    u, step, z [batch, length, channels]; A [channels, state]; B, C [batch, length, state]; D [channels].
    Each chunk is a parallel prefix scan; chunks are checkpointed, so memory holds the states of one chunk at a time.
    """

    def run_chunk(h, u, delta, B, C):
        decay = torch.exp(delta[..., None] * A)  # [batch, chunk, channels, state]
        state = (delta * u)[..., None] * B[:, :, None]
        shift = 1
        while shift < decay.shape[1]:  # (a1, b1) then (a2, b2) = (a1 a2, a2 b1 + b2), at distances 1, 2, 4, ...
            carried = decay[:, shift:] * state[:, :-shift]
            state = torch.cat([state[:, :shift], state[:, shift:] + carried], dim=1)
            decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], dim=1)
            shift *= 2
        state = state + decay * h[:, None]
        return (state @ C[..., None]).squeeze(-1), state[:, -1]

    delta = F.softplus(step)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
    outputs = []
    for parts in zip(*(t.float().split(chunk, dim=1) for t in (u, delta, B, C)), strict=True):
        y, h = checkpoint(run_chunk, h, *parts, use_reentrant=False)
        outputs.append(y)
    y = torch.cat(outputs, dim=1) + D * u.float()
    return (y * F.silu(z.float())).to(u.dtype)


def ssd_scan(x, delta, A, B, C, D, chunk):
    """Return the same recurrence with one decay per head, by matmuls over chunks (arXiv 2405.21060, listing 1).

    x [batch, length, heads, head_dim]; delta [batch, length, heads] fp32; A, D [heads]; B, C [batch, length, groups,
    state]. Within a chunk y = (C B^T * decay mask) (delta x); across chunks each head's state [state, head_dim] is
    carried.
    """
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    share = heads // groups
    pad = -length % chunk
    if pad:  # delta = 0 leaves the state as it is
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        delta = F.pad(delta, (0, 0, 0, pad))
    n = (length + pad) // chunk

    # xs [batch, n, groups, share, chunk, width]; Bs, Cs [batch, n, groups, chunk, state]; steps [batch, n, groups,
    # share, chunk]
    xs = x.reshape(batch, n, chunk, groups, share, width).permute(0, 1, 3, 4, 2, 5)
    Bs, Cs = (t.reshape(batch, n, chunk, groups, state).transpose(2, 3) for t in (B, C))
    steps = delta.reshape(batch, n, chunk, groups, share).permute(0, 1, 3, 4, 2)
    log_decay = torch.cumsum(steps * A.reshape(groups, share, 1), dim=-1)

    upper = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(upper, float("-inf")).exp()
    mask = decay * steps[..., None, :]
    scores = (Cs @ Bs.transpose(-1, -2)).unsqueeze(3)  # [batch, n, groups, 1, chunk, chunk]
    within = (scores * mask).to(x.dtype) @ xs

    to_end = torch.exp(log_decay[..., -1:] - log_decay) * steps
    weighted = (xs * to_end[..., None]).to(x.dtype)
    added = Bs.unsqueeze(3).transpose(-1, -2) @ weighted  # [batch, n, groups, share, state, width]
    kept = torch.exp(log_decay[..., -1])[..., None, None]
    carried, before = torch.zeros_like(added[:, 0], dtype=torch.float32), []
    for i in range(n):
        before.append(carried)
        carried = carried * kept[:, i] + added[:, i]
    across = (Cs.unsqueeze(3) @ torch.stack(before, dim=1).to(x.dtype)) * torch.exp(log_decay)[..., None]

    y = (within + across).permute(0, 1, 4, 2, 3, 5).reshape(batch, length + pad, heads, width)[:, :length]
    return y + D[:, None] * x[:, :length]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, CPU only


@functools.cache
def kernels(state):
    """Return the compiled kernels for a state size, or None if there is no C++ compiler.

    -march=native is right here and nowhere else in the project: only CPUs like the one that built the library use it.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    optimized = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
    command = [compiler, "-std=c++20", *optimized, "-shared", "-fPIC", f"-DSTATE={state}"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([*command, cpu()]).encode()).hexdigest()[:16]
    folder = own_folder()
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            partial = Path(beside, library.name)
            built = subprocess.run([*command, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
            if built.returncode != 0:
                print(f"training kernels do not compile, using plain torch:\n{built.stderr}")
                return None
            os.replace(partial, library)
    return ctypes.CDLL(str(library))


def cpu():
    """Return an identifier of the CPU's instructions: several machines may share one home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def own_folder():
    """Return the folder for compiled kernels, to which only this user can have written: its files are loaded and run.

    Raises:
        PermissionError: it belongs to another user, is open to others, or is a link.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (cache if cache.is_absolute() else Path.home() / ".cache") / "klfast-training"
    with contextlib.suppress(FileExistsError):  # a file or a dangling link, refused below
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} must be a folder of your own, closed to others (mode 700); remove it, or set XDG_CACHE_HOME"
        )
    return folder


class Shape(ctypes.Structure):
    """Sizes, as in training_kernels.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "channels", "chunks")]


LANES, CHUNK, WIDTH = 16, 16, 4  # as in training_kernels.cpp


def call(library, name, tensors_and_sizes):
    """Call a kernel with tensors as pointers and the number of threads as its last argument."""
    arguments = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in tensors_and_sizes]
    getattr(library, name)(*arguments, ctypes.c_int(torch.get_num_threads()))


def suffix(dtype):
    """Return the dtype's name in the kernels' names."""
    return {torch.float32: "float", torch.bfloat16: "bf16"}[dtype]


def rows(tensor):
    """Return tensor [batch, length, channels] with contiguous channels and evenly spaced rows, and its row stride."""
    batch, length, channels = tensor.shape
    stride = tensor.stride(1)
    if tensor.stride(2) != 1 or (batch > 1 and tensor.stride(0) != length * stride):
        tensor, stride = tensor.contiguous(), channels
    return tensor, ctypes.c_int64(stride)


class CompiledScan(torch.autograd.Function):
    """selective_scan with the compiled kernels; u, z float32 or bfloat16, the others float32."""

    @staticmethod
    def forward(ctx, u, step, A, B, C, D, z):
        """Return the scan and save the state at the start of each chunk."""
        library = kernels(A.shape[1])
        batch, length, channels = u.shape
        z, z_row = rows(z)
        delta = F.softplus(step.contiguous())
        u, B, C, D = (t.contiguous() for t in (u, B, C, D))
        A = A.t().contiguous()  # [state, channels]
        shape = Shape(batch, length, channels, -(-length // CHUNK))
        out = torch.empty_like(u)
        saved = torch.empty(batch, shape.chunks, channels, A.shape[0])
        call(library, f"scan_forward_{suffix(u.dtype)}", (shape, u, delta, A, B, C, D, z, z_row, out, saved))
        ctx.save_for_backward(u, delta, A, B, C, D, z, saved)
        ctx.shape, ctx.z_row = shape, z_row
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of every input."""
        u, delta, A, B, C, D, z, saved = ctx.saved_tensors
        du, dstep, dB, dC, dz = map(torch.empty_like, (u, delta, B, C, u))
        dA, dD = torch.empty(u.shape[0], *A.shape), torch.empty(u.shape[0], u.shape[2])
        tensors = (u, delta, A, B, C, D, z, ctx.z_row, saved, grad.contiguous(), du, dstep, dA, dB, dC, dD, dz)
        call(kernels(A.shape[0]), f"scan_backward_{suffix(u.dtype)}", (ctx.shape, *tensors))
        return du, dstep, dA.sum(0).t(), dB, dC, dD.sum(0), dz


class CompiledConv(torch.autograd.Function):
    """silu(causal depthwise conv); x [batch, length, channels], float32 weight [channels, 4], bias [channels]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Return the convolution."""
        x, x_row = rows(x)
        batch, length, channels = x.shape
        weight = weight.t().contiguous()
        shape = Shape(batch, length, channels, 0)
        out = torch.empty(x.shape, dtype=x.dtype)
        call(kernels(16), f"conv_forward_{suffix(x.dtype)}", (shape, x, x_row, weight, bias, out))
        ctx.save_for_backward(x, weight, bias)
        ctx.shape, ctx.x_row = shape, x_row
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of every input."""
        x, weight, bias = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        dweight, dbias = torch.empty(x.shape[0], *weight.shape), torch.empty(x.shape[0], *bias.shape)
        tensors = (x, ctx.x_row, weight, bias, grad.contiguous(), dx, dweight, dbias)
        call(kernels(16), f"conv_backward_{suffix(x.dtype)}", (ctx.shape, *tensors))
        return dx, dweight.sum(0).t(), dbias.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# With the signatures of the transformers functions


def can_compile(tensor, state, channels):
    """Return True if the compiled kernels support the tensor."""
    return tensor.device.type == "cpu" and channels % LANES == 0 and kernels(state) is not None


def mamba_selective_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **kwargs
):
    """Replace transformers' function.

    hidden_states, dt, z [batch, channels, length]; A [channels, state]; B, C [batch, state, length].
    """
    if return_last_state or D is None or z is None or delta_bias is None or not delta_softplus:
        raise NotImplementedError("the training scan supports only the whole-sequence pass of MambaMixer")
    step = dt.transpose(1, 2).float() + delta_bias
    u, B, C, z = (t.transpose(1, 2) for t in (hidden_states, B, C, z))
    scan = CompiledScan.apply if can_compile(u, A.shape[1], A.shape[0]) else selective_scan
    return scan(u, step, A, B.float(), C.float(), D, z).transpose(1, 2)


def mamba2_chunk_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **kwargs,
):
    """Replace transformers' function.

    hidden_states [batch, length, heads, head_dim]; dt [batch, length, heads]; B, C [batch, length, groups, state].
    """
    if return_final_states or initial_states is not None or D is None or dt_bias is None or not dt_softplus:
        raise NotImplementedError("the training scan supports only the whole-sequence pass of Mamba2Mixer")
    delta = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    return ssd_scan(hidden_states, delta, A, B, C, D, chunk_size)


def causal_conv1d_fn(hidden_states, weight, bias, activation, **kwargs):
    """Replace transformers' function: hidden_states [batch, channels, length]; weight [channels, width]; silu."""
    if weight.shape[1] == WIDTH and can_compile(hidden_states, 16, weight.shape[0]):
        return CompiledConv.apply(hidden_states.transpose(1, 2), weight, bias).transpose(1, 2)
    padded = F.pad(hidden_states, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))


def install(arch):
    """Replace the functions that the mixers look up at run time by those above."""
    if arch == "mamba":
        from transformers.models.mamba import modeling_mamba as module

        module.mamba_selective_scan = mamba_selective_scan
    elif arch == "hymba":
        from klfast.models.hymba import ssm as module

        module.mamba_selective_scan = mamba_selective_scan
    else:
        from transformers.models.mamba2 import modeling_mamba2 as module

        module.mamba2_chunk_scan = mamba2_chunk_scan
    module.causal_conv1d_fn = causal_conv1d_fn
