"""register_kernels: klfast's functions under the names that transformers looks up in the package kernels."""

import os
import subprocess
import sys
from inspect import Parameter
from pathlib import Path

import pytest
from hub_functions import hub_functions
from transformers.utils import import_utils

import klfast
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.integrations import hub_kernels
from klfast.integrations.hub_layers import KERNELS

TRAINING_ONLY = {"mamba_inner_fn", "mamba_split_conv1d_scan_combined"}


def test_parameters_are_those_of_every_modeling_file():
    """Kernels refuses a function with other numbers or kinds of parameters, as the model is loaded."""
    checked = set()
    for model, functions in hub_functions().items():
        for name in functions.keys() - TRAINING_ONLY:
            arguments = functions[name]
            assert not arguments.posonlyargs + arguments.kwonlyargs and arguments.vararg is None
            names = ["self", *(a.arg for a in arguments.args), *([arguments.kwarg.arg] if arguments.kwarg else [])]
            found = hub_kernels._Repository(name).load().forward.__signature__.parameters
            assert list(found) == names, (model, name)
            kinds = [Parameter.VAR_KEYWORD if n == "kwargs" else Parameter.POSITIONAL_OR_KEYWORD for n in names]
            assert [parameter.kind for parameter in found.values()] == kinds
            checked.add(name)
    assert checked == set(KERNELS)
    assert {kernel.replaces for kernel in KERNELS.values()} | {"mamba2_selective_state_update"} == set(REPLACEMENTS)


def test_without_the_package_kernels(monkeypatch):
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(klfast.KernelUnavailableError, match=r"pip install 'kernels>=\S+,<\S+'$") as caught:
        klfast.register_kernels()
    assert "\n" not in str(caught.value)
    klfast.unregister_kernels()


def test_with_the_package_kernels():
    """It changes transformers' modeling files when they are imported, so in another process."""
    file, support = Path(__file__).with_name("with_kernels.py"), Path(__file__).parents[1] / "support"
    command = [sys.executable, "-m", "pytest", "-p", "kernels_taken", "-p", "no:cacheprovider", "-q", str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(support), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
