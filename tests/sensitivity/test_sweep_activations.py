"""Int8 activations in a sweep: against float64, with rounding and experts written out here."""

import copy
import json

import pytest
import torch
from sweep_models import KL, assert_same, make, means, snapshot, tokens
from tiny_models import in_float64, tiny

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.matrices import matrices, sharers
from klfast.sensitivity.results import Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = ("int4-g32-sym", "int8-g32-asym", "int6-channel-sym")  # in two different groups


def rounded(x, group):
    """Return x as q * s, with s = max|x| / 127 and q = round(x / s), for each row and group; in float32, as kernels."""
    wide, found = x.float(), torch.zeros_like(x)
    for start in range(0, x.shape[-1], group):
        part = wide[..., start : start + group]
        scale = part.abs().amax(-1, keepdim=True) / 127
        found[..., start : start + group] = torch.where(scale > 0, (part * (1 / scale)).round() * scale, 0)
    return found


def rounding_experts(experts, stack, group):
    """Return a forward of a mixture's experts that rounds the input of one of their stacks, token by token."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")

    def product(name, expert, x):
        return getattr(experts, name)[expert] @ (rounded(x, group) if name == stack else x)

    def forward(hidden, index, weights):
        found = torch.zeros_like(hidden)
        for token, x in enumerate(hidden):
            for expert, weight in zip(index[token], weights[token], strict=True):
                y = product(names[0], expert, x)
                gate, up = y.chunk(2) if experts.has_gate else (y, 1)
                found[token] += weight * product(names[1], expert, experts.act_fn(gate) * up)
        return found

    return forward


@torch.no_grad()
def truth(model, ids, names, group):
    """Return the KL in float64 of a model that rounds the input of these modules, or stacks of experts."""
    teacher = in_float64(model)
    student = copy.deepcopy(teacher)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        holder = student.get_submodule(parent)
        if isinstance(getattr(holder, leaf), torch.nn.Module):
            getattr(holder, leaf).register_forward_pre_hook(lambda _, args: (rounded(args[0], group), *args[1:]))
        else:
            holder.forward = rounding_experts(holder, leaf, group)
    log_p, log_q = (network(ids).logits[:, :-1].log_softmax(-1) for network in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def assert_equals_float64(model, ids, found):
    """Compare all measurements, with room for a value halfway between two codes that becomes the other one."""
    groups = {group[0]: group for group in sharers(model)}
    expected = {
        (name, klfast.QuantSpec.of(spec).group_length(one.shape[1]))
        for name, one in matrices(model).items()
        for spec in SPECS
        if (name, klfast.QuantSpec.of(spec)) in found.measurements
    }
    assert set(found.activations) == expected and expected
    floor = found.noise_floor[KL]
    for (name, group), measured in found.activations.items():
        kl = truth(model, ids, groups[name], group)
        room = 2 * (kl * floor) ** 0.5 + 10 * floor
        assert measured.mean[KL] == pytest.approx(kl, rel=0.05, abs=room), (name, group)
        assert measured.tokens == ids[:, 1:].numel()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *(("mamba2", tied) for tied in (True, False)),
        *((family, False) for family in ("mamba", "llama", "qwen3_5")),
        *((family, True) for family in ("zamba2", "gpt2", "gemma2")),
    ],
)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning", "ignore:sweep")
def test_kl_equals_float64(family, tied):
    model, ids = make(family, tied), tokens(4, 33)
    assert_equals_float64(model, ids, klfast.sweep(model, ids, SPECS, activations=True))


@pytest.mark.parametrize("family", ["granite_hybrid_moe", "nemotron_h_moe"])
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
def test_kl_of_experts_equals_float64(family):
    model, ids = tiny(family), tokens(4, 17)
    assert_equals_float64(model, ids, klfast.sweep(model, ids, SPECS, layers="experts.*", activations=True))


def test_a_weight_used_without_its_layer_changes_nothing():
    """Mamba multiplies by dt_proj's weight itself, and so does the quantized model."""
    found = klfast.sweep(make("mamba"), tokens(), "int4", layers="dt_proj", activations=True)
    assert found.activations and all(one.below_noise for one in found.activations.values())
    assert not any(one.below_noise for one in found.measurements.values())


@pytest.mark.parametrize("family", ["mamba2", "granite_hybrid_moe", "gpt2"])
def test_leaves_the_model_and_the_other_measurements_as_they_were(family):
    model, ids = tiny(family), tokens()
    before = snapshot(model)
    found = klfast.sweep(model, ids, "int4", activations=True, max_batch_tokens=17)  # one candidate at a time
    assert_same(before, snapshot(model))
    plain = klfast.sweep(model, ids, "int4", max_batch_tokens=17)
    assert means(found) == means(plain) and not plain.activations


def test_an_interrupted_sweep_goes_on_to_the_same_measurements(tmp_path):
    model, ids, path = make(), tokens(), tmp_path / "resume.json"
    options = {"max_batch_tokens": 4 * 17, "activations": True}

    def stop(done, total, what):
        if done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        klfast.sweep(model, ids, "int4", resume=path, progress=stop, **options)
    resumed, whole = (klfast.sweep(model, ids, "int4", resume=one, **options) for one in (path, None))
    assert resumed.activations == whole.activations and Sensitivities.from_json(path).activations == whole.activations
    with pytest.raises(InvalidInputError, match="a sweep with other activations"):
        klfast.sweep(model, ids, "int4", resume=path, max_batch_tokens=4 * 17)


def test_resume_files_from_before_there_were_activations_go_on(tmp_path):
    model, ids, path = make(), tokens(), tmp_path / "resume.json"
    whole = klfast.sweep(model, ids, "int4", resume=path)
    data = json.loads(path.read_text())
    del data["sweep"]["settings"]["activations"], data["activations"], data["sha256"]
    path.write_text(json.dumps(data))
    steps = []
    again = klfast.sweep(model, ids, "int4", resume=path, progress=lambda *args: steps.append(args))
    assert means(again) == means(whole) and not steps
