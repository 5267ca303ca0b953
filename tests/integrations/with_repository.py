"""transformers' models with an exported repository's layers. test_hub_repository.py runs this file in a process."""

import os
from pathlib import Path

import pytest
import torch
from hub_functions import hub_functions
from models_with_kernels import load, outputs, saved
from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

from kernels import LocalLayerRepository, Mode, get_local_kernel
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.integrations.hub_layers import KERNELS

REPOSITORY = Path(os.environ["REPOSITORY"])


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_models_run_its_layers(family, tmp_path, monkeypatch):
    logits, tokens, _ = outputs(plain := load(saved(family, tmp_path)))
    for name in KERNELS:
        devices = get_kernel_mapping_transformers().setdefault(name, {})
        monkeypatch.setitem(devices, "cpu", {Mode.INFERENCE: LocalLayerRepository(REPOSITORY, layer_name=name)})
    found, found_tokens, called = outputs(load(tmp_path, use_kernels=True), get_local_kernel(REPOSITORY).__name__)
    functions = hub_functions()[plain.__module__.split(".")[-2]].keys() & KERNELS
    assert called == {REPLACEMENTS[KERNELS[name].replaces].op for name in functions}
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found_tokens, tokens)
