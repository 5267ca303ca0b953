"""register_kernels with the package kernels. test_hub_kernels.py runs this file in a process of its own."""

import copy
import threading

import pytest
import torch
from hub_functions import hub_functions
from models_with_kernels import load, outputs, saved
from tiny_models import batch
from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

import klfast
from kernels import Mode
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.integrations.hub_layers import KERNELS

FUNCTIONS = hub_functions()
FAMILIES = ("mamba", "mamba2", "jamba", "qwen3_5", "kimi_linear", "lfm2")


@pytest.fixture(autouse=True)
def _as_before():
    mapping = get_kernel_mapping_transformers()
    before = {name: dict(devices) for name, devices in mapping.items()}
    yield
    klfast.unregister_kernels()
    assert mapping == before


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_ask_for_kernels_run_klfasts(family, tmp_path):
    logits, tokens, called = outputs(plain := load(saved(family, tmp_path)))
    assert not called
    klfast.register_kernels()
    model = load(tmp_path, use_kernels=True)
    found, found_tokens, called = outputs(model)
    functions = FUNCTIONS[plain.__module__.split(".")[-2]].keys() & KERNELS
    assert called == {REPLACEMENTS[KERNELS[name].replaces].op for name in functions}
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found_tokens, tokens)
    klfast.unregister_kernels()
    again, _, called = outputs(model)
    assert not called and torch.equal(again, logits)


def test_only_where_asked_for(tmp_path):
    """Functions are exchanged for a whole modeling file."""
    klfast.register_kernels()
    other = load(saved("llama", tmp_path / "llama"), use_kernels=True)
    first = load(saved("bamba", tmp_path / "bamba"))
    assert not outputs(other)[2] | outputs(first)[2]
    load(tmp_path / "bamba", use_kernels=True)
    assert outputs(first)[2]


def test_gradients_are_those_of_the_original(tmp_path):
    def gradients(model):
        model(batch(), labels=batch()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(load(saved("mamba2", tmp_path)))
    klfast.register_kernels()
    model = load(tmp_path, use_kernels=True)
    assert outputs(model)[2]
    with pytest.warns(klfast.SlowPathWarning, match="own function: klfast's functions have no gradients"):
        found = gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    model.train()  # transformers then looks for kernels with gradients
    assert not outputs(model)[2]


def test_devices_without_kernels_run_the_original(tmp_path):
    klfast.register_kernels()
    model = load(saved("mamba", tmp_path), use_kernels=True).to("meta")
    with torch.inference_mode(), pytest.warns(klfast.SlowPathWarning, match="klfast has no meta kernel of this op"):
        assert model(batch().to("meta")).logits.is_meta


def test_in_another_thread(tmp_path):
    """kernels keeps its mapping in a context variable."""
    klfast.register_kernels()
    saved("mamba", tmp_path)
    found = []
    thread = threading.Thread(target=lambda: found.append(outputs(load(tmp_path, use_kernels=True))[2]))
    thread.start()
    thread.join()
    assert "selective_scan" in found[0]


def test_beside_accelerate(tmp_path):
    """The functions are modules now, which accelerate replaces all the same."""
    expected = outputs(model := load(saved("mamba2", tmp_path)))
    accelerated = outputs(klfast.accelerate(copy.deepcopy(model)))
    assert "mamba_chunk_scan" in accelerated[2]
    klfast.register_kernels()
    both = klfast.accelerate(load(tmp_path, use_kernels=True))
    assert torch.equal(outputs(both)[0], accelerated[0])
    torch.testing.assert_close(accelerated[0], expected[0], rtol=1e-4, atol=1e-4)
    klfast.unregister_kernels()
    assert torch.equal(outputs(klfast.unaccelerate(both))[0], expected[0])


def test_devices():
    before = {name: dict(devices) for name, devices in get_kernel_mapping_transformers().items()}
    klfast.register_kernels()
    klfast.register_kernels()
    for name in KERNELS:
        devices, theirs = get_kernel_mapping_transformers()[name], before.get(name, {})
        assert "klfast" in str(devices["cpu"][Mode.INFERENCE]) and Mode.TRAINING not in devices["cpu"]
        assert devices["xpu"][Mode.INFERENCE] == devices["cpu"][Mode.INFERENCE]
        assert devices["xpu"].get(Mode.TRAINING) == theirs.get("xpu", {}).get(Mode.TRAINING)
        assert devices.get("cuda") == theirs.get("cuda")


def test_traced_by_torch_compile(tmp_path):
    klfast.register_kernels()
    model = load(saved("mamba2", tmp_path), use_kernels=True)
    with torch.inference_mode():
        expected = model(batch(), use_cache=False).logits
        found = torch.compile(model, backend="eager")(batch(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variable", "value"), [("USE_HUB_KERNELS", "NO"), ("DISABLE_KERNEL_MAPPING", "1")])
def test_turned_off_by_the_environment(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(klfast.KernelUnavailableError, match=f"{variable} turns kernels off; unset it"):
        klfast.register_kernels()
