"""A folder with a small random model and a byte-level tokenizer, for tests that need no trained weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedTokenizerFast


def save_tokenizer(folder: Path, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte (256), and with ``bos`` token 256 before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens(["<s>"])
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if bos else None)
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, seed: int = 0, layers: int = 2, vocab_size: int = 257) -> Path:
    """Save a Mamba-2 of ``layers`` blocks with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=layers,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        expand=2,
        chunk_size=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
