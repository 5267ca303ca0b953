"""A tiny random model that writes letters and spaces."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def writing_model(words):
    """Return a Llama over the vocabulary of ``words`` that generates only letters and spaces."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
        for token in range(len(words)):
            if (
                not (text := words.decode([token])).isascii()
                or not text.replace(" ", "a").isalpha()
                or token in words.all_special_ids
            ):
                model.lm_head.weight[token] = 0
    return model
