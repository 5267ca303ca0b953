"""A pytest plugin for a process in which transformers takes the installed package kernels, whatever its version.

transformers 5.24 asks for kernels 0.18, of which the package index has no release; 0.17 has all that it uses. Give this
module to pytest with -p, so that it comes before transformers.
"""

import importlib.metadata

_version = importlib.metadata.version


def _taken(name: str) -> str:
    found = _version(name)
    if name != "kernels":
        return found
    from transformers.utils import import_utils

    lowest, above = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
    return found if lowest <= found < above else lowest


importlib.metadata.version = _taken
