"""The sweep against the naive computation, its promises about model, memory and restarts, and bad input."""

import copy
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import klfast
from klfast.data import token_batches
from klfast.errors import CheckpointError, InvalidInputError, ModelMismatchError, UnknownLayerError
from klfast.loading import bundled_models, load_model, load_tokenizer
from klfast.models import layers as model_layers
from klfast.models.chain import Chain
from klfast.sensitivity.engine import SQNR_CAP
from klfast.sensitivity.results import METRICS, Sensitivities
from klfast.tally import Tally

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
MAKERS = {
    "mamba": lambda tied: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, tie_word_embeddings=tied)),
    "mamba2": lambda tied: Mamba2ForCausalLM(
        Mamba2Config(**SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, tie_word_embeddings=tied)
    ),
    "falcon_mamba": lambda tied: FalconMambaForCausalLM(FalconMambaConfig(**SMALL, state_size=4, tie_word_embeddings=tied)),
    "llama": lambda tied: LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    ),
}
KL = "kl_teacher_student"


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(family="mamba2", tied=False, seed=0):
    """A random model with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    model = MAKERS[family](tied).eval()
    with torch.no_grad():
        for weight in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            weight.mul_(4)
    return model


def tokens(windows=3, length=17, seed=1):
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive(model, ids, name, spec):
    """All metrics, [B, T - 1] each, from two whole models and float64 log-probabilities."""
    student = copy.deepcopy(model)
    weight = student.get_submodule(name).weight
    weight.copy_(klfast.quantize(weight, spec).dequantize(torch.float32))
    t, s = (network(ids).logits[:, :-1].double() for network in (model, student))
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    noise = (s - t).square().sum(-1)
    return {
        KL: (p * (log_p - log_q)).sum(-1),
        "kl_student_teacher": (q * (log_q - log_p)).sum(-1),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "mse": noise / t.shape[-1],
        "sqnr_db": (10 * (t.square().sum(-1) / noise).log10()).clamp(max=SQNR_CAP),
        "delta_ce": (log_p - log_q).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1),
        "top1_agree": (t.argmax(-1) == s.argmax(-1)).double(),
    }


def means(sensitivities):
    return {key: (m.mean, m.stderr, m.tokens, m.below_noise) for key, m in sensitivities.measurements.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", MAKERS)
def test_equals_the_naive_computation(family, tied):
    model, ids = make(family, tied), tokens()
    found = klfast.sweep(model, ids, ("int4-g32-sym", "int8-channel-asym"), max_batch_tokens=4 * 2 * ids.shape[1])
    names = list(model_layers.linears(model))
    specs = (klfast.QuantSpec(4, 32), klfast.QuantSpec(8, -1, False))
    assert set(found.measurements) == {(name, spec) for name in names for spec in specs}
    for (name, spec), measured in found.measurements.items():
        expected = naive(model, ids, name, spec)
        assert measured.tokens == 3 * 16 and not measured.below_noise
        for metric, values in expected.items():
            # Float32 cross-entropies of about 5 nats; logits that are equal in one computation, rounded in the other.
            room = {"delta_ce": 5e-6, "sqnr_db": 1.5 if family == "llama" else 0}.get(metric, 0)
            assert measured.mean[metric] == pytest.approx(values.mean().item(), rel=1e-3, abs=room), (name, spec, metric)
            stderr = values.mean(1).std().item() / math.sqrt(3)
            assert measured.stderr[metric] == pytest.approx(stderr, rel=2e-3, abs=1e-4 * values.mean().abs().item() + room), (name, spec, metric)


@pytest.mark.parametrize("name", bundled_models())
def test_equals_the_naive_computation_on_trained_models(name):
    model = klfast.unaccelerate(load_model(name))
    ids = token_batches("calibration", load_tokenizer(name), vocab_size=model.config.vocab_size, length=64, windows=2)[0]
    layers = [layer for layer in model_layers.linears(model) if ".layers.0." in layer or ".layers.6." in layer or layer == "lm_head"]
    found = klfast.sweep(model, ids, layers=layers)
    whole = copy.deepcopy(model).float()
    assert len(found.measurements) == 2 * len(layers) >= 10
    for (layer, spec), measured in found.measurements.items():
        expected = naive(whole, ids, layer, spec)[KL].mean().item()
        rounding = (expected * found.noise_floor[KL]) ** 0.5  # of the order of the mixed term of (signal + noise)^2
        assert measured.mean[KL] == pytest.approx(expected, rel=1e-3, abs=rounding), (layer, spec)


def test_quantizing_a_tied_head_changes_the_embedding():
    tied, untied = make(tied=True), make(tied=False)
    untied.load_state_dict(tied.state_dict())
    kl = [next(iter(klfast.sweep(m, tokens(), "int4", layers=["lm_head"]).measurements.values())).mean[KL] for m in (tied, untied)]
    assert kl[0] != pytest.approx(kl[1], rel=0.1)


def test_result_describes_the_model(tmp_path):
    model = make(tied=True).to(torch.bfloat16)
    found = klfast.sweep(model, tokens(), "int4", layers=["lm_head"])
    blank = Sensitivities.of(model)
    assert (found.fingerprint, found.layers, found.other_bytes) == (blank.fingerprint, blank.layers, blank.other_bytes)
    assert found.layers["lm_head"].float_bytes == VOCAB * 32 * 2
    assert found.provenance["windows"] == 3 and found.provenance["dtype"] == "torch.float32"
    found.to_json(tmp_path / "s.json")
    assert means(Sensitivities.from_json(tmp_path / "s.json")) == means(found)


def test_grouping_makes_no_difference():
    model, ids = make("llama"), tokens(4)
    layers = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    together = klfast.sweep(model, ids, layers=layers)
    for batches, limit in ((ids.split(1), 8192), (ids, 1), ([ids[:1], ids[1:1], ids[1:]], 4 * 3 * 17), (iter(ids.split(3)), 8 * 17)):
        other = klfast.sweep(model, batches, layers=layers, max_batch_tokens=limit)
        for key, measured in together.measurements.items():
            assert other.measurements[key].tokens == measured.tokens
            assert other.measurements[key].mean[KL] == pytest.approx(measured.mean[KL], rel=1e-4)


def test_windows_of_different_lengths_count_by_token():
    model, short, long = make(), tokens(2, 9), tokens(1, 33, seed=2)
    found = klfast.sweep(model, [short, long], "int4", layers=["lm_head"])
    (measured,) = found.measurements.values()
    spec = klfast.QuantSpec(4)
    expected = sum(naive(model, ids, "lm_head", spec)[KL].sum().item() for ids in (short, long)) / 48
    assert measured.tokens == 48 and measured.mean[KL] == pytest.approx(expected, rel=1e-3)


def test_the_plan_predicts_the_perplexity_on_the_calibration_text():
    model = load_model("mamba2")
    ids = token_batches("calibration", load_tokenizer("mamba2"), vocab_size=model.config.vocab_size, length=64, windows=4)
    found = klfast.sweep(model, ids, "int4", ["delta_ce"], layers=[f"backbone.layers.{i}.mixer.in_proj" for i in (0, 5)])
    full = klfast.evaluate(model, ids)
    assert found.provenance["ce_teacher"] == pytest.approx(full.nll, rel=1e-6)
    plan = klfast.plan(found, max_kl=10.0)
    small = klfast.evaluate(klfast.quantize_model(model, plan), ids)
    assert len(plan.specs) == 2 and small.perplexity != pytest.approx(full.perplexity, rel=2e-3)
    assert plan.predicted["perplexity"] == pytest.approx(small.perplexity, rel=1e-3)


def test_metrics_and_layers_can_be_chosen():
    model = make()
    name = "backbone.layers.1.mixer.in_proj"
    found = klfast.sweep(model, tokens(), [klfast.QuantSpec(4), "int4-g64-sym", "int8"], ["sqnr_db"], layers=[name])
    assert list(found.measurements) == [(name, klfast.QuantSpec(4)), (name, klfast.QuantSpec(8))]
    for measured in found.measurements.values():
        assert list(measured.mean) == list(measured.stderr) == [KL, "sqnr_db"]


def test_scale_search_is_passed_on():
    model = make()
    kl = [next(iter(klfast.sweep(model, tokens(), "int4", layers=["lm_head"], scale=scale).measurements.values())).mean["mse"] for scale in ("absmax", "mse")]
    assert kl[1] < kl[0]


# What it leaves behind --------------------------------------------------------------------------------------------


def snapshot(model):
    """Identity, storage, dtype and bits of every tensor, and every module's own attributes."""
    tensors = {name: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return tensors, {name: (module.training, set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}


def assert_same(before, after):
    assert before[1] == after[1]
    for name, (*facts, values) in before[0].items():
        assert facts == list(after[0][name][:3]) and torch.equal(values, after[0][name][3]), name


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
    assert any(m.below_noise for m in coarse.measurements.values()) and not any(m.below_noise for m in found.measurements.values())


@torch.no_grad()
def test_noise_floor_is_that_of_float32():
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
    assert 100_000 < few and many < few + 3 * ids_bytes


def test_progress_callback_counts_every_candidate():
    seen = []
    klfast.sweep(make(), tokens(2), "int4", max_batch_tokens=4 * 17, progress=lambda *args: seen.append(args))
    total = 2 * (1 + 5)
    assert [done for done, _, _ in seen] == [1, 3, 5, 6, 7, 9, 11, 12]
    assert {t for _, t, _ in seen} == {total} and [what for *_, what in seen][:4] == ["noise", "block 0", "block 1", "head"]


def test_no_progress_bar_unless_asked(capfd):
    klfast.sweep(make(), tokens(1), "int4", layers=["lm_head"])
    assert capfd.readouterr() == ("", "")
    klfast.sweep(make(), tokens(1), "int4", layers=["lm_head"], progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err


# Restarts ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_sweep
from klfast.sensitivity import sweeping

sweeping._SAVE_SECONDS = -1.0  # save after every group

def kill(done, total, what):
    if done >= 15:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
test_sweep.klfast.sweep(test_sweep.make(), test_sweep.tokens(), resume=sys.argv[2], max_batch_tokens=4 * 17, progress=kill)
"""


def test_a_killed_sweep_resumes_bit_for_bit(tmp_path):
    path = tmp_path / "resume.json"
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(path)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert json.loads(path.read_text())["sweep"]["next"] == [1, 2]  # in the middle of a micro-batch
    partial = Sensitivities.from_json(path)
    assert partial.provenance["micro_batches"] == [1, 3] and {m.tokens for m in partial.measurements.values()} == {16, 32}

    whole = klfast.sweep(make(), tokens(), max_batch_tokens=4 * 17)
    steps = []
    resumed = klfast.sweep(make(), tokens(), resume=path, max_batch_tokens=4 * 17, progress=lambda *args: steps.append(args))
    assert steps[0][0] > 15 and steps[-1][:2] == (33, 33)
    assert means(resumed) == means(whole) and resumed.noise_floor == whole.noise_floor
    assert means(Sensitivities.from_json(path)) == means(whole)

    steps.clear()
    again = klfast.sweep(make(), tokens(), resume=path, max_batch_tokens=4 * 17, progress=lambda *args: steps.append(args))
    assert means(again) == means(whole) and not steps


def test_resume_refuses_what_is_not_its_own(tmp_path):
    path = tmp_path / "resume.json"
    model, ids = make(), tokens()
    options = {"layers": ["lm_head"], "resume": path}
    result = klfast.sweep(model, ids, "int4", **options)
    before = path.read_text()
    for error, message, change in (
        (ModelMismatchError, "another model's sweep", {"model": make(seed=5)}),
        (InvalidInputError, "a sweep with other specs", {"specs": "int8"}),
        (InvalidInputError, "a sweep with other calibration", {"batches": tokens(seed=7)}),
        (InvalidInputError, "a sweep with other scale", {"scale": "mse"}),
        (InvalidInputError, "a sweep with other layers", {"layers": None}),
    ):
        with pytest.raises(error, match=message):
            klfast.sweep(**{"model": model, "batches": ids, "specs": "int4", **options, **change})
    assert path.read_text() == before

    result.to_json(tmp_path / "plain.json")
    with pytest.raises(CheckpointError, match="is not the resume file of a sweep"):
        klfast.sweep(model, ids, "int4", layers=["lm_head"], resume=tmp_path / "plain.json")
    path.write_text(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match=r"truncated or no JSON .*; to start anew delete it \(--no-resume\)"):
        klfast.sweep(model, ids, "int4", **options)
    for content in ("[]", "{}", '{"schema": "klfast-plan/1"}', json.dumps({**json.loads(before), "layers": 3})):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"; to start anew delete it \(--no-resume\)") as caught:
            klfast.sweep(model, ids, "int4", **options)
        assert str(caught.value).startswith(str(path))
    damaged = json.loads(before)
    damaged["sweep"]["sums"]["square"] = "AAAA"
    path.write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match=r"resume\.json is damaged \(the sums"):
        klfast.sweep(model, ids, "int4", **options)


def test_an_unwritable_resume_path_is_found_out_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        klfast.sweep(make(), tokens(), resume=tmp_path / "missing" / "resume.json", progress=lambda *_: pytest.fail("it measured"))


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, InvalidInputError, "batches is empty"),
        ({"batches": torch.empty(0, 8, dtype=torch.int64)}, InvalidInputError, "batches is empty"),
        ({"batches": [torch.zeros(2, 8)]}, InvalidInputError, r"batch 0 must be an int64 tensor \[B, T\] of token ids, got torch.float32 \[2, 8\]"),
        ({"batches": [torch.zeros(8, dtype=torch.int64)]}, InvalidInputError, r"batch 0 must be .* got torch.int64 \[8\]"),
        ({"batches": ["text"]}, InvalidInputError, "batch 0 must be .* got str"),
        ({"batches": [tokens(), tokens(2, 1)]}, InvalidInputError, "batch 1 has windows of 1 tokens"),
        ({"batches": tokens() + 50}, InvalidInputError, r"batch 0 holds token id \d+; the model's ids lie between 0 and 60"),
        ({"batches": tokens() - 50}, InvalidInputError, "batch 0 holds token id -"),
        ({"specs": []}, InvalidInputError, "there are no specs"),
        ({"specs": ["int5"]}, InvalidInputError, "'int5' is no quantization spec"),
        ({"specs": [4]}, InvalidInputError, "got int"),
        ({"metrics": ["ppl"]}, InvalidInputError, "there is no metric 'ppl'; choose from kl_teacher_student"),
        ({"scale": "max"}, InvalidInputError, "scale must be"),
        ({"layers": []}, InvalidInputError, "layers is empty"),
        ({"layers": ["lm_heat"]}, UnknownLayerError, "did you mean 'lm_head'"),
        ({"model": torch.nn.Linear(3, 3)}, InvalidInputError, "klfast sweeps causal language models"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message) as caught:
        klfast.sweep(**{"model": make(), "batches": tokens(), "specs": "int4", **change})
    assert "\n" not in str(caught.value)


def test_quantized_and_shared_layers_are_refused():
    model = make()
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = klfast.QuantLinear.from_linear(mixer.in_proj, klfast.QuantSpec())
    with pytest.raises(InvalidInputError, match=r"layers\.0\.mixer\.in_proj is quantized already"):
        klfast.sweep(model, tokens())
    model = make()
    first, second = model.backbone.layers
    second.mixer.in_proj = first.mixer.in_proj
    with pytest.raises(InvalidInputError, match=r"layers\.0\.mixer\.in_proj and backbone\.layers\.1\.mixer\.in_proj share one weight"):
        klfast.sweep(model, tokens())
    klfast.sweep(model, tokens(), layers=["lm_head"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_named_where_it_breaks(value):
    model = make()
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[3] = value
    with pytest.raises(InvalidInputError, match=r"full-precision model's hidden states are NaN or infinite from backbone\.layers\.1 on"):
        klfast.sweep(model, tokens())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_damaged_weight_is_named_before_anything_is_written(value, tmp_path):
    model = make()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[3, 4] = value
    with pytest.raises(InvalidInputError, match=r"the weight of backbone\.layers\.1\.mixer\.in_proj holds a NaN.*repair"):
        klfast.sweep(model, tokens(), layers=["lm_head"], resume=tmp_path / "sweep.json")
    assert not list(tmp_path.iterdir())


def test_a_candidate_that_breaks_the_model_is_named(monkeypatch):
    from klfast.sensitivity import engine

    whole = engine.fake_quantize

    def overflowing(weight, spec, **kwargs):
        rounded = whole(weight, spec, **kwargs)
        return rounded * math.inf if spec.bits == 4 and len(rounded) == VOCAB else rounded

    model = make(tied=True)
    monkeypatch.setattr(engine, "fake_quantize", overflowing)
    with pytest.raises(InvalidInputError, match=r"lm_head as int4-g64-sym makes the model's hidden states NaN or infinite"):
        klfast.sweep(model, tokens())


# The sums ---------------------------------------------------------------------------------------------------------


def test_tally_matches_the_formula_and_survives_json():
    generator = torch.Generator().manual_seed(0)
    tally = Tally(3, 2)
    sums, counts = [], []
    for windows, length in ((4, 16), (1, 7), (3, 16)):
        part = torch.rand(2, 2, windows, dtype=torch.float64, generator=generator) * length
        tally.add(1, part, length)
        sums.append(part)
        counts += [length] * windows
        copied = Tally(3, 2)
        copied.load(json.loads(json.dumps(tally.to_data())))
        tally = copied
    sums, counts = torch.cat(sums, -1), torch.tensor(counts, dtype=torch.float64)
    mean = sums.sum(-1) / counts.sum()
    residual = sums - counts * mean.unsqueeze(-1)
    stderr = (residual.square().sum(-1) * 8 / 7).sqrt() / counts.sum()
    for i in range(2):
        assert tally.tokens(1 + i) == 4 * 16 + 7 + 3 * 16
        assert tally.mean(1 + i) == pytest.approx(mean[i].tolist(), rel=1e-14)
        assert tally.stderr(1 + i) == pytest.approx(stderr[i].tolist(), rel=1e-10)
    assert tally.tokens(0) == 0


def test_one_window_has_no_standard_error():
    tally = Tally(1, 1)
    tally.add(0, torch.ones(1, 1, 1, dtype=torch.float64), 5)
    assert tally.mean(0) == [0.2] and math.isnan(tally.stderr(0)[0])
