"""Heads: the rule of a model's logits, and the divergence of scaled, capped and biased logits."""

import pytest
import torch
import transformers
from tiny_models import CONFIGS, VOCABULARY, batch, tiny
from torch import nn

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models import head
from klfast.models.families.base import LogitRule
from klfast.models.head import Head, Readout, divergence, find_head
from klfast.nn import QuantLinear

RULES = {
    "bamba": LogitRule(),
    "cohere": LogitRule(0.3),
    "falcon_h1": LogitRule(0.7),
    "gemma2": LogitRule(softcap=2.5),
    "granite": LogitRule(1 / 3),
    "granite_hybrid": LogitRule(1 / 3),
    "hyperclovax": LogitRule(0.3),
    "jamba": LogitRule(),
    "llama": LogitRule(),
    "mamba": LogitRule(),
    "nemotron_h": LogitRule(),
    "recurrent_gemma": LogitRule(softcap=30.0),
    "xlstm": LogitRule(softcap=30.0),
    "zamba": LogitRule(),
    "zamba2": LogitRule(),
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    # xLSTM in bfloat16 does not run in transformers itself: its code mixes dtypes.
    [(family, torch.float32) for family in RULES] + [(family, torch.bfloat16) for family in RULES if family != "xlstm"],
)
@torch.no_grad()
def test_the_rule_is_read_from_the_configuration_and_verified(family, dtype):
    model = tiny(family, dtype=dtype)
    found, logits = find_head(model, batch())
    assert found.rule == RULES[family]
    assert torch.equal(logits, model(batch()).logits)
    hidden = model.base_model(input_ids=batch(), use_cache=False)[0]
    torch.testing.assert_close(
        found(hidden).to(logits.dtype), logits, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("attribute", ["logits_scaling", "final_logit_softcapping", "logit_scale"])
def test_an_attribute_that_the_model_does_not_use_is_ignored(attribute):
    model = tiny("llama")
    setattr(model.config, attribute, 3.0)
    assert find_head(model, batch())[0].rule == LogitRule()


@pytest.mark.parametrize("family", ["llama", "granite_hybrid", "falcon_h1"])
def test_a_rule_that_is_not_in_the_configuration_is_refused(family):
    """Records are verified, too: here the model does more than its record describes."""
    model = tiny(family)
    forward = model.forward

    def more(**kwargs):
        output = forward(**kwargs)
        output.logits = output.logits * 1.001
        return output

    model.forward = more
    with pytest.raises(InvalidInputError, match="does more to its logits than multiply") as caught:
        find_head(model, batch())
    assert "\n" not in str(caught.value)


def test_a_configuration_that_changed_after_the_model_was_built():
    """Granite's forward reads it at each call, Falcon-H1's keeps the values from its construction."""
    granite, falcon = tiny("granite_hybrid"), tiny("falcon_h1")
    granite.config.logits_scaling = 5.0
    assert find_head(granite, batch())[0].rule == LogitRule(1 / 5)
    falcon.config.lm_head_multiplier = 0.2
    with pytest.raises(InvalidInputError, match="does more to its logits"):
        find_head(falcon, batch())


def whole(hidden, readout):
    """Return logits in float64."""
    weight = readout.weight
    weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    y = hidden.double() @ weight.double().T
    y = y if readout.bias is None else y + readout.bias.double()
    y = y * readout.rule.scale
    cap = readout.rule.softcap
    return y if cap is None else cap * torch.tanh(y / cap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "rule", [LogitRule(), LogitRule(0.3), LogitRule(0.25), LogitRule(softcap=4.0), LogitRule(1.7, 30.0)], ids=str
)
@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_divergence_equals_float64_on_whole_logits(kind, rule, bias, dtype, monkeypatch):
    monkeypatch.setattr(head, "_MOST_LOGITS", 7 * 300)
    monkeypatch.setattr(head, "_WIDENED_ROWS", 128)
    weight = torch.randn(300, 64).mul(0.3).to(dtype)
    added = torch.randn(300).to(dtype) if bias else None
    teacher_hidden = torch.randn(19, 64).to(dtype)
    student_hidden = (teacher_hidden.float() + 0.05 * torch.randn(3, 19, 64)).to(dtype)
    teacher = Readout(weight, added, rule)
    student = teacher if kind == "float" else Readout(klfast.quantize(weight, "int8-g32-sym"), added, rule)
    targets = torch.randint(0, 300, (19,))
    found = divergence(teacher_hidden, teacher, student_hidden, student, targets)
    log_p = whole(teacher_hidden, teacher).log_softmax(-1).repeat(3, 1)
    log_q = whole(student_hidden.reshape(-1, 64), student).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.kl_teacher_student.double(), expected, rtol=5e-5, atol=0)
    torch.testing.assert_close(found.kl_teacher_student.double().mean(), expected.mean(), rtol=1e-5, atol=0)
    ce = -log_q.gather(1, targets.repeat(3)[:, None]).squeeze(1)
    torch.testing.assert_close(found.ce_student.double(), ce, rtol=1e-5, atol=1e-5)
    assert found.top1_agree.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).double().tolist()
    assert divergence(teacher_hidden, teacher, teacher_hidden, teacher).kl_teacher_student.abs().max() == 0


def test_swapping_a_head_does_not_change_an_earlier_readout():
    """A sweep keeps the full-precision head while it measures a quantized one."""
    layer = nn.Linear(8, 5)
    before = Head(layer, LogitRule(0.5)).readout()
    kept = before.weight.clone()
    layer.weight.data = torch.zeros(5, 8)
    assert torch.equal(before.weight, kept) and not Head(layer).readout().weight.any()


def test_int8_activations_are_rounded_before_the_scale():
    layer = QuantLinear.from_linear(nn.Linear(32, 9), klfast.QuantSpec(8, 32), activation="int8")
    one = Head(layer, LogitRule(0.3))
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(one.readout().logits(one.inputs(hidden)), one(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite_hybrid"])
def test_logits_stay_in_blocks(family, monkeypatch):
    """A cap needs full logits, but only of a few tokens at a time; a scale needs none."""
    model, made, real = tiny(family), [], Readout.logits
    monkeypatch.setattr(head, "_MOST_LOGITS", 6 * VOCABULARY)
    monkeypatch.setattr(Readout, "logits", lambda self, hidden: made.append(len(hidden)) or real(self, hidden))
    klfast.evaluate(model, batch(3, 12))
    assert (max(made) <= 6) if family == "gemma2" else not made


def test_text_config_belongs_to_the_language_model():
    assert CONFIGS["gemma2"]().final_logit_softcapping == 2.5
    config = transformers.Gemma3Config(text_config=CONFIGS["gemma3"]().to_dict(), vision_config={"hidden_size": 32})
    holder = nn.Module()
    holder.config = config
    assert head.text_config(holder).model_type == "gemma3_text"


def test_a_scale_rounds_no_small_float16():
    hidden = torch.full((1, 2), 1e-4, dtype=torch.float16)
    assert Readout(torch.ones(3, 2), rule=LogitRule(0.0625)).scaled(hidden).double().eq(hidden.double() / 16).all()
