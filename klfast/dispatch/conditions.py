"""What times depend on beside the work: the machine, the tier, the threads and the dtype."""

from __future__ import annotations

import torch

from klfast.core.dtypes import dtype_name
from klfast.core.machine import cpu_name
from klfast.dispatch import pins


def conditions(dtype: torch.dtype) -> dict[str, object]:
    """Return "machine", "tier", "threads" and "dtype", as they are for this CPU here and now."""
    pin = pins.pinned()
    return {
        "machine": cpu_name(),
        "tier": pin if pin in pins.CPU_TIERS else pins.available_tiers()[-1],
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
    }
