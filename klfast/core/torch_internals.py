"""Private names of torch that direct calls (past its dispatcher) need, each bound once.

They tell whether anything observes a tensor and whether its memory has moved. A torch that lacks one only costs speed:
``MISSING`` names it, and klfast falls back to the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.multiprocessing import reductions

MISSING: list[str] = []


def _observed(*_: object) -> bool:
    return True


def _bound(owner: ModuleType, path: str) -> Callable[..., Any]:
    """Return the function at ``path`` of ``owner``; if there is none, one that reports an observer."""
    try:
        found: Callable[..., Any] = attrgetter(path)(owner)
    except AttributeError:
        MISSING.append(f"{owner.__name__}.{path}")
        return _observed
    return found


dispatch_modes = _bound(torch, "_C._len_torch_dispatch_stack")  # their number
function_modes = _bound(torch, "_C._len_torch_function_stack")
transform = _bound(torch, "_C._functorch.peek_interpreter_stack")  # torch.func's innermost, or None
tracing_state = _bound(torch, "_C._get_tracing_state")  # None unless torch.jit traces
is_autocasting = _bound(torch, "_C._is_any_autocast_enabled")  # on any device: asking for one takes five times as long
is_profiled = _bound(torch, "autograd._profiler_enabled")
has_global_hooks = _bound(torch, "nn.modules.module._has_any_global_hook")
below_autograd = _bound(torch, "_C._AutoDispatchBelowAutograd")  # a context manager
after_autograd = _bound(torch, "_C._after_autograd_keyset")
single_level_autograd = _bound(torch, "_functorch.utils.enable_single_level_autograd_function")  # a context manager
forward_mode_enabled = _bound(torch, "autograd.forward_ad._set_fwd_grad_enabled")  # a context manager
StorageWeakRef = _bound(reductions, "StorageWeakRef")  # while it lives, no other storage gets the same ``_cdata``

for _owner, _label, _names in (
    (torch.empty(0).untyped_storage(), "torch.UntypedStorage", ("_cdata",)),
    (nn.Module(), "torch.nn.Module", ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")),
    (forward_ad, "torch.autograd.forward_ad", ("_current_level",)),
):
    MISSING += [f"{_label}.{_name}" for _name in _names if not hasattr(_owner, _name)]


def is_forward_mode() -> bool:
    """Return True if tensors may carry forward-mode tangents: inside ``dual_level`` or ``torch.func.jvp``."""
    return getattr(forward_ad, "_current_level", 0) >= 0
