"""Files of older klfast versions still load: plans, sensitivities and folders.

tests/golden/old_files holds those of 0.1.0 (before commit 1ced1b5) and of the last version before formats became types
(b06f021): a tiny random Mamba-2, swept, planned, quantized to INT4 and INT8 with and without zero points, and saved.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import klfast
from klfast.nn import QuantLinear

OLD = Path(__file__).parents[1] / "golden" / "old_files"
VERSIONS = sorted(path.name for path in OLD.iterdir())
SPECS = {
    "backbone.layers.0.mixer.in_proj": "int4-g16-sym",
    "backbone.layers.0.mixer.out_proj": "int8-g32-asym",
    "lm_head": "int8-channel-asym",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder(version):
    model = klfast.load_quantized(OLD / version / "folder")
    assert {name: str(m.spec) for name, m in model.named_modules() if isinstance(m, QuantLinear)} == SPECS
    expected = json.loads((OLD / version / "expected.json").read_text())
    with torch.no_grad():
        logits = model(torch.tensor(expected["ids"])).logits
    torch.testing.assert_close(logits[0, -1], torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_and_its_sensitivities(version):
    sensitivities = klfast.Sensitivities.from_json(OLD / version / "sensitivities.json")
    plan = klfast.Plan.from_json(OLD / version / "plan.json")
    assert {name: str(spec) for name, spec in plan.specs.items()} == SPECS
    again = klfast.plan(sensitivities, mean_bits=7.0)
    assert again.specs == plan.specs and again.predicted == plan.predicted


@pytest.mark.parametrize("version", VERSIONS)
def test_names_of_tensors(version, tmp_path):
    """A folder saved again holds the same tensors under the same names."""
    klfast.save_quantized(klfast.load_quantized(OLD / version / "folder"), tmp_path / "again")
    with (
        safe_open(OLD / version / "folder" / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as new,
    ):
        assert sorted(old.keys()) == sorted(new.keys())
        assert all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())  # noqa: SIM118
    old_config, new_config = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (OLD / version / "folder", tmp_path / "again")
    )
    assert old_config == new_config
