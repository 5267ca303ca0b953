"""The native engine against the models themselves, in float64 or with the references."""

import gc
import warnings
import weakref
from itertools import product

import pytest
import torch
import transformers
from tiny_models import CONFIGS, LLAMA_LIKE, VARIANTS, batch, in_float64, made, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.generation.engine import engine_of, lower
from klfast.models.linears import row_parts
from klfast.models.matrices import matrices

LOWERED = (
    *("mamba", "mamba2", "falcon_mamba", "qwen3_5", "olmo_hybrid", "lfm2", "granite_hybrid", "bamba"),
    *("falcon_h1", *(name for name in VARIANTS if name.startswith("falcon_h1")), "nemotron_h", "jamba"),
    *("hymba", "hymba_release", "granite_hybrid_moe", "qwen3_5_moe", "qwen3_next", "lfm2_moe"),
    *("llama", *LLAMA_LIKE, "nemotron_h_moe", "jamba_moe", "kimi_linear", "minimax"),
    *("zamba", "zamba2", "zamba2_adapters", *(name for name in VARIANTS if name == "lfm3")),
)


@pytest.fixture(params=LOWERED)
def model(request):
    return tiny(request.param)


def quantized(model, spec, activation="exact"):
    klfast.quantize_model(
        model, Plan(dict.fromkeys(matrices(model), QuantSpec.of(spec)), "uniform"), activation=activation
    )
    return model


def relative(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def logits_of_each(model, ids):
    """Return the logits after each token, float64 [B, T, V]."""
    if model.config.model_type == "hymba":  # klfast's own code, in float32
        with klfast.using("reference"):
            return model(ids, use_cache=False).logits.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klfast.SlowPathWarning)
        return in_float64(model)(ids, use_cache=False).logits


@torch.inference_mode()
def test_equals_the_model_in_float64(model):
    all_ids = batch(3, 14)
    all_truth, engine = logits_of_each(model, all_ids), lower(model)
    for rows, first in product((1, 3), (1, 2, 9)):
        ids, truth, state = all_ids[:rows], all_truth[:rows], engine.state(rows)
        assert relative(engine(ids[:, :first], state), truth[:, first - 1]) < 1e-4, (rows, first)
        for t in range(first, 11):
            assert relative(engine(ids[:, t : t + 1], state), truth[:, t]) < 1e-4, (rows, first, t)
        # several tokens after those before
        assert relative(engine(ids[:, 11:], state), truth[:, -1]) < 1e-4, (rows, first)
        assert (state.seen - engine.state(rows).seen).tolist() == [14] * rows  # without Hymba's memory tokens


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["exact", "int8"])
@pytest.mark.parametrize("spec", ["int4-g16-sym", "int8-g16-asym", "int6-g16-sym"])
def test_logits_of_bfloat16_are_rounded_for_any_number_of_rows(spec, activation):
    model = quantized(tiny("mamba2", dtype=torch.bfloat16), spec, activation)
    engine = lower(model)
    for rows in (1, 2, 3, 5, 16):
        logits = engine(batch(rows, 1), engine.state(rows))
        assert torch.equal(logits.float(), logits.bfloat16().float()), rows


@torch.inference_mode()
@pytest.mark.parametrize("spec", ["int4-g16-sym", "int8-g16-asym"])
@pytest.mark.filterwarnings("ignore:quantize_model")  # Zamba's x_proj stays as it is
def test_quantized_with_a_tied_head(spec):
    for family in LOWERED:
        model, ids = quantized(tiny(family, tied=True), spec), batch(2, 9)
        truth, engine = logits_of_each(model, ids), lower(model)
        assert relative(engine(ids, engine.state(2)), truth[:, -1]) < 1e-4, family


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mamba2", "llama", "granite_hybrid"])  # one that scales its logits, too
def test_a_head_with_corrected_rows(family, tied):
    model, ids = tiny(family, tied), batch(2, 9)
    ids[0, -1] = 60
    klfast.quantize_model(model, Plan({"lm_head": "int4-g16-sym+30"}, "uniform"))
    truth, engine = logits_of_each(model, ids), lower(model)
    state = engine.state(2)
    assert relative(engine.each(ids[:, :8], state), truth[:, :8]) < 1e-4
    assert relative(engine(ids[:, 8:], state), truth[:, -1]) < 1e-4
    assert engine.is_current()
    model.lm_head.activation = "int8"
    assert not engine.is_current()
    model.lm_head.activation = "exact"
    assert engine.is_current()
    model.lm_head.weight_correction_scale = 2 * model.lm_head.weight_correction_scale
    assert not engine.is_current()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "activation", "bound"),  # an input of int8 may be rounded to the next step
    [("mamba2", "int8", 2e-2), *((one, "exact", 1e-4) for one in ("mamba", "mamba2", "hymba", "qwen3_5", "lfm2"))],
)
def test_rows_of_fused_layers_that_are_corrected(family, activation, bound):
    model, ids = tiny(family), batch(2, 9)
    specs = {"lm_head": QuantSpec(4, 16, corrected=5)}
    for number, name in enumerate(matrices(model)):
        for use, (first, end) in row_parts(model, name).items():
            if use in ("dt", "k", "C"):
                specs[name] = QuantSpec(4, 16, number % 2 == 0, corrected=end - first, first_corrected=first)
    assert len(specs) > 1
    klfast.quantize_model(model, Plan(specs, "uniform"), activation=activation)
    layer = model.get_submodule(next(name for name in specs if name != "lm_head"))
    if layer.bias is None:
        layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, layer.out_features), requires_grad=False)
    truth, engine = logits_of_each(model, ids), lower(model)
    state = engine.state(2)
    assert relative(engine.each(ids[:, :8], state), truth[:, :8]) < bound
    assert relative(engine(ids[:, 8:], state), truth[:, -1]) < bound
    assert engine.is_current()
    layer.weight_correction_scale = 2 * layer.weight_correction_scale
    assert not engine.is_current()


def test_corrected_rows_here_and_there_are_left_to_the_model():
    model, name = tiny("mamba2"), "backbone.layers.0.mixer.in_proj"
    qt = klfast.quantize(model.get_submodule(name).weight, "int4-g16-sym")
    rows = torch.tensor([3, 5])
    some = klfast.quantize(torch.randn(2, qt.shape[1]), "int4-g16-sym")
    model.set_submodule(name, klfast.QuantLinear(klfast.QuantizedTensor.corrected(qt, rows, some)))
    with pytest.raises(CannotLowerError, match=r"0\.mixer\.in_proj has corrected rows that do not follow one another"):
        lower(model)


def positions(**parameters):
    """Return a tiny Llama whose rotary embedding is of another type."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_theta": 100.0, **parameters},
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.inference_mode()
@pytest.mark.parametrize(
    "parameters",
    [
        dict(rope_type="linear", factor=3.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_scaled_positions(parameters):
    model, ids = positions(**parameters), batch(1, 40)
    engine = lower(model)
    assert relative(engine(ids, engine.state()), logits_of_each(model, ids)[:, -1]) < 1e-4


@torch.inference_mode()
@pytest.mark.skipif("lfm3" not in VARIANTS, reason="transformers has it since 5.23")
@pytest.mark.parametrize("parts", [True, False], ids=["biases", "no gates, no norms of results"])
def test_optional_parts_of_lfm3(parts):
    changes = dict(conv_bias=parts, attention_bias=parts, use_attention_gate=parts, use_sandwich_norm=parts)
    model, ids = made(type(config := CONFIGS["lfm3"]())(**config.to_dict() | changes), "lfm3"), batch(2, 9)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    engine = lower(model)
    assert relative(engine(ids, engine.state(2)), logits_of_each(model, ids)[:, -1]) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", dict(use_sliding_window=False, layer_types=["sliding_attention", "full_attention"] * 2)),
        ("smollm3", dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"] * 2)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 2)),
        ("hymba", dict(sliding_window=0)),
        ("hymba", dict(sliding_window=None)),
    ],
    ids=str,
)
def test_windows(family, changes):
    config = CONFIGS[family]().to_dict() | changes
    config["num_hidden_layers"] = len(config.get("layer_types") or []) or config["num_hidden_layers"]
    config.pop("no_rope_layers", None)
    model, ids = made(type(CONFIGS[family]())(**config), family), batch(2, 14)
    engine = lower(model)
    assert relative(engine(ids, engine.state(2)), logits_of_each(model, ids)[:, -1]) < 1e-4


@torch.inference_mode()
def test_what_positions_cannot_turn():
    config = CONFIGS["llama"]()
    config.head_dim = 1
    with pytest.raises(CannotLowerError, match=r"^heads of 1 channels are turned by 1 frequencies$"):
        lower(made(config, "llama"))


def test_embeddings_that_are_scaled_as_they_are_read():
    model = tiny("llama")
    model.model.embed_tokens.max_norm = 0.5
    with pytest.raises(CannotLowerError, match=r"^model\.embed_tokens has a max_norm$"):
        lower(model)


@torch.inference_mode()
@pytest.mark.skipif("lfm3" not in VARIANTS, reason="transformers has it since 5.23")
def test_positions_of_a_type_of_layers_that_follow_the_text():
    config = CONFIGS["lfm3"]()
    config.rope_parameters["sliding_attention"] = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    with pytest.raises(CannotLowerError, match=r"^model\.rotary_emb is of type dynamic$"):
        lower(made(config, "lfm3"))


@torch.inference_mode()
def test_biases_and_norms_count(model):
    """Move the small parameters away from the zeros and ones that models begin with."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.2)
    ids, engine = batch(2, 9), lower(model)
    assert relative(engine(ids, engine.state(2)), logits_of_each(model, ids)[:, -1]) < 1e-4


@torch.inference_mode()
def test_prompts_in_chunks(model):
    ids = batch(2, 45)
    truth = logits_of_each(model, ids)
    engine = lower(model, rows=14)
    assert relative(engine(ids, engine.state(2)), truth[:, -1]) < 1e-4


@torch.inference_mode()
def test_threads_change_nothing(model):
    ids, results = batch(16, 6), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        engine, found = lower(model), []
        for rows in (1, 16):
            state, own = engine.state(rows), ids[:rows]
            found += [engine(piece, state).clone() for piece in own.split([4, 1, 1], dim=1)]
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_a_long_text_does_not_drift(family):
    """Going token by token leaves the same state as the whole prompt at once, in no more memory."""
    model, ids = tiny(family), batch(1, 3000)
    engine = lower(model)
    stepped, prompted = engine.state(), engine.state()
    for t in range(ids.shape[1]):
        one = engine(ids[:, t : t + 1], stepped)
    assert relative(one, engine(ids, prompted).double()) < 1e-4
    for found, expected, spec in zip(stepped.tensors, prompted.tensors, stepped.specs, strict=True):
        if spec.growing is None:
            assert relative(found, expected.double()) < 1e-4
            assert found.shape[1:] == spec.shape


@torch.inference_mode()
def test_a_copy_of_the_state_is_a_way_back(model):
    ids, engine = batch(1, 9), lower(model)
    state = engine.state()
    engine(ids[:, :5], state)
    before = state.copy()
    first = engine(ids[:, 5:], state).clone()
    assert torch.equal(engine(ids[:, 5:], before), first)


@torch.inference_mode()
def test_goes_back_to_a_mark(model):
    ids, engine = batch(2, 300), lower(model)
    state = engine.state(2)
    engine(ids[:, :5], state)
    mark, seen = state.mark(), state.seen.clone()
    first = engine(ids[:, 5:9], state)
    engine(ids[:, 9:], state)  # beyond the room that there was
    for _ in range(2):
        state.go_back(mark)
        assert torch.equal(state.seen, seen) and torch.equal(engine(ids[:, 5:9], state), first)


@torch.inference_mode()
def test_sequences_go_on_from_others(model):
    ids, engine = batch(3, 8), lower(model)
    state = engine.state(3)
    engine(ids[:, :5], state)
    selected = state.select([2, 0, 0, 1])
    state.reorder([0, 0, 2])
    for rows, found in (([2, 0, 0, 1], selected), ([0, 0, 2], state)):
        own = engine.state(len(rows))
        engine(ids[rows, :5], own)
        for t in (5, 6, 7):
            expected = engine(ids[rows, t : t + 1], own)
            assert relative(engine(ids[rows, t : t + 1], found), expected.double()) < 1e-5


@torch.inference_mode()
def test_logits_after_each_token(model):
    ids, engine = batch(3, 9), lower(model)
    truth = logits_of_each(model, ids)
    for rows in (1, 3):
        state = engine.state(rows)
        engine(ids[:rows, :4], state)
        assert relative(engine.each(ids[:rows, 4:], state), truth[:rows, 4:]) < 1e-4
    with pytest.raises(InvalidInputError, match="for at most 16 tokens, got 18"):
        engine.each(batch(1, 18).view(rows, -1), state)


@torch.inference_mode()
def test_sequences_do_not_mix(model):
    ids, engine = batch(3, 8), lower(model)

    def step_after_five(ids):
        state = engine.state(len(ids))
        engine(ids[:, :5], state)
        return engine(ids[:, 5:6], state).clone()

    # An expert's kernel is chosen by the rows that go to it, and kernels round differently.
    bound = 1e-4 if any("experts" in name for name, _ in model.named_modules()) else 0
    together = step_after_five(ids)
    for row in range(3):
        others = (ids + 1) % model.config.vocab_size
        others[row] = ids[row]
        assert relative(step_after_five(others)[row], together[row].double()) <= bound
        alone = step_after_five(ids[row : row + 1])[0]  # by kernels for fewer rows
        assert relative(alone, together[row].double()) < 1e-4


def test_says_what_it_cannot_lower():
    model = tiny("mamba")
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotLowerError, match=r"^backbone\.layers\.1\.mixer has hooks$"):
        lower(model)
    handle.remove()
    lower(model)
    model.lm_head.forward = lambda x: x
    with pytest.raises(CannotLowerError, match=r"^lm_head has a replaced forward$"):
        lower(model)
    with pytest.raises(CannotLowerError, match="does not know models of type phi"):
        lower(tiny("phi"))
    with pytest.raises(CannotLowerError, match=r"^model\.rotary_emb is of type dynamic$"):
        lower(positions(rope_type="dynamic", factor=2.0))


@torch.inference_mode()
def test_follows_changes_of_the_model():
    model, ids = tiny("mamba"), batch(1, 5)
    engine = engine_of(model)
    assert engine_of(model) is engine
    before = engine(ids, engine.state()).clone()
    model.backbone.layers[0].mixer.out_proj.weight.mul_(2)  # in place: the engine reads the weights where they lie
    after = engine(ids, engine.state()).clone()
    assert engine_of(model) is engine and relative(after, logits_of_each(model, ids)[:, -1]) < 1e-4
    assert not torch.equal(before, after)
    quantized(model, "int4-g16-sym")
    assert engine_of(model) is not engine
    engine = engine_of(model)
    assert relative(engine(ids, engine.state()), logits_of_each(model, ids)[:, -1]) < 1e-4


def test_is_current_where_gradients_are_recorded():
    model = tiny("mamba")
    engine = lower(model)
    assert engine.is_current()
    model.lm_head = torch.nn.Linear(64, 61, bias=False)
    assert not engine.is_current()


def test_engines_do_not_keep_models_alive():
    model = tiny("qwen3_5")
    engine_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
