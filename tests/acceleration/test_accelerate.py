"""klfast.accelerate against the plain transformers models, tiny and random."""

import copy
import inspect
import sys
import threading
from contextlib import nullcontext
from importlib.metadata import version
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import torch
from accelerated_models import logits, mixers
from cached_calls import in_chunks
from tiny_models import ACCELERATED, MIXERS, STATE_SPACE, VOCABULARY, assert_no_further, in_float64, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import klfast
from klfast.acceleration import forwards
from klfast.acceleration import patch as native_ssm
from klfast.acceleration.patch import is_accelerated
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.core.errors import InvalidInputError, KernelUnavailableError
from klfast.dispatch import pins, registry
from klfast.models.calling import returned_cache
from klfast.models.families import mixer_of, norm_of
from klfast.nn.experts import stack_names
from klfast.sensitivity.measuring_mode import prepared


@pytest.fixture(params=ACCELERATED)
def model(request):
    return tiny(request.param)


@pytest.fixture(params=ACCELERATED)
def model_and_pins(request):
    """Return a model of every family and its pins: none, and each for one of each kind of mixer."""
    every = ("reference", *pins.available_tiers()) if request.param in MIXERS else ()
    return tiny(request.param), (nullcontext(), *map(pins.using, every))


@pytest.fixture(params=STATE_SPACE)
def state_space_model(request):
    return tiny(request.param)


def ids(batch, length):
    return torch.randint(2, VOCABULARY, (batch, length))


def test_logits_in_float32(model_and_pins):
    model, every_pin = model_and_pins
    inputs = [ids(*shape) for shape in ((1, 1), (2, 3), (1, 63), (2, 70))]
    truths, plain = ([logits(one, x) for x in inputs] for one in (in_float64(model), model))
    assert all(is_accelerated(m) for m in mixers(klfast.accelerate(model)))
    for pin in every_pin:
        with pin:
            for x, expected, truth in zip(inputs, plain, truths, strict=True):
                assert_no_further(logits(model, x), expected, truth)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "zamba", "granite_hybrid", "qwen3_5", "lfm2"])
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.inference_mode()
def test_float64_runs_the_models_own_forward(family):
    model, x = tiny(family, dtype=torch.float64), ids(2, 9)
    expected, text = model(x, use_cache=False).logits, klfast.generate(model, x, 4)
    klfast.accelerate(model)
    assert torch.equal(model(x, use_cache=False).logits, expected)
    assert torch.equal(klfast.generate(model, x, 4), text)


def test_float64_warns():
    model = klfast.accelerate(tiny("mamba", dtype=torch.float64))
    message = "own forward: klfast's kernels take float32, bfloat16 or float16, not float64"
    with pytest.warns(klfast.SlowPathWarning, match=message), torch.inference_mode():
        model(ids(1, 3))


def typical(errors, model):
    """Return the root mean square; of a mixture the median, since rounding may let a token meet other experts."""
    has_experts = any(map(stack_names, model.modules()))
    return errors.median() if has_experts else errors.square().mean().sqrt()


def test_logits_in_bfloat16_are_no_further_from_the_truth(model_and_pins):
    (model, every_pin), x = model_and_pins, ids(2, 100)
    truth = logits(model, x)
    plain = logits(model.to(torch.bfloat16), x)
    klfast.accelerate(model)
    for pin in every_pin:
        with pin:
            fast = logits(model, x)
        errors = [typical((found - truth).square().mean(-1).sqrt(), model) for found in (fast, plain)]
        assert errors[0] <= 1.05 * errors[1] + 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_returns_the_same_logits_in_float32(bias, dtype, tier):
    head, x = torch.nn.Linear(24, 200, bias).to(dtype), torch.randn(2, 9, 24).to(dtype)
    with torch.inference_mode():
        logits = forwards.head_forward(head, x)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, head(x).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def generate(model, x, **kwargs):
    with torch.inference_mode():
        return model.generate(x, max_new_tokens=6, do_sample=False, **kwargs)


def test_generates_the_same_tokens(model):
    prompts = [ids(1, 1), ids(2, 70)]
    plain = [generate(model, x) for x in prompts]
    klfast.accelerate(model)
    for x, expected in zip(prompts, plain, strict=True):
        torch.testing.assert_close(generate(model, x), expected, rtol=0, atol=0)


def test_generates_the_same_tokens_after_left_padding(model):
    x = ids(3, 12)
    mask = torch.ones_like(x)
    for row, padding in enumerate((0, 4, 11)):
        x[row, :padding], mask[row, :padding] = 0, 0
    plain = generate(model, x, attention_mask=mask)
    torch.testing.assert_close(generate(klfast.accelerate(model), x, attention_mask=mask), plain, rtol=0, atol=0)


def with_states(model, x, lengths):
    logits, cache = in_chunks(model, x, lengths)
    layer = cache.layers[mixers(model)[-1].layer_idx]
    states = layer.conv_states[0], layer.recurrent_states[0]
    return logits, *(state for state in states if state is not None)


@pytest.mark.parametrize("lengths", [[2, 1, 1, 1], [64, 1, 65, 3]])
def test_logits_and_states_of_chunked_prefill(model, lengths):
    x = ids(2, sum(lengths))
    truth, plain = with_states(in_float64(model), x, lengths), with_states(model, x, lengths)
    for fast, expected, right in zip(with_states(klfast.accelerate(model), x, lengths), plain, truth, strict=True):
        assert_no_further(fast, expected, right)


def test_logits_and_states_in_bfloat16_are_no_further_from_the_truth(model):
    model.to(torch.bfloat16)
    x, lengths = ids(2, 9), [6, 1, 2]
    truth = with_states(copy.deepcopy(model).float(), x, lengths)
    plain = with_states(model, x, lengths)
    for fast, expected, right in zip(with_states(klfast.accelerate(model), x, lengths), plain, truth, strict=True):
        assert fast.dtype == expected.dtype and fast.shape == expected.shape
        assert typical((fast - right).abs(), model) <= 2**0.5 * typical((expected - right).abs(), model)


def test_unaccelerate_restores_and_both_are_idempotent(model):
    x = ids(2, 9)
    plain = logits(model, x)
    assert klfast.accelerate(klfast.accelerate(model)) is model
    with torch.inference_mode():
        model(x)
    assert klfast.unaccelerate(model) is model
    assert not any(is_accelerated(m) or "forward" in vars(m) for m in mixers(model))
    assert not any("klfast" in name for m in model.modules() for name in vars(m))
    assert torch.equal(logits(klfast.unaccelerate(model), x), plain)


def test_other_models_of_the_class_stay_plain(model):
    other = type(model)(model.config)
    klfast.accelerate(model)
    assert not any(is_accelerated(m) for m in mixers(other))


def test_a_model_without_state_space_layers_is_returned_unchanged():
    llama = tiny("llama")
    before = {name: type(m) for name, m in llama.named_modules()}
    assert klfast.accelerate(llama) is llama and klfast.unaccelerate(llama) is llama
    assert {name: type(m) for name, m in llama.named_modules()} == before
    with pytest.raises(InvalidInputError, match="transformers model"):
        klfast.accelerate("mamba")


def of_another_version(mixer_class, name, monkeypatch):
    """Return the class as in a transformers version that calls the function ``name`` by another name."""
    original = mixer_class.forward
    inner = inspect.unwrap(original)
    names = tuple("renamed" if n == name else n for n in inner.__code__.co_names)
    namespace = {**inner.__globals__, "renamed": inner.__globals__[name]}
    renamed = FunctionType(inner.__code__.replace(co_names=names), namespace)
    renamed.__kwdefaults__, renamed.__defaults__ = inner.__kwdefaults__, inner.__defaults__
    monkeypatch.setattr(mixer_class, "forward", renamed)


def test_a_model_is_refused_if_one_mixer_calls_other_functions(model, monkeypatch):
    mixer_class = type(mixers(model)[0])
    x = ids(2, 9)
    plain = logits(model, x)
    for name in mixer_of(mixer_class).functions:
        with monkeypatch.context() as patch:
            of_another_version(mixer_class, name, patch)
            where = f"{mixer_class.__name__} of transformers {version('transformers')}"
            with pytest.raises(KernelUnavailableError, match=f"{where} does not call {name},"):
                klfast.accelerate(model)
            assert not any("forward" in vars(m) for m in model.modules())
            torch.testing.assert_close(logits(model, x), plain, rtol=0, atol=0)
            with pytest.warns(klfast.SlowPathWarning, match=name):
                native_ssm.accelerate_or_warn(model)
            assert not any(is_accelerated(m) for m in model.modules())
            patch.setenv("KLFAST_STRICT", "1")
            with pytest.raises(KernelUnavailableError, match=name):
                native_ssm.accelerate_or_warn(model)
    assert all(is_accelerated(m) for m in mixers(klfast.accelerate(model)))


def test_gradients_take_the_plain_path_with_a_warning(model, monkeypatch):
    x = ids(1, 5)
    model(x).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(klfast.SlowPathWarning, match=r"gradients; .* klfast\.unaccelerate\(model\) silences"):
        klfast.accelerate(model)(x).logits.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(name))
    monkeypatch.setenv("KLFAST_STRICT", "1")
    with pytest.raises(KernelUnavailableError, match="inference_mode"):
        model(x)


def test_threads_share_an_accelerated_model(model):
    x = ids(2, 33)
    klfast.accelerate(model)
    expected, results = logits(model, x), [None] * 4

    def work(i):
        torch.set_num_threads(1)
        results[i] = logits(model, x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


# Other devices than the CPU ---------------------------------------------------------------------------------------


class OpsCalled(TorchDispatchMode):
    """Record the names of klfast's ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "klfast":
            self.names.add(op._schema.name.removeprefix("klfast::"))
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def ops_called_off_the_cpu(model):
    """Run the model's forward on shapes only: their device, "meta", stands for a GPU."""
    with OpsCalled() as called:
        out = model.to("meta")(ids(2, 9).to("meta"), use_cache=False)
    assert out.logits.is_meta
    return called.names


DECODING = {"causal_conv1d_update", "selective_state_update"}


def has_kernels(ops, monkeypatch):
    real = registry.has_kernel
    monkeypatch.setattr(registry, "has_kernel", lambda op, key: op in ops if key == "META" else real(op, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_klfast_ops_run_on_a_device_with_kernels(state_space_model, dtype, monkeypatch):
    has_kernels(registry.op_names(), monkeypatch)
    expected = {
        "causal_conv1d",
        "rms_norm",
        "mamba_chunk_scan" if "2" in type(state_space_model).__name__ else "selective_scan",
    }
    assert ops_called_off_the_cpu(klfast.accelerate(state_space_model.to(dtype))) == expected


@torch.no_grad()
def test_mixers_run_klfast_ops_on_a_device_with_kernels(model, monkeypatch):
    """Includes hybrids, whose masks need more than shapes."""
    has_kernels(registry.op_names(), monkeypatch)
    klfast.accelerate(model).to("meta")
    with OpsCalled() as called:
        for mixer in mixers(model):
            mixer(hidden_states=torch.empty(2, 9, 64, device="meta"))
    normed = any(norm_of(type(module)) for mixer in mixers(model) for module in mixer.modules())
    functions = {REPLACEMENTS[name].op for mixer in mixers(model) for name in mixer_of(type(mixer)).functions}
    assert called.names == functions - DECODING | ({"rms_norm"} if normed else set())


@pytest.mark.parametrize("attention", [{"decode_attention"}, set()], ids=str)
def test_hymba_runs_klfast_ops_on_a_device_with_kernels(attention, monkeypatch):
    """Also in decoding; attention is torch's if there is no kernel for it."""
    has_kernels([*attention, *(op for op in registry.op_names() if op != "decode_attention")], monkeypatch)
    model = tiny("hymba", dtype=torch.bfloat16).to("meta")
    with torch.no_grad(), OpsCalled() as called:
        cache = returned_cache(model(ids(2, 9).to("meta"), use_cache=True))
        assert called.names == {"causal_conv1d", "rms_norm", "selective_scan"}
        called.names.clear()
        assert model(ids(2, 1).to("meta"), cache=cache).logits.is_meta
    assert called.names == {"causal_conv1d_update", "rms_norm", "selective_state_update"} | attention


@pytest.mark.parametrize(("there", "called"), [(("rms_norm",), {"rms_norm"}), ((), set())], ids=str)
def test_the_model_takes_its_own_path_where_a_kernel_is_missing(state_space_model, there, called, monkeypatch):
    has_kernels(there, monkeypatch)
    with pytest.warns(
        klfast.SlowPathWarning, match=r"(Mixer|Norm\w*) \[.* runs the model's own forward: klfast has no meta kernel"
    ):
        assert ops_called_off_the_cpu(klfast.accelerate(state_space_model)) == called


PACKAGES = ("mamba_ssm", "causal_conv1d", "fla")


@pytest.fixture
def seems_on_cuda(model, monkeypatch):
    """Make all parameters of the model report that device."""
    parameters = [SimpleNamespace(device=torch.device("cuda", 0)) for _ in model.parameters()]
    monkeypatch.setattr(model, "parameters", lambda: iter(parameters))


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_mamba_ssm_is_refused_off_cuda(model, device, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    parameters = [SimpleNamespace(device=torch.device(device)) for _ in model.parameters()]
    monkeypatch.setattr(model, "parameters", lambda: iter(parameters))
    with pytest.raises(
        InvalidInputError, match=f"needs a model on a CUDA device, this one is on {device}; move it"
    ) as caught:
        klfast.accelerate(model, ssm="mamba_ssm")
    assert "\n" not in str(caught.value)
    assert not any(is_accelerated(m) for m in model.modules())


@pytest.mark.usefixtures("seems_on_cuda")
@pytest.mark.parametrize("missing", PACKAGES)
def test_mamba_ssm_is_refused_where_a_package_is_missing(model, missing, monkeypatch):
    needed = {REPLACEMENTS[name].package for mixer in mixers(model) for name in mixer_of(type(mixer)).functions}
    assert "causal_conv1d" in needed
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None if package == missing else ModuleType(package))
    if missing not in needed:
        klfast.accelerate(model, ssm="mamba_ssm")
        return
    with pytest.raises(
        KernelUnavailableError, match=f"needs the package {missing}, which cannot be imported"
    ) as caught:
        klfast.accelerate(model, ssm="mamba_ssm")
    assert "\n" not in str(caught.value)
    assert not any(is_accelerated(m) for m in model.modules())


def test_an_unknown_ssm_is_refused(model):
    with pytest.raises(InvalidInputError, match='"klfast" or "mamba_ssm", got \'mamba\''):
        klfast.accelerate(model, ssm="mamba")
    assert not any(is_accelerated(m) for m in model.modules())


@pytest.mark.usefixtures("seems_on_cuda")
def test_mamba_ssm_leaves_the_mixers_their_own_forward(model, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for ssm in ("klfast", "mamba_ssm", "klfast", "mamba_ssm"):
        assert klfast.accelerate(model, ssm) is model
        assert all(is_accelerated(m) == (ssm == "klfast") for m in mixers(model))
        norms = [module for module in model.modules() if norm_of(type(module)) is not None]
        assert is_accelerated(model.lm_head) and norms and all(map(is_accelerated, norms))
    with prepared(model, None):
        assert not any(is_accelerated(m) for m in mixers(model)), "a sweep goes by the user's choice"
    assert not any(is_accelerated(m) for m in klfast.unaccelerate(model).modules())
