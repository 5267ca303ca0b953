"""quantize_model, QuantEmbedding and LazyWeight: the right layers, the right numbers, and nothing half converted."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, batch, tiny

import klfast
from klfast import Plan, QuantSpec, errors, nn, reference
from klfast.lazy_weight import LazyWeight
from klfast.models.layers import fingerprint, head_name, is_head_tied, linears, other_bytes, unquantizable, weight_bytes

SPECS = (QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(4, 24, symmetric=False), QuantSpec(8, 32, symmetric=False))


def mixed_plan(model, head=True):
    """The specs in turn, over every second layer and the head."""
    names = [name for name in list(linears(model))[::2] if name != head_name(model)] + [head_name(model)] * head
    return Plan({name: SPECS[i % len(SPECS)] for i, name in enumerate(names)}, "uniform", fingerprint(model))


def fake_quantized(model, plan):
    """The truth: the same model with each weight rounded and put back as floats."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, spec in plan.specs.items():
            weight = model.get_submodule(name).weight
            weight.copy_(klfast.quantize(weight, spec).dequantize(torch.float32))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_rounded_weights(family, tied):
    model, ids = tiny(family, tied), batch()
    plan = mixed_plan(model)
    expected = fake_quantized(model, plan)(ids).logits
    assert klfast.quantize_model(model, plan) is model
    assert {name for name, module in linears(model).items() if isinstance(module, nn.QuantLinear)} == set(plan.specs)
    assert all(model.get_submodule(name).spec == spec for name, spec in plan.specs.items())
    assert all(parameter.requires_grad for parameter in model.parameters()), "as it was"
    assert is_head_tied(model) == tied and isinstance(model.get_input_embeddings(), nn.QuantEmbedding) == tied
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    model, ids = tiny("mamba", tied=True, dtype=dtype), batch()
    expected = fake_quantized(model, plan := mixed_plan(model))(ids).logits
    klfast.quantize_model(model, plan)
    assert model.lm_head.weight.dtype == model.get_input_embeddings()(ids).dtype == dtype
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.1, atol=0.1)


def test_int8_activations_reach_the_layers():
    model = klfast.quantize_model(tiny("llama"), Plan({"lm_head": QuantSpec(8, 32)}, "uniform"), activation="int8")
    assert model.lm_head.activation == "int8"


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
    unchanged(model, Plan({"lm_head": spec, "backbone.layers.0.mixer.in_prj": spec}, "uniform"), errors.UnknownLayerError, "did you mean .*in_proj")
    unchanged(model, Plan({"backbone.layers.0.mixer.conv1d": spec}, "uniform"), errors.UnknownLayerError, "conv1d")
    unchanged(model, mixed_plan(tiny("mamba", seed=5)), errors.ModelMismatchError, "the plan was made for other weights")
    unchanged(model, mixed_plan(tiny("llama")), errors.ModelMismatchError, "other layers")
    unchanged(model, {"lm_head": spec}, errors.InvalidInputError, "takes a Plan")
    unchanged(model, Plan({"lm_head": spec}, "uniform"), errors.InvalidInputError, "activation", activation="int4")
    unchanged(model, Plan({"lm_head": spec}, "uniform"), errors.InvalidInputError, "scale must be", scale="max")
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
    """All that quantize_model may change."""
    return (
        {name: (type(module), dict(vars(module)["_parameters"])) for name, module in model.named_modules(remove_duplicate=False)},
        vars(model.config).get("quantization_config"), set(vars(model)), model._tied_weights_keys, dict(model.all_tied_weights_keys),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_the_model_as_it_was_wherever_it_comes(kind, tied, monkeypatch):
    model = tiny("llama", tied)
    plan, before = mixed_plan(model), state_of(model)
    events = 0

    def interrupt_at(wanted):
        nonlocal events
        events = 0

        def trace(frame, event, arg):
            nonlocal events
            if frame.f_code.co_filename == klfast.convert.__file__ and frame.f_code.co_name in ("_swap", "_set_own"):
                events += 1
                if events == wanted:
                    raise kind
            return trace

        return trace

    done = False
    for wanted in range(1, 500, 3):
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


def test_biases_and_what_is_not_replaced_keep_their_gradients():
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


# Shared layers ----------------------------------------------------------------------------------------------------


def zamba2():
    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=12, layers_block_type=["mamba", "hybrid"] * 6, num_attention_heads=4, num_key_value_heads=4,
        attention_head_dim=16, mamba_headdim=16, n_mamba_heads=4, mamba_d_state=8, mamba_ngroups=1, intermediate_size=64, num_mem_blocks=1, adapter_rank=4,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_a_block_that_is_called_six_times_is_quantized_once():
    model, ids = zamba2(), batch()
    names = [name for name in linears(model) if "shared_transformer" in name]
    assert names and all("layers.1." in name for name in names), "under the first of its six names"
    plan = Plan({name: QuantSpec(4, 16) for name in linears(model) if name != "lm_head"}, "uniform")
    expected = fake_quantized(model, plan)(ids, use_cache=False).logits
    floats = sum(parameter.numel() * 2 for parameter in model.parameters())
    klfast.quantize_model(model, plan)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    modules = {id(module) for name, module in model.named_modules() if name.endswith("shared_transformer.feed_forward.down_proj")}
    assert len(modules) == 1 and isinstance(model.model.layers[11].shared_transformer.feed_forward.down_proj, nn.QuantLinear)
    assert sum(map(weight_bytes, linears(model).values())) + other_bytes(model) < floats / 2, "smaller than the model in bfloat16"
    model.tie_weights()


def test_two_layers_with_one_weight_go_on_sharing_it():
    model = tiny("mamba")
    first, second = (block.mixer.in_proj for block in model.backbone.layers)
    second.weight = first.weight
    names = ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"]
    assert names[0] in linears(model) and names[1] not in linears(model)
    biases = [first.bias, second.bias]
    expected = fake_quantized(model, Plan({names[0]: QuantSpec()}, "uniform"))(batch()).logits
    unchanged(model, Plan({names[0]: QuantSpec(8), names[1]: QuantSpec(4)}, "uniform"), errors.InvalidInputError, f"{names[1]} shares its weight with {names[0]}")
    klfast.quantize_model(model, Plan({names[1]: QuantSpec()}, "uniform"))
    first, second = (block.mixer.in_proj for block in model.backbone.layers)
    assert first.weight_packed is second.weight_packed and [first.bias, second.bias] == biases
    with torch.no_grad():
        torch.testing.assert_close(model(batch()).logits, expected, rtol=1e-4, atol=1e-4)
    unchanged(model, Plan({names[0]: QuantSpec()}, "uniform"), errors.InvalidInputError, "quantized already")


# What transformers is told ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_pretrained_writes_a_folder_that_transformers_loads(tmp_path):
    model, ids = tiny("llama"), batch()
    plan = Plan({name: QuantSpec(4, 32) if "mlp" in name else QuantSpec(8, -1) for name in linears(model) if "v_proj" not in name}, "uniform")
    expected = klfast.quantize_model(model, plan)(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied, spec", [(True, QuantSpec(8, -1)), (False, QuantSpec(4, 7))])
def test_save_pretrained_refuses_where_transformers_could_not_load(tied, spec, tmp_path):
    model = pickle.loads(pickle.dumps(klfast.quantize_model(tiny("llama", tied), Plan({"lm_head": spec}, "uniform"))))
    with pytest.raises(errors.InvalidInputError, match="use klfast.save_quantized"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("family", ["mamba", "hymba", "llama"])
@torch.no_grad()
def test_tie_weights_leaves_a_tied_quantized_head_alone(family):
    model = klfast.quantize_model(tiny(family, tied=True), Plan({head_name(tiny(family)): QuantSpec()}, "uniform"))
    expected = model(batch()).logits
    model.tie_weights()
    assert is_head_tied(model) and torch.equal(model(batch()).logits, expected)


def test_tie_weights_still_ties_what_is_not_quantized():
    model = tiny("llama", tied=True)
    klfast.quantize_model(model, Plan({"model.layers.0.mlp.up_proj": QuantSpec()}, "uniform"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Models that cannot be quantized, or only in part -----------------------------------------------------------------


def small(config, **sizes):
    return transformers.AutoModelForCausalLM.from_config(config(vocab_size=64, **sizes)).eval()


def test_rwkv_that_divides_its_weights_is_refused_and_one_that_does_not_is_right():
    sizes = dict(hidden_size=32, num_hidden_layers=4, attention_hidden_size=32, intermediate_size=48)
    plan = Plan({f"rwkv.blocks.{i}.feed_forward.value": QuantSpec(8, 16) for i in range(4)}, "uniform")
    for every in (2, 6):
        unchanged(small(transformers.RwkvConfig, **sizes, rescale_every=every), plan, errors.InvalidInputError, f"rescale_every={every}.*rescale_every=0")
    model = small(transformers.RwkvConfig, **sizes, rescale_every=0)
    ids = batch(1, 9)
    with torch.no_grad():
        expected = fake_quantized(model, plan)(ids).logits
        torch.testing.assert_close(klfast.quantize_model(model, plan)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_that_scales_is_refused_before_any_work(monkeypatch):
    model = small(transformers.Gemma3TextConfig, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48)
    monkeypatch.setattr(nn.QuantLinear, "from_linear", lambda *args: pytest.fail("quantized before it was checked"))
    plan = Plan({name: QuantSpec(8, 16) for name in linears(model)}, "uniform")
    unchanged(model, plan, errors.InvalidInputError, "Gemma3TextScaledWordEmbedding.*leave the head out of the plan, or untie it")
    monkeypatch.undo()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        expected = fake_quantized(model, plan)(batch()).logits
        torch.testing.assert_close(klfast.quantize_model(model, plan)(batch()).logits, expected, rtol=1e-4, atol=1e-4)


PARTLY = {
    "Conv1D": lambda: small(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False),
    "MixtralExperts": lambda: small(transformers.MixtralConfig, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, num_local_experts=4),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_says_how_much_cannot_be_quantized(kind):
    model = PARTLY[kind]()
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    matrices = {"Conv1D": lambda p, n: "c_" in n and p.dim() == 2, "MixtralExperts": lambda p, n: p.dim() == 3}[kind]
    left = sum(parameter.numel() * 4 for name, parameter in model.named_parameters() if matrices(parameter, name))
    assert unquantizable(model)[kind] == left
    others = sum(unquantizable(model).values())
    with pytest.warns(UserWarning, match=f"quantize_model: {others / total:.0%} of the bytes of .* the weights of {kind} ") as caught:
        klfast.quantize_model(model, Plan({name: QuantSpec(8, 16) for name in linears(model)}, "uniform"))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_of_the_families_can_be_quantized(family):
    assert unquantizable(tiny(family)) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        klfast.quantize_model(model := tiny(family), Plan({name: QuantSpec(8, 16) for name in linears(model)}, "uniform"))


def test_a_model_in_pefts_wrapper_is_refused():
    class PeftModel(torch.nn.Module):
        __module__ = "peft.peft_model"

    with pytest.raises(errors.InvalidInputError, match="peft's wrapper"):
        klfast.quantize_model(PeftModel(), Plan({"lm_head": QuantSpec()}, "uniform"))


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
    monkeypatch.setattr(reference, "dequantize", lambda *args: pytest.fail("dequantized"))
    weight = lazy.weight
    assert (weight.dtype, weight.shape, weight.device, weight.dim(), weight.numel()) == (torch.float32, (6, 16), torch.device("cpu"), 2, 96)
    assert not weight.requires_grad and weight.size(0) == 6 and weight.is_floating_point()
    with pytest.raises(errors.InvalidInputError, match="no memory"):
        weight.data_ptr()


def test_lazy_weight_products_use_the_kernel(lazy, monkeypatch):
    dense, x = lazy.quantized.dequantize(torch.float32), torch.randn(2, 16, 5)
    calls = []
    monkeypatch.setattr("klfast.lazy_weight.ops.dequant_matmul", lambda *args: calls.append(1) or klfast.ops.reference.dequant_matmul(*args))
    torch.testing.assert_close(lazy.weight @ x, dense @ x)
    torch.testing.assert_close(torch.matmul(lazy.weight, x[0]), dense @ x[0])
    torch.testing.assert_close(torch.nn.functional.linear(x.mT, lazy.weight, torch.ones(6)), x.mT @ dense.T + 1)
    assert len(calls) == 3
    torch.testing.assert_close(x.mT @ lazy.weight.T, x.mT @ dense.T)  # the others see the dense matrix
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
