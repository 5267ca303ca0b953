"""``evaluate`` against float64 softmaxes of full logits."""

import math

import pytest
import torch
from tiny_models import SOME_TIED, VOCABULARY, batch, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.backends.cpu import divergence as cpu_divergence
from klfast.core import errors
from klfast.models import head
from klfast.models.linears import linears


def quantized(family, spec, activation="exact", **options):
    model = tiny(family, **options)
    return klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), spec), "uniform"), activation=activation)


@torch.no_grad()
def truth(model, batches, teacher):
    log_p, log_q, targets = [], [], []
    for ids in batches:
        log_p.append(teacher(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1))
        log_q.append(model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1))
        targets.append(ids[:, 1:].flatten())
    p, q, y = torch.cat(log_p), torch.cat(log_q), torch.cat(targets)
    kl = (p.exp() * (p - q)).sum(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    nll = -q.gather(1, y[:, None]).mean().item()
    rows = [row for ids in batches for row in ids]
    squares = sum(
        (part.sum() - len(part) * kl.mean()) ** 2 for part in kl.split([len(row) - 1 for row in rows])
    )  # tokens of a row are correlated
    stderr = (squares * len(rows) / (len(rows) - 1)).sqrt().item() / len(y) if len(rows) > 1 else math.nan
    return {
        "tokens": len(y),
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_token": nll / math.log(2),
        "kl": kl.mean().item(),
        "kl_stderr": stderr,
        "kl_student_teacher": (q.exp() * (q - p)).sum(-1).mean().item(),
        "jsd": (0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)).mean().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "teacher_perplexity": math.exp(-p.gather(1, y[:, None]).mean().item()),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), SOME_TIED)
def test_equals_full_softmaxes(family, tied):
    teacher, model = tiny(family, tied), quantized(family, QuantSpec(4, 16), tied=tied)
    batches = [batch(3, 12), batch(1, 2, seed=2), batch(2, 7, seed=3)]
    found, expected = klfast.evaluate(model, batches, teacher), truth(model, batches, teacher)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    alone = klfast.evaluate(model, batches)
    assert (alone.perplexity, alone.nll, alone.bits_per_token, alone.tokens) == pytest.approx(
        (found.perplexity, found.nll, found.bits_per_token, 33 + 1 + 12)
    )
    assert (alone.kl, alone.top1_agreement, alone.teacher_perplexity) == (None, None, None)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "granite", "phi", "recurrent_gemma"])
def test_scaled_and_capped_logits_equal_full_softmaxes(family, monkeypatch):
    teacher, model = tiny(family), quantized(family, QuantSpec(4, 16))
    batches = [batch(3, 12), batch(1, 2, seed=2)]
    found, expected = klfast.evaluate(model, batches, teacher), truth(model, batches, teacher)
    monkeypatch.setattr(head, "_MOST_LOGITS", 5 * VOCABULARY)
    in_blocks = klfast.evaluate(model, batches, teacher)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
        assert getattr(in_blocks, name) == pytest.approx(value, rel=1e-4), name


def test_standard_error_equals_the_sweeps():
    teacher, spec, ids = tiny("llama"), QuantSpec(4, 16), batch(6, 20)
    name = "model.layers.0.mlp.up_proj"
    swept = klfast.sweep(teacher, ids, [spec], layers=[name]).measurements[name, spec]
    model = klfast.quantize_model(tiny("llama"), Plan({name: spec}, "uniform"))
    found = klfast.evaluate(model, ids.split(4), teacher)
    assert (found.kl, found.kl_stderr) == pytest.approx(
        (swept.mean["kl_teacher_student"], swept.stderr["kl_teacher_student"]), rel=1e-3
    )
    assert math.isnan(klfast.evaluate(model, [ids[:1]], teacher).kl_stderr)


def test_int8_activations_count():
    model, teacher = quantized("llama", QuantSpec(4, 16), activation="int8"), tiny("llama")
    expected = truth(model, [batch()], teacher)
    assert klfast.evaluate(model, [batch()], teacher).kl == pytest.approx(expected["kl"], rel=1e-4)


def test_a_model_against_itself():
    model = tiny("mamba", dtype=torch.bfloat16)
    found = klfast.evaluate(model, [batch()], model)
    assert (found.kl, found.kl_stderr, found.top1_agreement) == (0, 0, 1) and found.jsd < 1e-12
    assert found.perplexity == found.teacher_perplexity


def test_full_logits_are_never_made_and_modes_are_kept():
    model, teacher, done = tiny("mamba").train(), tiny("mamba"), []
    rows = []
    for one in (model, teacher):
        one.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    klfast.evaluate(
        model, (ids for ids in [batch(2, 40), batch(4, 40)]), teacher, progress=lambda *args: done.append(args)
    )
    assert max(rows) <= 8 and done == [(1, 2, ""), (2, 2, "")]
    assert model.training and not teacher.training


@pytest.mark.parametrize("model", [tiny("mamba"), quantized("mamba", QuantSpec(4, 16))], ids=["float", "quantized"])
def test_without_a_teacher_logits_are_made_once(model, monkeypatch):
    products, logits = [], cpu_divergence.block_logits
    monkeypatch.setattr(cpu_divergence, "block_logits", lambda *args: products.append(args) or logits(*args))
    klfast.evaluate(model, [batch()])
    assert len(products) == 1


def test_perplexity_beyond_floats_is_infinite():
    model = tiny("mamba")
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    assert klfast.evaluate(model, [batch()]).perplexity == math.inf


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "batches is empty"),
        ([batch().int()], r"batch 0 must be an int64 tensor \[B, T\] of token ids, got torch.int32 \[2, 12\]"),
        ([batch()[None]], r"got torch.int64 \[1, 2, 12\]"),
        (["text"], "got str"),
        ([batch(), batch()[:, :1]], "batch 1 has windows of 1 tokens"),
        ([batch()[:0]], "batches is empty"),
        ([batch() + VOCABULARY], r"between 0 and 60.*another tokenizer"),
        ([batch() - VOCABULARY], "batch 0 holds token id -"),
    ],
)
def test_refuses_batches(batches, match):
    with pytest.raises(errors.InvalidInputError, match=match):
        klfast.evaluate(tiny("mamba"), batches)


def replace_logits(output, factor):
    output.logits = factor * output.logits
    return output


def test_refuses_models():
    def refuses(match, *args):
        with pytest.raises(errors.InvalidInputError, match=match):
            klfast.evaluate(*args)

    model = tiny("mamba")
    refuses("no linear head", model.backbone, [batch()])
    other = tiny("mamba")
    other.lm_head = torch.nn.Linear(64, VOCABULARY + 3, bias=False)
    refuses("one vocabulary", model, [batch()], other)
    with torch.no_grad():
        other = tiny("mamba")
        other.backbone.norm_f.weight[3] = torch.nan
    refuses("NaN", other, [batch()])
    refuses("NaN", model, [batch()], other)
    scaled = tiny("llama")
    forward = scaled.forward
    scaled.forward = lambda **kwargs: replace_logits(forward(**kwargs), 1.01)
    refuses("more to its logits than multiply", scaled, [batch()])


def test_float64_is_used_only_on_the_cpu(monkeypatch):
    """Some GPUs lack it: a tensor moves to the CPU before it is widened, here and in a sweep."""
    moved, cpu, double = [], torch.Tensor.cpu, torch.Tensor.double

    def to_cpu(tensor):
        moved.append(cpu(tensor))
        return moved[-1]

    def widened(tensor):
        assert any(tensor is one for one in moved), "not moved to the CPU before widening"
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", widened)
    model = tiny("mamba")
    assert klfast.evaluate(model, [batch(2, 5)], model).tokens == 8
    klfast.sweep(model, [batch(2, 5)], ["int4-g32-sym"], layers=[next(iter(linears(model)))], progress=False)
