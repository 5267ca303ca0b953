"""Folders of servable plans, read by transformers in a process without klfast."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, batch, tiny

import klfast
from klfast.planning.servable import unserved
from klfast.sensitivity.results import Measurement, Sensitivities

SPECS = [klfast.QuantSpec(4, 32), klfast.QuantSpec(8, 32)]
# Hymba is klfast's own; transformers' RWKV asks packed layers for their weight when it initialises.
SERVED = [name for name in dict.fromkeys((*FAMILIES, *VARIANTS)) if "hymba" not in name and name != "rwkv"]
READ = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
found = {}
for folder in map(Path, sys.argv[1:]):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        torch.save(model(torch.load(folder / "ids.pt")).logits, folder / "logits.pt")
    found[folder.name] = {key: sorted(map(str, value)) for key, value in report.items() if value}
assert not any(name.partition(".")[0] == "klfast" for name in sys.modules)
print(json.dumps(found))
"""


def mixed(model):
    """Return a servable plan of INT4 and INT8: a little larger than the smallest."""
    swept = Sensitivities.of(model)
    for i, name in enumerate(swept.layers):
        for spec in SPECS:
            cost = (1 + i % 3) / 2**spec.bits
            swept.measurements[name, spec] = Measurement({"kl_teacher_student": cost}, {}, 9)
    least = klfast.plan(swept, max_kl=1e9, servable=True).predicted["bytes"]
    most = swept.other_bytes + sum(info.float_bytes for info in swept.layers.values())
    plan = klfast.plan(swept, 0.93 * least + 0.07 * most, servable=True)
    assert not unserved(list(swept.layers), plan.specs)
    return plan


@pytest.mark.slow
@torch.no_grad()
def test_transformers_alone_computes_the_same(tmp_path):
    expected, bits = {}, {}
    for family in SERVED:
        model, ids = tiny(family), batch()
        plan = mixed(model)
        bits[family] = {spec.bits for spec in plan.specs.values()}
        klfast.save_quantized(klfast.quantize_model(model, plan), tmp_path / family)
        torch.save(ids, tmp_path / family / "ids.pt")
        expected[family] = model(ids).logits
    folders = [str(tmp_path / family) for family in SERVED]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders], capture_output=True, text=True, env=alone, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {family: {} for family in SERVED}, "keys that do not fit"
    for family in SERVED:
        found = torch.load(tmp_path / family / "logits.pt")
        largest = expected[family].abs().max()  # experts are expanded to float16
        assert (found - expected[family]).abs().max() < 1e-2 * largest, family
    assert sum(len(each) == 2 for each in bits.values()) > 20, bits
