"""The folder that bench makes of SmolLM2's GGUF file."""

import gguf_files
import torch

import klfast
from bench import smollm2


def test_the_folder_has_the_files_own_numbers_and_tokens(tmp_path):
    model = gguf_files.tiny("llama", tied=True)
    file = gguf_files.write(tmp_path / "m.gguf", "llama", model, {"*": "Q4_1", "token_embd*": "Q8_0"})
    smollm2.expand(file, tmp_path / "folder")
    found = klfast.load_model(tmp_path / "folder", dtype="auto")
    assert found.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert found.state_dict()[name].dtype == torch.float32
        assert torch.equal(found.state_dict()[name], tensor), name
    tokens = [klfast.load_tokenizer(source)("the then")["input_ids"] for source in (file, tmp_path / "folder")]
    assert tokens[0] == tokens[1] != []
