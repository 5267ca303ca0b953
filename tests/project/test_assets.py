"""The bundled models and texts: complete, small, loadable offline, and as good as their model cards claim."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import klfast

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_bundled import bits_per_byte

ASSETS = Path(klfast.__file__).parent / "assets"
MODELS = sorted(p for p in (ASSETS / "models").iterdir() if p.is_dir())
TEXTS = [ASSETS / "text" / name for name in ("calibration.txt", "evaluation.txt")]
each_model = pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def test_all_families_are_bundled():
    assert {"hymba", "mamba", "mamba2"} <= {p.name for p in MODELS}


def test_hymba_has_all_features_of_the_release():
    config = load(ASSETS / "models" / "hymba").config
    kinds = [config.is_global(i) for i in range(config.num_hidden_layers)]
    assert config.num_memory_tokens and True in kinds and False in kinds and config.kv_reuse_group == [[1, 2, 3]]
    assert config.rope_type == "ntk" and config.mamba_inner_layernorms and config.tie_word_embeddings


@each_model
def test_files(folder):
    names = {p.name for p in folder.iterdir()}
    models = {"config.json", "generation_config.json", "model.safetensors"}
    assert models | {"tokenizer.json", "tokenizer_config.json", "training_log.csv", "README.md"} <= names
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()  # safe_open cannot be iterated
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@each_model
def test_model_loads_completely(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(report.values())
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert model.config.num_hidden_layers >= 8
    assert model.dtype == torch.bfloat16


@each_model
@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_tokenizer_round_trip(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sample = text.read_text(encoding="utf-8")[-20_000:] + " naïve\t漢字 🙂\r\n  "
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == 0
    assert len(tokenizer) == 4096


@pytest.mark.slow
@each_model
def test_bits_per_byte(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    excerpt = (ASSETS / "text" / "evaluation.txt").read_text(encoding="utf-8")[:3000]
    assert 1.0 < bits_per_byte(load(folder), tokenizer, excerpt, batch=1) < 2.2


@each_model
def test_generates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer("The Mock Turtle", return_tensors="pt").input_ids
    out = load(folder).generate(ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids.shape[1]


@each_model
def test_log_ends_at_its_best(folder):
    with open(folder / "training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    bits = [float(row["valid_bits_per_byte"]) for row in rows if row["valid_bits_per_byte"]]
    assert bits[-1] <= min(bits) + 0.01, "a later checkpoint overfits"


def test_texts_are_disjoint():
    calibration, evaluation = (path.read_text(encoding="utf-8") for path in TEXTS)
    assert all(120_000 <= path.stat().st_size <= 200_000 for path in TEXTS)
    first, second = ({p for p in text.split("\n\n") if len(p) > 80} for text in (calibration, evaluation))
    assert first and second and not first & second
