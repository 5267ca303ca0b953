"""The records of families against the source of the installed transformers.

``make check-transformers VERSIONS="5.18.0 5.22.2"`` compares them with that of other versions.
"""

import re
import zipfile
from pathlib import Path

import pytest
import transformers
from record_problems import problems
from transformers_source import Source

from klfast.models.families import FAMILIES

RECORDS = {record.model_type: record for record in FAMILIES if not record.own_code}


@pytest.fixture(scope="module")
def source():
    return Source.of(Path(transformers.__file__).parents[1])


@pytest.mark.parametrize("model_type", RECORDS)
def test_the_records_are_true(model_type, source):
    assert not problems(RECORDS[model_type], source)


def test_a_wheel_reads_as_what_it_installs(source, tmp_path):
    with zipfile.ZipFile(tmp_path / "transformers.whl", "w") as wheel:
        for name, text in source.texts.items():
            wheel.writestr(name, text)
        wheel.writestr("transformers/modeling_utils.py", "")
    found = Source.of(tmp_path / "transformers.whl")
    assert found.texts == source.texts and found.version == transformers.__version__


@pytest.mark.parametrize(
    ("model_type", "old", "new", "found"),
    [
        ("mamba", 'model_type = "mamba"', 'model_type = "mambo"', "there is no model type mamba"),
        ("mamba", r"class MambaMixer\(", "class MambaLayer(", "there is no class MambaMixer"),
        ("bamba", "class BambaRMSNormGated", "class BambaGated", "there is no class BambaRMSNormGated"),
        ("mamba", r"\bmamba_selective_scan\(", "scan(", r"MambaMixer\.forward does not call mamba_selective_scan"),
        ("mamba", r"\bmamba_selective_scan\(", "scan(", r"MambaMixer\.forward calls scan, too"),
        ("mamba", "if self.training and", "if", r"MambaMixer\.forward calls mamba_inner_fn, too"),
        ("mamba", "return_last_state=", "final=", r"mamba_selective_scan with final=, which klfast does not know"),
        ("mamba2", r"\bB: torch\.Tensor,\n    C:", "C: torch.Tensor,\n    B:", r"chunk_scan with \(.*C, B\), klfast's"),
        (
            "mamba",
            r"\b(cache|cache_params): Cache",
            "memory: Cache",
            r"MambaMixer\.forward takes \(hidden_states, memory",
        ),
        ("mamba", r"\b(cache|cache_params): Cache", "memory: Cache", r"MambaForCausalLM\.forward takes no cache"),
        ("bamba", r"\b(cache|past_key_values): Cache", "memory: Cache", r"BambaForCausalLM\.forward takes no cache"),
        ("mamba", r"self\.layer_idx\b", "self.index", "MambaMixer has no attribute layer_idx"),
        ("mamba", r"self\.time_step_rank\b", "self.rank", "MambaMixer has no attribute time_step_rank"),
        ("mamba", r"self\.A_log\b", "self.log_A", "MambaMixer has no parameter A_log"),
        ("falcon_mamba", r"self\.b_layernorm\b", "self.b_norm", "FalconMambaMixer has no attribute b_layernorm"),
        ("falcon_mamba", r"self\.x_proj\b", "self.xproj", "FalconMambaMixer has no attribute x_proj"),
        ("mamba", r"dt_proj\.weight @", "dt_proj.weight.T @", r"not multiply by self\.dt_proj\.weight from the left"),
        ("mamba", r"self\.dt_proj = nn\.Linear", "self.dt_proj = Low", "MambaMixer has no linear layer dt_proj"),
        ("mamba2", r"self\.in_proj = nn\.Linear", "self.in_proj = Low", "Mamba2Mixer has no linear layer in_proj"),
        ("falcon_h1", "self.norm_before_gate =", "self.gate_last =", "NormGated has no attribute norm_before_gate"),
        (
            "bamba",
            r"forward\(self, hidden_states, gate=None\)",
            "forward(self, hidden_states, z=None)",
            "NormGated.*, z",
        ),
        ("granitemoehybrid", r"\blogits_scaling\b", "scale", "GraniteMoeHybridConfig has no attribute logits_scaling"),
        ("bamba", r"self\.layers = ", "self.blocks = ", "no class has blocks named layers"),
        ("mamba", r"dtype\)\)\.float\(\)", "dtype))", "MambaForCausalLM.forward does not widen its logits"),
        (
            "bamba",
            r"self\.lm_head\((.*)\)\n",
            r"self.lm_head(\1).float()\n",
            "BambaForCausalLM.forward widens its logits",
        ),
        ("mamba", r'\["attention_mask"\] = None', '["mask"] = None', "MambaForCausalLM does not drop the mask"),
        ("mamba", "class MambaForCausalLM", "class MambaLM", "there is no class for causal language models"),
    ],
)
def test_a_change_is_found(model_type, old, new, found, source):
    texts = dict(source.texts)
    changes = 0
    for kind in ("configuration", "modeling"):
        name = f"transformers/models/{model_type}/{kind}_{model_type}.py"
        texts[name], times = re.subn(old, new, texts[name])
        changes += times
    assert changes
    assert any(re.search(found, line) for line in problems(RECORDS[model_type], Source(texts)))
