"""The scans of examples/training_scan.py against a step-by-step loop: outputs and gradients."""

import functools
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hymba_models import tiny_model

import klfast
from klfast.dispatch import pins
from klfast.models.hymba import ssm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_bundled
import training_scan


def loop_scan(u, step, A, B, C, D, z):
    delta = F.softplus(step)
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + D * u) * F.silu(z)


def scan_inputs(length, channels=32, state=16, batch=2):
    torch.manual_seed(length)
    rates = -torch.arange(1.0, state + 1).repeat(channels, 1) * torch.rand(channels, 1)
    shapes = [
        (batch, length, channels),
        (batch, length, state),
        (batch, length, state),
        (channels,),
        (batch, length, channels),
    ]
    u, B, C, D, z = (torch.randn(shape) for shape in shapes)
    return [t.requires_grad_() for t in (u, torch.randn(batch, length, channels) * 2, rates, B, C, D, z)]


def agree(function, expected, inputs, tolerance=2e-5):
    """Compare outputs and the gradient of every input, relative to the largest entry."""
    weight = torch.randn_like(expected(*inputs))
    results = []
    for f in (function, expected):
        out = f(*inputs)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), inputs)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert (got - want).abs().max() <= tolerance * want.abs().max(), f"result {i}"


@pytest.mark.parametrize("length", [1, 15, 16, 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_scan(length, compiled):
    if compiled and training_scan.kernels(16) is None:
        pytest.skip("no C++ compiler")
    function = training_scan.CompiledScan.apply if compiled else training_scan.selective_scan
    agree(function, loop_scan, scan_inputs(length))


def test_compiled_scan_in_bfloat16():
    if training_scan.kernels(16) is None:
        pytest.skip("no C++ compiler")

    def rounded(u, step, A, B, C, D, z):
        return training_scan.CompiledScan.apply(u.bfloat16(), step, A, B, C, D, z.bfloat16()).float()

    agree(rounded, loop_scan, scan_inputs(50), tolerance=2e-2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache folder for compiled kernels, apart from the shared temporary folder."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(training_scan, "kernels", functools.cache(training_scan.kernels.__wrapped__))
    return tmp_path / "cache"


@pytest.mark.slow
def test_compiled_kernels_lie_in_a_private_folder(cache, monkeypatch):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    mask = os.umask(0)
    try:
        assert training_scan.kernels(16) is not None
    finally:
        os.umask(mask)
    [library] = (cache / "klfast-training").iterdir()
    assert library.suffix == ".so" and not list((cache.parent / "shared").iterdir())
    assert stat.S_IMODE((cache / "klfast-training").stat().st_mode) == 0o700
    before = library.stat()
    training_scan.kernels.cache_clear()
    assert training_scan.kernels(16) is not None and library.stat() == before  # compiled once
    agree(training_scan.CompiledScan.apply, loop_scan, scan_inputs(15))
    monkeypatch.setattr(training_scan, "cpu", lambda: "another CPU that shares this home folder")
    training_scan.kernels.cache_clear()
    assert training_scan.kernels(16) is not None and len(list((cache / "klfast-training").iterdir())) == 2


@pytest.mark.parametrize("how", ["open to others", "of another user", "a link", "a dangling link", "a file"])
def test_kernels_that_others_may_have_written_are_not_loaded(cache, monkeypatch, how):
    folder = cache / "klfast-training"
    cache.mkdir()
    if how == "a file":
        folder.write_text("")
    elif "link" in how:
        folder.symlink_to(cache.parent / ("shared" if how == "a link" else "none"))
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o770 if how == "open to others" else 0o700)
    if how == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(training_scan.ctypes, "CDLL", lambda path: pytest.fail(f"loaded {path}"))
    with pytest.raises(PermissionError, match="must be a folder of your own"):
        training_scan.kernels(16)


@pytest.mark.parametrize("value", ["", "cache"])
def test_relative_cache_folders_are_ignored(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert training_scan.own_folder() == tmp_path / ".cache" / "klfast-training"


@pytest.mark.parametrize("length", [1, 7, 8, 30])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_scan(length, groups):
    heads, width, state = 4, 5, 6
    torch.manual_seed(length)
    x, delta = torch.randn(2, length, heads, width), torch.rand(2, length, heads) * 2
    A, D = -torch.rand(heads) * 4, torch.randn(heads)
    B, C = torch.randn(2, 2, length, groups, state)

    def loop(x, delta, A, B, C, D):
        share = heads // groups
        B, C = (t.repeat_interleave(share, dim=2) for t in (B, C))
        h, outputs = torch.zeros(2, heads, width, state), []
        for t in range(length):
            decay, step = torch.exp(delta[:, t] * A), delta[..., None] * x
            h = decay[..., None, None] * h + step[:, t, ..., None] * B[:, t, :, None]
            outputs.append((h * C[:, t, :, None]).sum(-1))
        return torch.stack(outputs, dim=1) + D[:, None] * x

    inputs = [t.requires_grad_() for t in (x, delta, A, B, C, D)]
    agree(lambda *tensors: training_scan.ssd_scan(*tensors, chunk=8), loop, inputs)


@pytest.mark.parametrize("length", [1, 3, 20])
def test_compiled_convolution(length):
    if training_scan.kernels(16) is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(length)
    wide = torch.randn(2, length, 64)
    inputs = [t.requires_grad_() for t in (wide, torch.randn(32, 4), torch.randn(32))]

    def expected(wide, weight, bias):
        x = F.pad(wide[..., :32].transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(x, weight[:, None], bias, groups=32)).transpose(1, 2)

    agree(lambda wide, weight, bias: training_scan.CompiledConv.apply(wide[..., :32], weight, bias), expected, inputs)


def test_hymba_trains_through_the_scans(monkeypatch):
    """Loss and gradients equal those of the plain functions, which warn that they are slow."""
    ids = torch.randint(0, 61, (2, 30))
    model = tiny_model(mamba_expand=2, hidden_size=80, sliding_window=9)
    for name in ("mamba_selective_scan", "causal_conv1d_fn"):
        monkeypatch.setattr(ssm, name, getattr(ssm, name))  # restored afterwards

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    with pytest.warns(klfast.SlowPathWarning):
        expected = gradients()
    training_scan.install("hymba")
    pins.forget_warnings()
    for name, found in gradients().items():
        assert (found - expected[name]).abs().max() <= 2e-3 * expected[name].abs().max(), name


def test_bundled_hymba():
    """It is as large as the others, with every part of the release."""
    config = (model := train_bundled.build_hymba()).config
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert config.num_memory_tokens and config.kv_reuse_group == [[1, 2, 3]] and config.rope_type == "ntk"
    assert {config.is_global(layer) for layer in range(config.num_hidden_layers)} == {True, False}
    steps = F.softplus(model.model.layers[0].mamba.dt_proj[0].bias)
    assert 0.0009 < steps.min() < 0.01 < steps.max() < 0.11
    muon, adamw = train_bundled.optimizers(model, 1e-3)
    assert len(muon.param_groups[0]["params"]) == 8 * 6 and len(adamw.param_groups[0]["params"]) == 1
