"""Models as OpenVINO graphs, against klfast's engine."""

import pytest
import tiny_models
import torch
from openvino_runs import Run, core, ov
from tiny_models import batch, tiny

import klfast
from klfast.export.openvino.graph import graph_of
from klfast.export.openvino.weights import common_group, quantized
from klfast.generation.engine import lower
from klfast.models.linears import row_parts
from klfast.models.matrices import matrices

SPECS = ("int4-g32-sym", "int8-channel-sym", "int4-g16-asym", "int6-g32-sym", "int8-g16-asym", "int4-channel-sym")
FIRST = ("mamba", "mamba2", "hymba_release", "granite_hybrid", "granite_hybrid_moe", "qwen3_5")
OTHERS = (
    *("falcon_mamba", "hymba", "falcon_h1", "falcon_h1_norm", "falcon_h1_gated_norm", "bamba", "nemotron_h", "jamba"),
    *("zamba", "zamba2", "zamba2_adapters", "lfm2", "olmo_hybrid", "llama", *tiny_models.LLAMA_LIKE),
    *("qwen3_5_moe", "qwen3_next", "lfm2_moe", "nemotron_h_moe", "jamba_moe", "kimi_linear", "minimax"),
    *(name for name in tiny_models.VARIANTS if name == "lfm3"),
)


def mixed(family):
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    plan = {name: SPECS[i % len(SPECS)] for i, name in enumerate(matrices(model))}
    return klfast.quantize_model(model, klfast.Plan(plan, "uniform"))


def of_engine(model, ids):
    """Return klfast's logits after each token, float32 [B, T, V]."""
    engine = lower(model)
    state = engine.state(len(ids))
    return torch.cat([engine.each(each, state) for each in ids.split(1, 1)], 1)


def relative(found, truth):
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.filterwarnings("ignore:quantize_model")  # Zamba's x_proj stays as it is
@pytest.mark.parametrize("family", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_equals_the_engine_over_several_calls(family):
    model, ids = mixed(family), batch(2, 14)
    truth, running = of_engine(model, ids), Run(graph_of(model).model)
    for _ in range(2):  # the second time from the beginning
        found = torch.cat([running(part) for part in ids.split([5, 1, 1, 4, 3], 1)], 1)
        assert relative(found, truth) < 3e-4
        running.forget()
    one = running(ids[1:, :8])  # a batch of another size
    assert relative(one, truth[1:, :8]) < 3e-4
    both = running(ids[:, 8:9].flip(0), beams=[0, 0])
    assert relative(both[0], truth[1, 8:9]) < 3e-4


@pytest.mark.parametrize("family", ["granite_hybrid", "mamba2"])
def test_tied_heads_with_corrected_rows(family):
    model, ids = tiny(family, tied=True), batch(2, 7)
    ids[0, 3] = 60
    klfast.quantize_model(model, klfast.Plan({"lm_head": "int4-g16-sym+30"}, "uniform"))
    assert relative(Run(graph_of(model).model)(ids), of_engine(model, ids)) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_corrected_rows_of_fused_layers(family):
    model, ids = tiny(family), batch(2, 7)
    parts = {name: row_parts(model, name).get("dt") for name in matrices(model)}
    plan = {name: f"int4-g16-sym+{rows[0]}:{rows[1]}" for name, rows in parts.items() if rows}
    klfast.quantize_model(model, klfast.Plan(plan, "uniform"))
    assert relative(Run(graph_of(model).model)(ids), of_engine(model, ids)) < 1e-5


@pytest.mark.parametrize("prompt", [1, 5])
def test_limited_time_steps(prompt):
    config = tiny_models.CONFIGS["mamba2"]()
    config.time_step_limit = (0.3, 0.6)
    model, ids = tiny_models.made(config, "mamba2"), batch(2, 9)
    engine, running = lower(model), Run(graph_of(model).model)
    for _ in range(2):
        state = engine.state(2)
        for part in ids.split([prompt, *[1] * (9 - prompt)], 1):
            assert relative(running(part)[:, -1], engine(part, state)) < 3e-4
        running.forget()


def test_experts_in_groups():
    config = tiny_models.CONFIGS["nemotron_h_moe"]()
    config.n_group, config.topk_group = 2, 1
    model, ids = tiny_models.made(config, "nemotron_h_moe"), batch(2, 9)
    assert relative(Run(graph_of(model).model)(ids), of_engine(model, ids)) < 3e-4


def test_padding_makes_nan():
    running = Run(graph_of(tiny("mamba")).model)
    assert running(batch(1, 3)).isfinite().all() and running(batch(1, 3), mask=0).isnan().all()


def test_openvino_finds_delta_nets_and_experts():
    found = Run(graph_of(mixed("qwen3_5_moe")).model).operations()
    assert {"GatedDeltaNet", "GatherMatmul"} <= found and "TensorIterator" not in found


def test_weights_stay_packed_in_memory():
    graph = graph_of(mixed("granite_hybrid"))
    found = Run(graph.model).weight_types()
    assert set(graph.kinds.values()) == {"i4", "i8", "u4", "u8"}
    assert {name: found[name] for name in graph.kinds} == graph.kinds


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("n", "k", "scale"), [(5, 96, torch.float16), (3, 40, torch.float32), (7, 120, torch.bfloat16)]
)
def test_weights_are_codes_times_scales(spec, n, k, scale):
    qt = klfast.quantize(torch.randn(n, k, dtype=scale), spec)
    node = quantized(qt)
    assert torch.equal(computed(node), qt.dequantize(torch.float32))
    constants = [each for each in ancestors(node) if each.get_type_name() == "Constant"]
    kind = f"{'i' if qt.spec.symmetric else 'u'}{4 if qt.spec.bits == 4 else 8}"
    [codes] = [each for each in constants if each.get_element_type().to_string() == kind and each.shape[-1] > 1]
    assert list(codes.shape)[-1] == common_group(qt)


def computed(node):
    running = core().compile_model(ov.Model([node], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(running([])[0].copy())


def ancestors(node):
    found = [node]
    for each in node.input_values():
        found += ancestors(each.get_node())
    return found
