"""Folders of servable plans, read by transformers in a process without klfast."""

import json
import os
import subprocess
import sys

import pytest
import torch
from servable_plans import servable_plan
from tiny_models import FAMILIES, VARIANTS, batch, tiny

import klfast

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


@pytest.mark.slow
@torch.no_grad()
def test_transformers_alone_computes_the_same(tmp_path):
    expected, bits = {}, {}
    for family in SERVED:
        model, ids = tiny(family), batch()
        plan = servable_plan(model)
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
