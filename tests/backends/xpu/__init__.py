"""Checks of the Triton kernels for Intel GPUs without a GPU, in an environment with triton-xpu: `make verify-xpu`."""

import importlib.util
import os
import sys
from pathlib import Path

# Compilers take most of the time here: about half as much without debugging information, and with the simpler register
# allocation and instruction selection of Intel's CPU runtime.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["CL_CONFIG_LLVM_OPTIONS"] = "-optimize-regalloc=0 -fast-isel"

if importlib.util.find_spec("klfast.kernels") is None:  # a source tree, not installed in this environment
    folder = Path(__file__).resolve().parents[3] / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        "klfast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["klfast.kernels"] = importlib.util.module_from_spec(spec)
