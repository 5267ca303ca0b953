"""``core``: OpenVINO, of which a process needs one."""

from __future__ import annotations

import functools

import openvino as ov


@functools.cache
def core() -> ov.Core:
    """Return the process's only Core, which stays to its end.

    The CPU plugin of each Core gives signals a stack of its own, and when it goes puts back the one that it met. Of two
    Cores that may be the other's, gone by then, and the next Ctrl-C crashes (seen with OpenVINO 2026.4.1).
    """
    return ov.Core()
