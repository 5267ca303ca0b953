"""vLLM's own parser of compressed-tensors' configurations, without what needs a GPU.

KLFAST_VLLM names the folder that .ci/vllm made, with the package's Python files. The modules that parse are run as they
are, everything else of vLLM is an empty stand-in.
"""

import importlib
import os
import sys
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

FOLDER = os.environ.get("KLFAST_VLLM")
needs_vllm = pytest.mark.skipif(
    FOLDER is None or not Path(FOLDER, "vllm").is_dir(),
    reason="KLFAST_VLLM does not name a folder with the package vllm (.ci/vllm makes one)",
)
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_RUN = [
    f"{_QUANTIZATION}.{name}"
    for name in (
        "base_config",
        "compressed_tensors.compressed_tensors",
        "compressed_tensors.utils",
        "utils.config_utils",
        "utils.quant_utils",
    )
]


class _StandIn(ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "vllm":
            return None
        if name in _RUN:
            return spec_from_file_location(name, Path(FOLDER, *name.split(".")).with_suffix(".py"))
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def compressed_tensors_config():
    """Import vLLM's CompressedTensorsConfig; all that it brought is gone afterwards."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module(_RUN[1]).CompressedTensorsConfig
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
