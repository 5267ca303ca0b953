"""Nothing but data: a local folder needs no network, and no code in it ever runs."""

import json
import pickle

import other_process
import pytest
import tiny_folder

import klfast
from klfast.generation.chat import chat_text

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
# What Python itself reports: no code path is left out, whichever library takes it.
WATCHED = """
import sys
folder = {folder!r}

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        raise AssertionError(f"the network: {{event}} {{args}}")
    if event == "pickle.find_class":
        raise AssertionError(f"a pickle: {{args}}")
    if event == "exec" and args[0].co_filename.startswith(folder):
        raise AssertionError(f"code in the folder: {{args[0].co_filename}}")

import klfast, torch
torch.set_num_threads(1)
sys.addaudithook(watch)
"""


class _Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.fixture
def hostile(tmp_path):
    """Return a model's folder that also holds code and pickles, some named by its configurations."""
    folder = tiny_folder.save_model(tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
        content["custom_generate"] = "evil"
        (folder / name).write_text(json.dumps(content))
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "__init__.py", "modeling_mamba2.py", "custom_generate/generate.py"):
        (folder / name).write_text(CODE)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Evil()))
    return folder


@pytest.mark.slow
def test_from_a_folder_to_text_without_network_pickles_and_code(hostile, tmp_path):
    made = other_process.run(
        WATCHED.format(folder=str(hostile))
        + f"""
folder, out = {str(hostile)!r}, {str(tmp_path / "small")!r}
model, tokenizer = klfast.load_model(folder), klfast.load_tokenizer(folder)
text = klfast.token_batches("calibration", tokenizer, vocab_size=model.config.vocab_size, length=32, windows=2)
plan = klfast.plan(klfast.sweep(model, text, specs=["int4-g32-sym", "int8-g32-sym"]), mean_bits=6)
klfast.save_quantized(klfast.quantize_model(model, plan), out, tokenizer)
small = klfast.load_quantized(out)
klfast.evaluate(small, text, teacher=klfast.load_model(folder))
print(klfast.generate(small, text[0][:1, :5], 3).shape)
""",
        KLFAST_ISA="",
        HF_HUB_OFFLINE="0",
    )
    assert made.strip().endswith("torch.Size([1, 8])")
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_chat_templates_run_in_a_sandbox(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_folder.save_tokenizer(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(klfast.InvalidInputError, match="the chat template of m refuses these messages"):
        chat_text(tokenizer, [{"role": "user", "content": "x"}], "m")
    assert not (tmp_path / "ran").exists()
