"""quantize_model, QuantEmbedding and LazyWeight: right layers and numbers, and no half-converted models."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import HEADS, batch, tiny

import klfast
from klfast import Plan, QuantSpec, nn
from klfast.core import errors
from klfast.models.fingerprint import fingerprint
from klfast.models.head import head_name, is_head_tied
from klfast.models.linears import linears
from klfast.models.matrices import named_matrices
from klfast.nn.lazy_weight import LazyWeight
from klfast.quant.formats import PackedIntegers
from klfast.quant.spec import storable_spec
from klfast.rounding.walk import round_model

SPECS = (QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(4, 24, symmetric=False), QuantSpec(8, 32, symmetric=False))


def mixed_plan(model, head=True):
    """Return a plan with the specs in turn, for every second layer and the head."""
    names = [name for name in list(linears(model))[::2] if name != head_name(model)] + [head_name(model)] * head
    return Plan({name: SPECS[i % len(SPECS)] for i, name in enumerate(names)}, "uniform", fingerprint(model))


def fake_quantized(model, plan):
    """Return the truth: the same model with each weight rounded and put back as floats."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, spec in plan.specs.items():
            weight = model.get_submodule(name).weight
            weight.copy_(klfast.quantize(weight, spec).dequantize(torch.float32))
    return model


@pytest.mark.parametrize(("family", "tied"), HEADS)
@torch.no_grad()
def test_logits_equal_those_with_rounded_weights(family, tied):
    model, ids = tiny(family, tied), batch()
    plan = mixed_plan(model)
    expected = fake_quantized(model, plan)(ids).logits
    assert klfast.quantize_model(model, plan) is model
    assert {name for name, module in linears(model).items() if isinstance(module, nn.QuantLinear)} == set(plan.specs)
    assert all(model.get_submodule(name).spec == spec for name, spec in plan.specs.items())
    assert all(parameter.requires_grad for parameter in model.parameters()), "as it was"
    assert is_head_tied(model) == tied and isinstance(model.get_input_embeddings(), nn.QuantEmbedding) == tied
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba2", "granite_hybrid_moe", "jamba_moe"])
@pytest.mark.parametrize("spec", [QuantSpec(4, 24, symmetric=False), "int4-g24-asym"], ids=["spec", "text"])
@torch.no_grad()
def test_one_spec_for_all_layers(family, spec):
    """In groups that a folder can hold, as ``klfast quantize --uniform``."""
    model, ids = tiny(family), batch()
    shapes = {name: one.shape for name, one in named_matrices(model).items()}
    stored = {name: storable_spec(QuantSpec(4, 24, symmetric=False), shape[1]) for name, shape in shapes.items()}
    assert set(stored.values()) != {QuantSpec(4, 24, symmetric=False)}, "24 does not divide some rows"
    wanted = klfast.quantize_model(tiny(family), Plan(stored, "uniform"))(ids).logits
    assert klfast.quantize_model(model, spec) is model
    assert all(one.is_quantized for one in named_matrices(model).values())
    assert torch.equal(model(ids).logits, wanted)


def test_text_that_is_not_a_spec():
    with pytest.raises(errors.InvalidInputError, match=r"'plan\.json' is not a quantization spec"):
        klfast.quantize_model(tiny("mamba2"), "plan.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    model, ids = tiny("mamba", tied=True, dtype=dtype), batch()
    expected = fake_quantized(model, plan := mixed_plan(model))(ids).logits
    klfast.quantize_model(model, plan)
    assert model.lm_head.weight.dtype == model.get_input_embeddings()(ids).dtype == dtype
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.1, atol=0.1)


def test_each_layer_gets_the_activation_of_the_plan_or_of_the_call():
    names = list(linears(tiny("mamba")))
    plan = Plan(dict.fromkeys(names, QuantSpec(8, 32)), "uniform", activations=dict.fromkeys(names[1::2], "int8"))
    recorded = ["int8" if name in plan.activations else "exact" for name in names]
    everywhere = [(one, [one] * len(names)) for one in ("int8", "exact")]
    for asked, expected in ((None, recorded), ("auto", recorded), *everywhere):
        model = klfast.quantize_model(tiny("mamba"), plan, activation=asked)
        assert [layer.activation for layer in linears(model).values()] == expected
    silent = Plan({"lm_head": QuantSpec(8, 32)}, "uniform")
    assert klfast.quantize_model(tiny("mamba"), silent).lm_head.activation == "exact"
    assert klfast.quantize_model(tiny("mamba"), Plan({}, "uniform"), activation="auto")


def test_experts_get_the_activation_of_their_stack():
    name = "model.layers.0.block_sparse_moe.experts.down_proj"
    plan = Plan({name: "int8-g32-sym", name.replace("down", "gate_up"): "int8"}, "uniform", activations={name: "int8"})
    experts = klfast.quantize_model(tiny("granite_hybrid_moe"), plan).model.layers[0].block_sparse_moe.experts
    assert (experts.gate_up_proj.activation, experts.down_proj.activation) == ("exact", "int8")


def test_mse_scale_is_used():
    model = tiny("llama")
    weight = model.lm_head.weight.detach().clone()
    klfast.quantize_model(model, Plan({"lm_head": QuantSpec(4, 64)}, "uniform"), scale="mse")
    assert torch.equal(model.lm_head.weight_scale, klfast.quantize(weight, QuantSpec(4, 64), scale="mse").scale)


def unchanged(model, plan, error, match, **options):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        klfast.quantize_model(model, plan, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_refuses_without_changing_anything():
    model, spec = tiny("mamba", tied=True), QuantSpec()
    unchanged(
        model,
        Plan({"lm_head": spec, "backbone.layers.0.mixer.in_prj": spec}, "uniform"),
        errors.UnknownLayerError,
        "did you mean .*in_proj",
    )
    unchanged(model, Plan({"backbone.layers.0.mixer.conv1d": spec}, "uniform"), errors.UnknownLayerError, "conv1d")
    unchanged(
        model, mixed_plan(tiny("mamba", seed=5)), errors.ModelMismatchError, "the plan was made for other weights"
    )
    unchanged(model, mixed_plan(tiny("llama")), errors.ModelMismatchError, "other layers")
    unchanged(model, {"lm_head": spec}, errors.InvalidInputError, "takes a Plan")
    unchanged(model, Plan({"lm_head": spec}, "uniform"), errors.InvalidInputError, "activation", activation="int4")
    unchanged(model, Plan({"lm_head": spec}, "uniform"), errors.InvalidInputError, "scale must be", scale="max")
    unchanged(
        model,
        Plan({"lm_head": spec}, "uniform"),
        errors.InvalidInputError,
        'the plan records no activations; make it with activation="auto"',
        activation="auto",
    )
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight[3, 4] = torch.nan
    plan = Plan({"lm_head": spec, "backbone.layers.1.mixer.out_proj": spec}, "uniform")
    unchanged(model, plan, errors.InvalidInputError, r"layers\.1\.mixer\.out_proj: .*NaN")


def test_refuses_a_second_time():
    model = tiny("llama")
    klfast.quantize_model(model, plan := Plan({"lm_head": QuantSpec()}, "uniform"))
    unchanged(model, plan, errors.InvalidInputError, "lm_head is quantized already")


def test_refuses_an_embedding_that_computes():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model = tiny("llama", tied=True)
    weight = model.lm_head.weight
    model.set_input_embeddings(Scaled(*weight.shape))
    model.get_input_embeddings().weight = weight
    unchanged(model, Plan({"lm_head": QuantSpec()}, "uniform"), errors.InvalidInputError, "Scaled")


def state_of(model):
    """Return everything that quantize_model may change."""
    return (
        {
            name: (type(module), dict(vars(module)["_parameters"]))
            for name, module in model.named_modules(remove_duplicate=False)
        },
        vars(model.config).get("quantization_config"),
        set(vars(model)),
        model._tied_weights_keys,
        dict(model.all_tied_weights_keys),
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_interruption_anywhere_leaves_the_model_as_it_was(kind, tied, monkeypatch):
    model = tiny("llama", tied)
    plan, before = mixed_plan(model), state_of(model)
    events = 0

    def interrupt_at(wanted):
        nonlocal events
        events = 0

        def trace(frame, event, arg):
            nonlocal events
            if frame.f_code.co_filename.startswith(str(Path(klfast.__file__).parent)) and frame.f_code.co_name in (
                "_swap",
                "set_own",
            ):
                events += 1
                if events == wanted:
                    raise kind
            return trace

        return trace

    done = False
    for wanted in range(1, 500, 5):
        sys.settrace(interrupt_at(wanted))
        try:
            klfast.quantize_model(model, plan)
            done = True
        except kind:
            pass
        finally:
            sys.settrace(None)
        if done or isinstance(model.lm_head, nn.QuantLinear):
            break
        assert state_of(model) == before, wanted
    assert wanted > 30 and isinstance(model.lm_head, nn.QuantLinear)
    assert {name for name, module in linears(model).items() if isinstance(module, nn.QuantLinear)} == set(plan.specs)


def test_biases_and_other_parameters_keep_requires_grad():
    model = tiny("mamba")
    model.backbone.layers[0].norm.weight.requires_grad_(False)
    model.backbone.layers[1].mixer.in_proj.bias.requires_grad_(False)
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    klfast.quantize_model(model, Plan({name: QuantSpec(8, 32) for name in linears(model)}, "uniform"))
    after = dict(model.named_parameters())
    assert {name for name in before if name not in after} == {f"{name}.weight" for name in linears(model)}
    for name, parameter in after.items():
        assert parameter is before[name][0] and parameter.requires_grad == before[name][1], name


def test_a_weight_on_the_meta_device_is_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    plan = Plan({"lm_head": QuantSpec(), "model.layers.1.mlp.up_proj": QuantSpec()}, "uniform")
    unchanged(model, plan, errors.InvalidInputError, r"layers\.1\.mlp\.up_proj has no weight in memory")


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(4, 7, symmetric=False)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 63), (61, 100)])
def test_rows_equal_the_dequantized_matrix(spec, shape):
    head = nn.QuantLinear(klfast.quantize(torch.randn(shape), spec))
    ids = torch.randint(0, shape[0], (3, 5))
    assert torch.equal(nn.QuantEmbedding(head)(ids), head.quantized.dequantize(torch.float32)[ids])
    assert nn.QuantEmbedding(head)(ids[:0]).shape == (0, 5, shape[1])
    for beyond in (-1, shape[0]):
        with pytest.raises(IndexError):
            nn.QuantEmbedding(head)(ids.masked_fill(ids == ids[0, 0], beyond))


@pytest.mark.parametrize(("symmetric", "most"), [(True, 20), (False, 30)])
def test_looking_up_a_row_takes_few_calls(symmetric, most):
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    embedding = nn.QuantEmbedding(nn.QuantLinear(klfast.quantize(torch.randn(61, 64), QuantSpec(4, 32, symmetric))))
    with Count():
        embedding(torch.tensor([[3]]))
    assert 1 < len(calls) <= most


def test_embedding_follows_its_head():
    model = copy.deepcopy(klfast.quantize_model(tiny("mamba", tied=True), Plan({"lm_head": QuantSpec()}, "uniform")))
    embedding = model.get_input_embeddings()
    assert embedding.head is model.lm_head
    assert not any("embeddings" in name for name in model.state_dict())
    scale = model.lm_head.weight_scale.clone()
    model.to(torch.bfloat16)
    assert embedding.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight_scale, scale)


@pytest.fixture
def lazy():
    return nn.QuantLinear(klfast.quantize(torch.randn(6, 16), QuantSpec(4, 8)), dtype=torch.float32)


def test_lazy_weight_metadata_is_free(lazy, monkeypatch):
    monkeypatch.setattr(PackedIntegers, "decode", lambda *args: pytest.fail("dequantized"))
    weight = lazy.weight
    assert (weight.dtype, weight.shape, weight.device, weight.dim(), weight.numel()) == (
        torch.float32,
        (6, 16),
        torch.device("cpu"),
        2,
        96,
    )
    assert not weight.requires_grad and weight.size(0) == 6 and weight.is_floating_point()
    with pytest.raises(errors.InvalidInputError, match="no memory"):
        weight.data_ptr()


def test_lazy_weight_products_use_the_kernel(lazy, monkeypatch):
    dense, x = lazy.quantized.dequantize(torch.float32), torch.randn(2, 16, 5)
    calls = []
    monkeypatch.setattr(
        "klfast.nn.lazy_weight.ops.dequant_matmul",
        lambda *args: calls.append(1) or klfast.reference.dequant_matmul(*args),
    )
    torch.testing.assert_close(lazy.weight @ x, dense @ x)
    torch.testing.assert_close(torch.matmul(lazy.weight, x[0]), dense @ x[0])
    torch.testing.assert_close(torch.nn.functional.linear(x.mT, lazy.weight, torch.ones(6)), x.mT @ dense.T + 1)
    assert len(calls) == 3
    torch.testing.assert_close(x.mT @ lazy.weight.T, x.mT @ dense.T)  # other functions see the dense matrix
    torch.testing.assert_close(lazy.weight @ x[0, :, 0], dense @ x[0, :, 0])
    torch.testing.assert_close(lazy.weight.float().norm(), dense.norm())
    torch.testing.assert_close(copy.deepcopy(lazy.weight), dense)
    assert not isinstance(lazy.weight + 0, LazyWeight) and len(calls) == 3


def test_lazy_weight_compiles(lazy):
    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = lazy

        def forward(self, x):
            return self.proj.weight @ x.to(self.proj.weight.dtype).transpose(1, 2), self.proj(x), self.proj.weight.sum()

    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(torch.compile(Mixer(), fullgraph=True, backend="aot_eager")(x), Mixer()(x))


def test_gptq_rounds_as_round_model_does():
    model, ids = tiny("mamba2", tied=True), batch(24, 16)
    plan = Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform", fingerprint(model))
    want = round_model(model, plan.specs, ids, progress=False).tensors
    klfast.quantize_model(model, plan, rounding="gptq", calibration=ids, progress=False)
    for name, layer in linears(model).items():
        assert layer.rounding == "gptq" and all(map(torch.equal, layer.quantized.parts, want[name].parts))
    assert isinstance(model.get_input_embeddings(), nn.QuantEmbedding)


def test_gptq_tells_what_it_rounded_to_nearest():
    model = tiny("zamba", tied=True)
    plan = Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform")
    with pytest.warns(UserWarning, match="rounded to nearest: .* \\(no single block holds it\\)") as warned:
        klfast.quantize_model(model, plan, rounding="gptq", calibration=batch(24, 16), progress=False)
    assert sum("rounded to nearest" in str(one.message) for one in warned) == 1
    layers = linears(model)
    assert {layer.rounding for layer in layers.values()} == {"nearest", "gptq"}
    assert layers["lm_head"].rounding == "gptq"


def test_gptq_needs_text_and_only_gptq_takes_it():
    model, plan, ids = tiny("llama"), Plan({"lm_head": QuantSpec()}, "uniform"), batch()
    unchanged(model, plan, errors.InvalidInputError, "rounding must be .*'up'", rounding="up")
    unchanged(model, plan, errors.InvalidInputError, "needs calibration text", rounding="gptq")
    unchanged(model, plan, errors.InvalidInputError, 'only rounding="gptq" reads', calibration=ids)
    unchanged(model, plan, errors.InvalidInputError, "token id", rounding="gptq", calibration=ids + 1000)
    assert (
        isinstance(klfast.quantize_model(model, plan).lm_head, nn.QuantLinear) and model.lm_head.rounding == "nearest"
    )


def test_a_saved_folder_tells_how_each_layer_was_rounded(tmp_path):
    model, ids = tiny("zamba", tied=True), batch(24, 16)
    plan = Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform")
    with pytest.warns(UserWarning, match="rounded to nearest"):
        klfast.quantize_model(model, plan, rounding="gptq", calibration=ids, progress=False)
    klfast.save_quantized(model, tmp_path / "small")
    again = klfast.load_quantized(tmp_path / "small")
    expected = {name: layer.rounding for name, layer in linears(model).items()}
    assert {name: layer.rounding for name, layer in linears(again).items()} == expected
    with torch.no_grad():
        assert torch.equal(klfast.accelerate(model)(ids).logits, again(ids).logits)
