"""What the pages say of memory, under a limit of the system: a process that wants more has an error."""

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's own memory (RLIMIT_DATA)"),
]

BEGIN = """
import resource, sys
import torch, klfast
from transformers import MambaConfig, MambaForCausalLM

def limit(more):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(status["VmData"].split()[0]) + int(more), -1))

def model(**options):
    return MambaForCausalLM(MambaConfig(vocab_size=50280, **options)).eval()

torch.manual_seed(0)
torch.set_num_threads(1)
"""
LOGITS = """
head, small = torch.randn(50280, 64), dict(hidden_size=64, num_hidden_layers=2, state_size=2)
teacher, student = model(**small), model(**small)
layers = ["lm_head", "backbone.layers.1.mixer.in_proj"]

def calls(text):
    hidden = torch.randn(2, text.numel(), 64)
    yield lambda: klfast.linear_divergence(hidden[0], head, hidden[1], head, text.flatten())
    yield lambda: klfast.evaluate(student, text, teacher=teacher)
    yield lambda: klfast.compare(teacher, student, text)
    yield lambda: klfast.sweep(teacher, text, "int4", layers=layers)
    if sys.argv[2:]:
        yield lambda: teacher(text).logits

text = torch.arange(2048).reshape(8, 256)
for call in calls(text[:1, :8]):  # makes what a process makes once
    call()
limit(float(sys.argv[1]))
for call in calls(text):
    call()
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", BEGIN + code, *map(str, arguments)], capture_output=True, text=True)


def test_logits_are_never_whole():
    """Not even a quarter of them: those of a model have 412 MB in float32."""
    done = run(LOGITS, 100e6)
    assert done.returncode == 0, done.stderr
    done = run(LOGITS, 100e6, "and whole")
    assert done.returncode == 1 and "allocate" in done.stderr, done.stderr


SAVE = """
from klfast import Plan, QuantSpec
from klfast.models.linears import linears
made = model(hidden_size=1024, num_hidden_layers=8).to(torch.bfloat16)
klfast.quantize_model(made, Plan({name: QuantSpec(4, 64) for name in linears(made) if name != "lm_head"}, "uniform"))
klfast.save_quantized(made, sys.argv[1])
"""
GENERATE = """
import klfast.engine.engine
from klfast.generation.engine import engine_of
held = float(sys.argv[2])
if held:
    limit(held + 100e6)
loaded = klfast.load_quantized(sys.argv[1])
klfast.generate(loaded, torch.arange(512).unsqueeze(0), 8, eos_token_id=())
weights = {t.data_ptr(): t.nbytes for t in loaded.state_dict().values()}
print(sum(weights.values()) + engine_of(loaded).state().nbytes)
"""


def test_loading_and_generating_take_little_more_than_weights_and_state(tmp_path):
    """In float32 the linear weights alone would have 210 MB; Mamba-1.4B takes 110 MB more (bench/first_token.py)."""
    saved = run(SAVE, tmp_path / "model")
    assert saved.returncode == 0, saved.stderr
    free = run(GENERATE, tmp_path / "model", 0)
    assert free.returncode == 0, free.stderr
    limited = run(GENERATE, tmp_path / "model", int(free.stdout))
    assert limited.returncode == 0, limited.stderr
