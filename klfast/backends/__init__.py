"""Kernels by device; ``register_all`` makes them known to the ops."""

from klfast.core.errors import one_line
from klfast.dispatch.registry import unavailable


def register_all() -> None:
    """Register the kernels of every device with the ops, which must be defined.

    The extension may be missing (a source tree that was not built). The reference then runs, with a warning that says
    why, so that importing klfast never needs a compiler.
    """
    from klfast.backends import cpu, triton

    try:
        from klfast import _C  # noqa: F401
    except ImportError as error:
        unavailable(
            "CPU", f"the extension klfast._C cannot be imported ({one_line(error)}); build it with pip install ."
        )
    else:
        cpu.register()
    triton.register()
