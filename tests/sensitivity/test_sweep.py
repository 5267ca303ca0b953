"""The sweep against the naive computation, and its options."""

import copy
import math

import pytest
import torch
from sweep_models import KL, VOCAB, make, means, naive, tokens
from tiny_models import SOME_TIED

import klfast
from klfast.checkpoint.by_name import bundled_models, load_model, load_tokenizer
from klfast.models.linears import linears
from klfast.models.matrices import matrices
from klfast.sensitivity.results import Sensitivities
from klfast.text import token_batches

pytestmark = pytest.mark.usefixtures("one_thread")
SQUARES = ("kl_teacher_student", "kl_student_teacher", "jsd", "mse")  # of small differences of the logits


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), SOME_TIED)
@torch.no_grad()
def test_equals_the_naive_computation(family, tied):
    model, ids = make(family, tied), tokens()
    found = klfast.sweep(model, ids, ("int4-g32-sym", "int8-channel-asym"), max_batch_tokens=4 * 2 * ids.shape[1])
    names = list(matrices(model))
    specs = (klfast.QuantSpec(4, 32), klfast.QuantSpec(8, -1, False))
    assert set(found.measurements) == {(name, spec) for name in names for spec in specs}
    teacher = model(ids).logits
    for (name, spec), measured in found.measurements.items():
        expected = naive(model, ids, name, spec, teacher)
        assert measured.tokens == 3 * 16 and measured.windows == 3
        if measured.below_noise:  # a layer that is not used: transformers unties Zamba2's blocks with its head
            assert measured.mean[KL] == 0 and not expected[KL].any()
            continue
        # Both computations round: the mixed term of (signal + noise)^2 remains.
        mixed = {m: 3 * (measured.mean[m] * floor) ** 0.5 for m, floor in found.noise_floor.items() if m in SQUARES}
        mixed["sqnr_db"] = 4.4 * mixed["mse"] / measured.mean["mse"]
        for metric, values in expected.items():
            # Float32 cross-entropies of about 5 nats; logits that are equal in one computation, rounded in the other.
            room = {"delta_ce": 5e-6, "sqnr_db": 1.5 if family == "llama" else 0}.get(metric, 0) + mixed.get(metric, 0)
            assert measured.mean[metric] == pytest.approx(values.mean().item(), rel=1e-3, abs=room), (
                name,
                spec,
                metric,
            )
            stderr = values.mean(1).std().item() / math.sqrt(3)
            assert measured.stderr[metric] == pytest.approx(
                stderr, rel=2e-3, abs=1e-4 * values.mean().abs().item() + room
            ), (name, spec, metric)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "family",
    [
        "granite_hybrid",
        "falcon_h1",
        "falcon_h1_norm",
        "granite",
        "cohere",
        "gemma2",
        "gemma3",
        "recurrent_gemma",
        "phi",
    ],
)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_kl_of_scaled_and_capped_logits_equals_float64(family, tied):
    model, ids, spec = make(family, tied), tokens(), klfast.QuantSpec(4, 32)
    found = klfast.sweep(model, ids, spec)
    assert found.noise_floor[KL] < 1e-10
    teacher = copy.deepcopy(model).double()
    log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    names = list(linears(model))
    for name in (*names[::3], names[-1]):
        student = copy.deepcopy(teacher)
        weight = klfast.quantize(model.get_submodule(name).weight, spec).dequantize(torch.float32)
        student.get_submodule(name).weight.copy_(weight)
        log_q = student(ids).logits[:, :-1].log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        assert found.measurements[name, spec].mean[KL] == pytest.approx(expected, rel=1e-5, abs=2 * rounding), name


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_models())
@torch.no_grad()
def test_equals_the_naive_computation_on_trained_models(name):
    model = klfast.unaccelerate(load_model(name))
    ids = token_batches("calibration", load_tokenizer(name), vocab_size=model.config.vocab_size, length=64, windows=2)[
        0
    ]
    layers = [layer for layer in linears(model) if ".layers.0." in layer or ".layers.6." in layer or layer == "lm_head"]
    found = klfast.sweep(model, ids, layers=layers)
    whole = copy.deepcopy(model).float()
    teacher = whole(ids).logits
    assert len(found.measurements) == 2 * len(layers) >= 10
    for (layer, spec), measured in found.measurements.items():
        expected = naive(whole, ids, layer, spec, teacher)[KL].mean().item()
        rounding = (expected * found.noise_floor[KL]) ** 0.5  # of the order of the mixed term of (signal + noise)^2
        assert measured.mean[KL] == pytest.approx(expected, rel=1e-3, abs=rounding), (layer, spec)


def test_quantizing_a_tied_head_changes_the_embedding():
    tied, untied = make(tied=True), make(tied=False)
    untied.load_state_dict(tied.state_dict())
    kl = [
        next(iter(klfast.sweep(m, tokens(), "int4", layers=["lm_head"]).measurements.values())).mean[KL]
        for m in (tied, untied)
    ]
    assert kl[0] != pytest.approx(kl[1], rel=0.1)


def test_result_describes_the_model(tmp_path):
    model = make(tied=True).to(torch.bfloat16)
    found = klfast.sweep(model, tokens(), "int4", layers=["lm_head"])
    blank = Sensitivities.of(model)
    assert (found.fingerprint, found.layers, found.other_bytes) == (blank.fingerprint, blank.layers, blank.other_bytes)
    assert found.layers["lm_head"].float_bytes == VOCAB * 64 * 2
    assert found.provenance["windows"] == 3 and found.provenance["dtype"] == "torch.float32"
    found.to_json(tmp_path / "s.json")
    assert means(Sensitivities.from_json(tmp_path / "s.json")) == means(found)


def test_grouping_makes_no_difference():
    model, ids = make("llama"), tokens(4)
    layers = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    together = klfast.sweep(model, ids, layers=layers)
    for batches, limit in (
        (ids.split(1), 8192),
        (ids, 1),
        ([ids[:1], ids[1:1], ids[1:]], 4 * 3 * 17),
        (iter(ids.split(3)), 8 * 17),
    ):
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
    ids = token_batches(
        "calibration", load_tokenizer("mamba2"), vocab_size=model.config.vocab_size, length=64, windows=4
    )
    found = klfast.sweep(
        model, ids, "int4", ["delta_ce"], layers=[f"backbone.layers.{i}.mixer.in_proj" for i in (0, 5)]
    )
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


def test_one_metric_or_spec_needs_no_list():
    model = make()
    found = klfast.sweep(model, tokens(1), "int4-g64-sym", "jsd", layers="lm_head")
    assert list(found.measurements) == [("lm_head", klfast.QuantSpec(4))]
    assert list(found.measurements["lm_head", klfast.QuantSpec(4)].mean) == [KL, "jsd"]
    assert list(klfast.sweep(model, tokens(1), klfast.QuantSpec(8), layers="lm_head").measurements) == [
        ("lm_head", klfast.QuantSpec(8))
    ]


def test_layers_are_chosen_by_patterns():
    model = make()

    def swept(**choice):
        return [name for name, _ in klfast.sweep(model, tokens(1, 5), "int4", **choice).measurements]

    projections = [
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.out_proj",
        "backbone.layers.1.mixer.in_proj",
        "backbone.layers.1.mixer.out_proj",
    ]
    assert swept(exclude="lm_head") == projections
    assert swept(layers="in_proj") == projections[::2]
    assert swept(layers=["layers.1.*", "lm_head"], exclude=["re:.*out_proj"]) == [projections[2], "lm_head"]


def test_scale_search_is_passed_on():
    model = make()
    kl = [
        next(iter(klfast.sweep(model, tokens(), "int4", layers=["lm_head"], scale=scale).measurements.values())).mean[
            "mse"
        ]
        for scale in ("absmax", "mse")
    ]
    assert kl[1] < kl[0]


def test_warns_once_about_unquantizable_layers():
    import warnings

    model = make("zamba")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        klfast.sweep(model, tokens(1), "int4")
        assert [" ".join(str(one.message).split()) for one in said if "quantized" in str(one.message)] == [
            str(said[0].message)
        ]
        assert (
            str(said[0].message).startswith("sweep: ")
            and "ZambaMambaMixer" in str(said[0].message)
            and said[0].filename == __file__
        )
        said.clear()
        klfast.sweep(model, tokens(1), "int4", layers="lm_head")  # no warning for layers named explicitly
        klfast.sweep(make(), tokens(1), "int4")
        assert not said
