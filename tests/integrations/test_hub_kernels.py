"""register_kernels: klfast's functions under the names that transformers looks up in the package kernels."""

from inspect import Parameter

import pytest
from hub_functions import hub_functions
from other_process import run_tests
from transformers.utils import import_utils

import klfast
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.integrations.hub_layers import KERNELS, layer

TRAINING_ONLY = {"mamba_inner_fn", "mamba_split_conv1d_scan_combined"}


def test_parameters_are_those_of_every_modeling_file():
    """Kernels refuses a function with other numbers or kinds of parameters, as the model is loaded."""
    checked = set()
    for model, functions in hub_functions().items():
        for name in functions.keys() - TRAINING_ONLY:
            arguments = functions[name]
            assert not arguments.posonlyargs + arguments.kwonlyargs and arguments.vararg is None
            names = ["self", *(a.arg for a in arguments.args), *([arguments.kwarg.arg] if arguments.kwarg else [])]
            found = layer(name).forward.__signature__.parameters
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


@pytest.mark.slow
def test_with_the_package_kernels():
    """It changes transformers' modeling files when they are imported, so in another process."""
    run_tests("tests/integrations/with_kernels.py", plugins=["kernels_taken"])
