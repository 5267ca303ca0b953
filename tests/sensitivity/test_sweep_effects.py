"""Side effects of a sweep: the restored model, precision, memory and progress output."""

import copy

import pytest
import torch
from sweep_models import KL, assert_same, make, means, snapshot, tokens

import klfast
from klfast.models.block_chain import Chain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("failing", [False, True])
def test_leaves_the_model_as_it_was(dtype, failing, monkeypatch):
    model = make("mamba2", tied=True).to(dtype)
    model.train()
    model.backbone.layers[0].eval()
    before = snapshot(model)
    if failing:
        measure = Chain.step
        steps = []

        def stops(*args):
            steps.append(args)
            if len(steps) == 12:  # after the teacher and the noise floor, with a layer swapped
                raise KeyboardInterrupt
            return measure(*args)

        monkeypatch.setattr(Chain, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            klfast.sweep(model, tokens())
    else:
        klfast.sweep(model, tokens())
    assert_same(before, snapshot(model))
    assert torch.is_grad_enabled()


def test_half_precision_models_are_measured_in_float32():
    model = make().to(torch.bfloat16)
    ids = tokens()
    found = klfast.sweep(model, ids, "int8")
    assert means(found) == means(klfast.sweep(copy.deepcopy(model).float(), ids, "int8"))
    coarse = klfast.sweep(model, ids, "int8", dtype=None)
    assert coarse.noise_floor[KL] > 1e3 * found.noise_floor[KL]
    assert any(m.below_noise for m in coarse.measurements.values()) and not any(
        m.below_noise for m in found.measurements.values()
    )


@torch.no_grad()
def test_noise_floor_has_the_size_of_float32_rounding():
    model, ids = make("llama"), tokens(8)
    exact = copy.deepcopy(model).double()(ids).logits[:, :-1].log_softmax(-1)
    rounded = model(ids).logits[:, :-1].double().log_softmax(-1)
    kl = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
    floor = klfast.sweep(model, ids, "int4", layers=["lm_head"]).noise_floor[KL]
    assert kl / 10 < floor < kl * 10


def test_memory_does_not_grow_with_the_calibration_set():
    from torch.profiler import ProfilerActivity, profile

    def peak(windows):
        ids = tokens(windows, 64)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            klfast.sweep(model, ids, "int8", layers=layers, max_batch_tokens=4 * 128)
        now = high = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                high = max(high, now)
        return high

    model = make("llama")
    layers = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    few, many = peak(2), peak(8)
    ids_bytes = 8 * 64 * 8
    assert few > 100_000 and many < few + 3 * ids_bytes


def test_progress_callback_counts_every_candidate():
    seen = []
    klfast.sweep(make(), tokens(2), "int4", max_batch_tokens=4 * 17, progress=lambda *args: seen.append(args))
    total = 2 * (1 + 5)
    assert [done for done, _, _ in seen] == [1, 3, 5, 6, 7, 9, 11, 12]
    assert {t for _, t, _ in seen} == {total} and [what for *_, what in seen][:4] == [
        "noise",
        "block 0",
        "block 1",
        "head",
    ]


def test_no_progress_bar_unless_asked(capfd):
    klfast.sweep(make(), tokens(1), "int4", layers=["lm_head"])
    assert capfd.readouterr() == ("", "")
    klfast.sweep(make(), tokens(1), "int4", layers=["lm_head"], progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err
