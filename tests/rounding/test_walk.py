"""Second-order rounding of whole models: which inputs it sees, what it compares, what it leaves to nearest."""

import copy
import warnings

import pytest
import torch
from sweep_models import snapshot
from tiny_models import SOME_TIED, VOCABULARY, batch, tiny

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.expert_names import expert_in, expert_name
from klfast.models.head import Readout, head_name
from klfast.models.linears import linears
from klfast.models.matrices import matrices, matrix, split_stacks, with_experts
from klfast.rounding import walk
from klfast.rounding.head_rows import clusters
from klfast.rounding.moments import Moments
from klfast.rounding.passes import add_inputs
from klfast.rounding.second_order import second_order
from klfast.rounding.walk import round_model

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = klfast.QuantSpec(4, 32)
WITH_EXPERTS = ("granite_hybrid_moe", "qwen3_next", "lfm2_moe", "nemotron_h_moe")
SHARED = ("zamba", "zamba2")


def text(rows=24, length=16, seed=1):
    return batch(rows, length, seed)


def specs_of(model, head=True):
    return {name: SPEC for name in matrices(model) if head or name != head_name(model)}


@torch.no_grad()
def with_weights(model, tensors):
    """Return a copy of the model with dequantized weights in their places."""
    found = copy.deepcopy(model)
    for name, tensor in tensors.items():
        one = matrix(found, name)
        one.weight.copy_(tensor.dequantize(torch.float32))
    return found


@torch.no_grad()
def kl(model, student, ids):
    log_p, log_q = (each(ids).logits.double().log_softmax(-1) for each in (model, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def nearest(model):
    return {name: klfast.quantize(matrix(model, name).weight.detach(), SPEC) for name in specs_of(model)}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [case for case in SOME_TIED if case[0] not in SHARED])
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
def test_every_matrix_is_rounded_by_what_enters_it(family, tied):
    model, ids = tiny(family, tied), text()
    if any(one.is_stack for one in matrices(model).values()):
        ids = text(64)
    before = snapshot(model)
    found = round_model(model, specs_of(model), ids, progress=False)
    after = snapshot(model)
    assert all(torch.equal(old[3], after[0][name][3]) for name, old in before[0].items())
    assert {name: old[:3] for name, old in before[0].items()} == {name: new[:3] for name, new in after[0].items()}
    assert before[1] == after[1]
    assert found.notes == {} and set(found.tensors) == set(specs_of(model))
    assert kl(model, with_weights(model, found.tensors), ids) < 0.8 * kl(
        model, with_weights(model, nearest(model)), ids
    )


def inputs_of(model, name, ids):
    """Return what enters a linear layer that the forward calls, float64 [tokens, K]."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    (x,) = seen
    return x.double()


def agreement(found, truth):
    return (found.dequantize(torch.float32) == truth.dequantize(torch.float32)).float().mean().item()


@pytest.mark.parametrize("before", ["model.layers.0.", "model.layers.1.self_attn."])
@torch.no_grad()
def test_a_matrix_sees_those_before_it_rounded_and_aims_at_the_full_output(before):
    model, ids = tiny("llama", seed=3), text()
    name = "model.layers.1.mlp.gate_proj"
    specs = {each: SPEC for each in matrices(model) if each.startswith(before)} | {name: SPEC}
    found = round_model(model, specs, ids, progress=False).tensors
    student = with_weights(model, {each: found[each] for each in found if each != name})
    x, y = inputs_of(model, name, ids), inputs_of(student, name, ids)
    weight = model.get_submodule(name).weight
    truth = second_order(weight, SPEC, (y.T @ y).float() / len(y), (y.T @ x).float() / len(y))
    own = second_order(weight, SPEC, (x.T @ x).float() / len(x))
    assert agreement(found[name], truth) > 0.98 > agreement(found[name], own)


@torch.no_grad()
def test_an_untied_head_sees_the_rounded_model():
    model, ids = tiny("llama"), text()
    found = round_model(model, specs_of(model), ids, progress=False).tensors
    student = with_weights(model, {name: one for name, one in found.items() if name != "lm_head"})
    x, y = (inputs_of(each, "lm_head", ids).float() for each in (model, student))
    moments = Moments(64, x.device)
    moments.add(y, x)
    of_rows = clusters(Readout(model.lm_head.weight), [y[None]], [x[None]], moments)
    truth = second_order(model.lm_head.weight, SPEC, of_rows.hessian, of_rows.cross, cluster=of_rows.of_row)
    assert agreement(found["lm_head"], truth) > 0.98


@torch.no_grad()
def test_a_tied_head_is_rounded_first_and_the_blocks_read_its_rows():
    model, ids = tiny("llama", tied=True), text()
    name = "model.layers.0.self_attn.q_proj"
    found = round_model(model, {"lm_head": SPEC, name: SPEC}, ids, progress=False).tensors
    x = inputs_of(model, "lm_head", ids)
    student = with_weights(model, {"lm_head": found["lm_head"]})
    x, y = (inputs_of(each, name, ids) for each in (model, student))
    weight = model.get_submodule(name).weight
    truth = second_order(weight, SPEC, (y.T @ y).float() / len(y), (y.T @ x).float() / len(y))
    own = second_order(weight, SPEC, (x.T @ x).float() / len(x))
    # The 61 embeddings span fewer dimensions than there are, where float32 alone decides.
    assert agreement(found[name], truth) > 0.9 > 0.7 > agreement(found[name], own)


@torch.no_grad()
def test_mambas_dt_proj_sees_its_part_of_x_proj():
    """Its forward multiplies by the weight itself and never calls the layer."""
    model, ids = tiny("mamba"), text()
    name, before = "backbone.layers.0.mixer.dt_proj", "backbone.layers.0.mixer.x_proj"
    found = round_model(model, {name: SPEC}, ids, progress=False).tensors[name]
    weight, x_proj = (model.get_submodule(each).weight for each in (name, before))
    x = inputs_of(model, before, ids) @ x_proj.double()[: weight.shape[1]].T
    moment = (x.T @ x).float() / len(x)
    assert agreement(found, second_order(weight, SPEC, moment, moment)) > 0.98


@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_experts_are_rounded_by_their_own_tokens(family):
    model, ids = tiny(family), text(64)
    name = next(name for name, one in matrices(model).items() if one.is_stack)
    stack, seen = matrix(model, name), []
    hook = stack.holder.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(ids)
    hook.remove()
    hidden, index = seen[0][:2]
    found = round_model(model, {name: SPEC}, ids, progress=False)
    n = stack.tensor.shape[1]
    for expert, weight in enumerate(stack.tensor):
        x = hidden[(index == expert).any(-1)].double()
        moment = (x.T @ x).float() / max(1, len(x))
        few = len(x) < weight.shape[1]
        truth = klfast.quantize(weight, SPEC) if few else second_order(weight, SPEC, moment, moment)
        assert agreement(found.tensors[name].block(expert * n, (expert + 1) * n), truth) > 0.98
        assert few or name not in found.nearest


@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
def test_single_experts_are_rounded_each_in_its_spec(family, tmp_path):
    """As in a stack of that spec; what is kept of them is read again."""
    model, ids = tiny(family), text(64)
    stacks = [name for name, one in matrices(model).items() if one.is_stack][:2]  # of one block
    finer = klfast.QuantSpec(8, 16)
    whole = {spec: round_model(model, dict.fromkeys(stacks, spec), ids, progress=False) for spec in (SPEC, finer)}
    specs = {expert_name(stack, i): (SPEC, finer)[i % 2] for stack in stacks for i in (0, 1, 3)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = round_model(model, specs, ids, resume=tmp_path / "kept", progress=False)
    again = round_model(model, specs, ids, resume=tmp_path / "kept", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.tensors.keys() == specs.keys() == again.tensors.keys()
    for name, spec in specs.items():
        stack, expert = expert_in(name)
        n = matrix(model, name).shape[0]
        expected = whole[spec].tensors[stack].block(expert * n, (expert + 1) * n)
        assert torch.equal(found.tensors[name].dequantize(), expected.dequantize()), name
        assert torch.equal(again.tensors[name].dequantize(), expected.dequantize()), name
        assert (name in found.notes) == (name in found.nearest)
    assert found.notes == again.notes


@torch.no_grad()
def test_later_layers_see_single_experts_rounded():
    """Named one by one, all experts of a block change what enters the next as the stack does."""
    model, ids = tiny("lfm2_moe"), text(64)
    stacks = [name for name, one in matrices(model).items() if one.is_stack]
    later = {name: SPEC for name, one in matrices(model).items() if ".layers.2." in name and not one.is_stack}
    experts = {name: SPEC for name in with_experts(matrices(model)) if name.rpartition(".")[0] in stacks}
    one, each = (
        round_model(model, specs | later, ids, progress=False) for specs in (dict.fromkeys(stacks, SPEC), experts)
    )
    alone = round_model(model, later, ids, progress=False)
    assert len(experts) == 4 * len(stacks) and len(later) == 2
    for name in later:
        assert torch.equal(one.tensors[name].dequantize(), each.tensors[name].dequantize())
    assert any(not torch.equal(alone.tensors[name].dequantize(), each.tensors[name].dequantize()) for name in later)


@torch.no_grad()
def test_quantize_model_rounds_single_experts():
    model, ids = tiny("lfm2_moe"), text(64)
    specs = {name: SPEC for name in with_experts(matrices(model)) if ".experts." in name and not name.endswith(".1")}
    rounded = round_model(model, specs, ids, progress=False)
    student = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        klfast.quantize_model(student, klfast.Plan(specs, "uniform"), rounding="gptq", calibration=ids, progress=False)
    for stack, held in split_stacks(student).items():
        assert held.full == [1]
        for expert, layer in held.layers():
            name = expert_name(stack, expert)
            assert torch.equal(layer.quantized.dequantize(), rounded.tensors[name].dequantize())
            assert layer.rounding == ("nearest" if name in rounded.nearest else "gptq")


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
def test_models_with_experts_come_closer(family):
    model, ids = tiny(family), text(64)
    found = round_model(model, specs_of(model), ids, progress=False)
    assert not any("was not seen" in reason for reason in found.notes.values())
    assert kl(model, with_weights(model, found.tensors), ids) < 0.8 * kl(
        model, with_weights(model, nearest(model)), ids
    )


@torch.no_grad()
@pytest.mark.parametrize("specs", [(SPEC,), (SPEC, None)], ids=["stack", "some"])
def test_experts_are_rounded_behind_a_quantized_first_matrix(specs):
    model = tiny("qwen3_next")
    for name, one in matrices(model).items():
        if one.is_stack and name.endswith("gate_up_proj"):
            chosen = {expert_name(name, i): specs[i % len(specs)] for i in range(len(one.tensor))}
            plan = {each: spec for each, spec in chosen.items() if spec} if len(specs) > 1 else {name: SPEC}
            klfast.quantize_model(model, klfast.Plan(plan, "uniform"))
    dense = tiny("qwen3_next")
    for name, one in matrices(dense).items():
        one.weight.copy_(matrix(model, name).weight)
    names = [name for name, one in matrices(dense).items() if one.is_stack and name.endswith("down_proj")]
    found, truth = (round_model(each, dict.fromkeys(names, SPEC), text(96)) for each in (model, dense))
    assert names and found.notes == truth.notes
    for name in names:
        codes, want = (each.tensors[name].dequantize(torch.float32) for each in (found, truth))
        assert (codes != want).float().mean() < 0.01  # products differ in their last bits
        assert not torch.equal(codes, nearest(dense)[name].dequantize(torch.float32))


class RoutedMLP(torch.nn.Module):
    """An MLP that only the tokens whose first feature is positive pass, with or without a third of the batch."""

    def __init__(self, mlp, fixed):
        super().__init__()
        self.mlp, self.fixed = mlp, fixed

    def forward(self, x):
        chosen = x[..., 0] > 0
        if self.fixed:
            chosen = torch.zeros_like(chosen)
            chosen[:, ::3] = True
        y = torch.zeros_like(x)
        if chosen.any():
            y[chosen] = self.mlp(x[chosen])
        return y


@pytest.mark.parametrize("fixed", [False, True], ids=["routed", "fixed"])
def test_linear_layers_that_some_tokens_reach_are_rounded_to_nearest(fixed):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = RoutedMLP(layer.mlp, fixed)
    found = round_model(model, specs_of(model), text(96))
    routed = {name for name in specs_of(model) if ".mlp." in name}
    assert found.nearest == routed and set(found.notes.values()) == {"only some of the tokens reach it"}
    for name in routed:
        assert all(map(torch.equal, found.tensors[name].parts, nearest(model)[name].parts))


def test_inputs_of_other_tokens_are_not_paired():
    y, moments = torch.randn(6, 4), {}
    add_inputs(moments, {"a": y, "b": y, "gone": y[:0], "one": y.clone()}, {"a": y, "b": y, "lost": y, "one": y}, 6)
    assert moments["a"] is moments["b"] and moments["a"].tokens == 6 and moments["one"].tokens == 6
    assert {name for name, one in moments.items() if one.why_useless().startswith("only some")} == {"gone", "lost"}
    z = y.clone()
    add_inputs(moments, {"a": z, "b": z, "one": z[:3]}, {"a": y, "b": y, "one": y[:3]}, 6)
    assert moments["a"].tokens == 12 and not moments["one"].are_paired
    torch.testing.assert_close(moments["a"].hessian, 2 * y.T @ y)


@torch.no_grad()
def test_experts_with_too_few_tokens_are_rounded_to_nearest():
    model, ids = tiny("qwen3_next"), text(6)
    name = next(name for name, one in matrices(model).items() if one.is_stack)
    found = round_model(model, {name: SPEC}, ids, progress=False)
    stack = matrix(model, name)
    assert "experts; only " in found.notes[name] and "of the 64 tokens that are needed" in found.notes[name]
    nearest_ones = klfast.quantize(stack.weight, SPEC).dequantize(torch.float32).view(stack.tensor.shape)
    same = (found.tensors[name].dequantize(torch.float32).view(stack.tensor.shape) == nearest_ones).all(-1).all(-1)
    count = int(found.notes[name].split(" of its ")[0])
    assert same.sum() == count and (name in found.nearest) == bool(same.all())


def test_too_little_text_leaves_all_to_nearest():
    model = tiny("llama")
    found = round_model(model, specs_of(model), text(1, 9), progress=False)
    assert set(found.notes) == found.nearest == set(specs_of(model))
    assert set(found.notes.values()) == {
        "only 9 of the 64 tokens that are needed reach it",
        "only 9 of the 96 tokens that are needed reach it",
    }
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor.scale, klfast.quantize(matrix(model, name).weight, SPEC).scale)


@pytest.mark.parametrize("family", SHARED)
def test_weights_that_blocks_share_are_rounded_to_nearest(family):
    model, ids = tiny(family, tied=True), text()
    found = round_model(model, specs_of(model), ids, progress=False)
    assert found.nearest and set(found.notes.values()) == {"no single block holds it"}
    assert kl(model, with_weights(model, found.tensors), ids) < kl(model, with_weights(model, nearest(model)), ids)


def test_what_is_always_zero_is_rounded_to_nearest():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    found = round_model(model, specs_of(model), text(), progress=False)
    assert found.notes == {"model.layers.0.mlp.down_proj": "its input is always 0"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_rounded_in_float32(dtype):
    model, ids = tiny("mamba2", dtype=dtype), text()
    wide = copy.deepcopy(model).float()
    found, truth = (round_model(each, specs_of(each), ids, progress=False).tensors for each in (model, wide))
    assert all(torch.equal(found[name].packed, truth[name].packed) for name in truth)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_microbatches_make_little_difference(monkeypatch):
    model, ids = tiny("hymba"), text()
    whole = round_model(model, specs_of(model), ids, progress=False).tensors
    monkeypatch.setattr(walk, "MOST_TOKENS", 5 * 16)
    parts = round_model(model, specs_of(model), list(ids.split(2)), progress=False).tensors
    first = "model.layers.0.mamba.in_proj"  # a code that falls otherwise moves many of the matrices behind it
    assert agreement(parts[first], whole[first]) > 0.98
    assert kl(model, with_weights(model, parts), ids) < 1.3 * kl(model, with_weights(model, whole), ids)


def test_progress_names_every_matrix():
    model, seen = tiny("llama"), []
    round_model(model, specs_of(model), text(), progress=lambda *each: seen.append(each))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {name for _, _, name in seen} == set(specs_of(model)) and {total for _, total, _ in seen} == {len(seen)}


def test_bad_text_and_bad_models_are_refused_and_leave_the_model():
    model = tiny("llama")
    before = snapshot(model)[0]
    for ids, match in ((torch.tensor([[VOCABULARY, 1]]), "token id"), ([], "there is no text")):
        with pytest.raises(InvalidInputError, match=match):
            round_model(model, specs_of(model), ids, progress=False)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match=r"layers\.1\.self_attn\.o_proj: .*NaN"):
        round_model(model, specs_of(model), text(), progress=False)
    assert all(old[:3] == new[:3] for old, new in zip(before.values(), snapshot(model)[0].values(), strict=True))


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_ctrl_c_leaves_the_model_as_it_was(calls, monkeypatch):
    model, ids = tiny("mamba2", tied=True), text()
    before, made = snapshot(model)[0], []

    def interrupted(*arguments, **options):
        made.append(1)
        if len(made) == calls:
            raise KeyboardInterrupt
        return second_order(*arguments, **options)

    monkeypatch.setattr(walk, "second_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round_model(model, specs_of(model), ids, progress=False)
    after = snapshot(model)[0]
    assert all(old[:3] == after[name][:3] and torch.equal(old[3], after[name][3]) for name, old in before.items())


def test_only_matrices_with_a_spec_change():
    model, ids = tiny("mamba2"), text()
    wanted = [name for name in linears(model) if name.endswith("out_proj")]
    found = round_model(model, dict.fromkeys(wanted, SPEC), ids, progress=False)
    assert list(found.tensors) == wanted and not found.notes
