"""klfast's pipeline on a tiny Hymba: the uses of in_proj's rows, and from a sweep to a served folder."""

import copy
import sys

import pytest
import torch
from hymba_models import GOLDEN, tiny_model
from sweep_models import KL, means
from tiny_folder import save_tokenizer
from transformers import AutoConfig

import klfast
from klfast.checkpoint.by_name import load_model, load_tokenizer
from klfast.models.hymba import HymbaForCausalLM
from klfast.models.linears import linears, row_parts
from klfast.reporting.sweep_tables import sweep_tables
from klfast.sensitivity.results import Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")
OWNER, CONSUMER = "model.layers.1.mamba.in_proj", "model.layers.2.mamba.in_proj"
INT4 = klfast.QuantSpec(4, 32)


def test_candidates():
    """Candidates are all linear layers, including the head, but not the convolution."""
    names = list(linears(tiny_model()))
    mixer, mlp = ("in_proj", "x_proj.0", "dt_proj.0", "out_proj"), ("gate_proj", "up_proj", "down_proj")
    blocks = [
        f"model.layers.{i}.{part}"
        for i in range(5)
        for part in (*(f"mamba.{m}" for m in mixer), *(f"moe.experts.0.{m}" for m in mlp))
    ]
    assert names == [*blocks, "lm_head"]


def test_row_parts():
    model = tiny_model()
    assert row_parts(model, OWNER) == {"q": (0, 40), "k": (40, 60), "v": (60, 100), "x": (100, 180), "z": (180, 260)}
    assert row_parts(model, CONSUMER) == {"q": (0, 40), "x": (40, 120), "z": (120, 200)}
    assert row_parts(model, "model.layers.1.mamba.out_proj") == row_parts(model, "lm_head") == {}


@torch.no_grad()
def test_sweep_by_rows(tmp_path):
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 20))
    found = klfast.sweep(model, ids, [INT4], layers=[OWNER, CONSUMER, "lm_head"], rows=True)
    assert set(found.rows) == {(name, use, INT4) for name in (OWNER, CONSUMER) for use in row_parts(model, name)}
    teacher = model(ids).logits[:, :-1].double().log_softmax(-1)
    for (name, use, spec), measured in found.rows.items():
        student = copy.deepcopy(model)
        weight, (first, end) = student.get_submodule(name).weight, row_parts(model, name)[use]
        weight[first:end] = klfast.quantize(weight[first:end], spec).dequantize(torch.float32)
        expected = (teacher.exp() * (teacher - student(ids).logits[:, :-1].double().log_softmax(-1))).sum(-1).mean()
        assert measured.mean[KL] == pytest.approx(expected.item(), rel=2e-3), (name, use)

    without = klfast.sweep(model, ids, [INT4], layers=[OWNER, CONSUMER, "lm_head"])
    assert not without.rows and means(without).keys() == means(found).keys()
    for key, measured in without.measurements.items():
        assert measured.mean[KL] == pytest.approx(found.measurements[key].mean[KL], rel=1e-3)

    found.to_json(tmp_path / "s.json")
    again = Sensitivities.from_json(tmp_path / "s.json")
    assert again.rows == found.rows
    (table,) = [t for t in sweep_tables(again) if t.title.startswith("By use")]
    kl = {
        use: [found.rows[name, use, INT4].mean[KL] for name in (OWNER, CONSUMER) if (name, use, INT4) in found.rows]
        for use in "qkvxz"
    }
    assert table.rows == tuple(("in_proj", use, pytest.approx(sum(values) / len(values))) for use, values in kl.items())
    assert not any(t.title.startswith("By use") for t in sweep_tables(without))


def test_from_sweep_to_folder(tmp_path):
    """Sweep, plan, quantize, save, load, evaluate and generate in bfloat16, the dtype of the release."""
    model = tiny_model(torch.bfloat16, vocab_size=256)
    teacher, ids = copy.deepcopy(model), torch.randint(0, 256, (2, 24))
    sensitivities = klfast.sweep(model, ids, ["int4-g16-sym", "int8-g16-sym"], metrics=[])
    plan = klfast.plan(sensitivities, mean_bits=6)
    klfast.quantize_model(model, plan)
    assert {spec.bits for spec in plan.specs.values()} == {4, 8}
    before = klfast.evaluate(model, [ids], teacher=teacher)
    assert 0 < before.kl < 1

    klfast.save_quantized(model, tmp_path / "small", save_tokenizer(tmp_path))
    loaded = load_model(tmp_path / "small", dtype="auto")
    assert type(loaded) is HymbaForCausalLM
    assert {name for name, m in linears(loaded).items() if isinstance(m, klfast.QuantLinear)} == set(plan.specs)
    after = klfast.evaluate(loaded, [ids], teacher=teacher)
    assert after.kl == pytest.approx(before.kl, rel=0.05)
    assert torch.equal(klfast.generate(loaded, ids, 20), klfast.generate(loaded, ids, 20))

    plain = klfast.generate(loaded.float(), ids, 20)
    with torch.inference_mode():
        assert torch.equal(
            plain,
            loaded.generate(
                ids, max_new_tokens=20, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=0
            ),
        )


def test_loading_registers_hymba(tmp_path, monkeypatch):
    """klfast's own functions do not require an import of klfast.models.hymba."""
    model = tiny_model()
    klfast.quantize_model(model, klfast.Plan({OWNER: klfast.QuantSpec(4, 20)}, "uniform"))
    klfast.save_quantized(model, tmp_path / "small", save_tokenizer(tmp_path))
    known = []
    for load in (
        lambda: load_model(GOLDEN / "swa_plain"),
        lambda: klfast.load_quantized(tmp_path / "small"),
        lambda: load_tokenizer(tmp_path / "small"),
    ):
        known.clear()
        monkeypatch.setattr(AutoConfig, "register", lambda name, *_, **__: known.append(name))
        monkeypatch.delitem(sys.modules, "klfast.models.hymba")
        load()
        assert known == ["hymba"]


def test_accelerate_changes_only_the_linear_layers():
    """In 16 bits klfast's products replace torch's; the result is the same."""
    model, ids = tiny_model(torch.bfloat16), torch.randint(0, 61, (2, 20))
    with torch.inference_mode():
        before = model(ids).logits
        klfast.accelerate(model)
        assert "forward" in vars(model.lm_head) and "forward" in vars(model.model.layers[0].mamba.in_proj)
        after = model(ids).logits
    assert (after - before).abs().mean() < 0.05 * before.abs().mean()
    klfast.unaccelerate(model)
    assert "forward" not in vars(model.lm_head)
