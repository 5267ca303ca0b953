"""Quantized layers in the model classes of the package mamba_ssm."""

import pytest
import torch
from mamba_ssm_package import mamba_ssm, needs_mamba_ssm

import klfast

pytestmark = needs_mamba_ssm
MIXERS = {
    "Mamba1": {"layer": "Mamba1", "d_state": 5, "d_conv": 3},
    "Mamba1, unfused": {"layer": "Mamba1", "use_fast_path": False},
    "Mamba2": {"layer": "Mamba2", "d_state": 10, "headdim": 16, "chunk_size": 4, "use_mem_eff_path": False},
}


@pytest.fixture(scope="module")
def package():
    with mamba_ssm() as module:
        yield module


@pytest.fixture(params=MIXERS, scope="module")
def work(package, request, tmp_path_factory):
    """Create a folder as the package saves it, and what it loads from it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    config = {"d_model": 64, "n_layer": 2, "vocab_size": 93, "ssm_cfg": MIXERS[request.param], "fused_add_norm": False}
    made = package.MambaLMHeadModel(package.models.config_mamba.MambaConfig(**config))
    made.save_pretrained(folder)
    return folder, lambda: package.MambaLMHeadModel.from_pretrained(str(folder)).eval()


def ids():
    return torch.randint(0, 93, (3, 21), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_plan_for_the_folder_goes_into_the_packages_model(work):
    folder, load = work
    own, model = klfast.load_model(str(folder)), load()
    torch.testing.assert_close(model(ids()).logits, own(ids()).logits, rtol=1e-4, atol=1e-4)
    dense = model(ids()).logits
    swept = klfast.sweep(own, ids(), specs=["int4-g32-sym", "int8-g32-asym"], progress=False)
    plan = klfast.plan(swept, mean_bits=6)
    assert {spec.bits for spec in plan.specs.values()} == {4, 8}
    klfast.quantize_model(own, plan)
    assert klfast.quantize_model(model, plan) is model
    quantized = [name for name, module in model.named_modules() if isinstance(module, klfast.QuantLinear)]
    assert quantized == list(plan.specs) and "lm_head" in quantized
    assert type(model.backbone.embedding).__name__ == "QuantEmbedding"
    found = model(ids()).logits
    torch.testing.assert_close(found, own(ids()).logits, rtol=1e-4, atol=1e-4)
    assert (found - dense).abs().max() > 0.01


@torch.no_grad()
def test_token_by_token(work):
    from mamba_ssm.utils.generation import InferenceParams

    folder, load = work
    own, model = klfast.load_model(str(folder)), load()
    klfast.quantize_model(
        model, klfast.plan(klfast.sweep(own, ids(), specs=["int4-g32-sym"], progress=False), mean_bits=5)
    )
    whole, past, steps = model(ids()).logits, InferenceParams(max_seqlen=21, max_batch_size=3), []
    for begin, end in ((0, 7), *((i, i + 1) for i in range(7, 21))):
        past.seqlen_offset = begin
        steps.append(model(ids()[:, begin:end], inference_params=past).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_saving_is_refused(work, tmp_path):
    _, load = work
    model = load()
    klfast.quantize_model(model, klfast.Plan({"backbone.layers.0.mixer.in_proj": klfast.QuantSpec(4, 32)}, "uniform"))
    for save in (model.save_pretrained, lambda folder: klfast.save_quantized(model, folder)):
        with pytest.raises(klfast.InvalidInputError, match=r"klfast\.load_model reads from the same folder"):
            save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
