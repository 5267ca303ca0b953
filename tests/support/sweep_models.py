"""What the tests of the sweep share: random models far from uniform, and the naive computation of every metric."""

import copy

import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import klfast
from klfast.models.hymba import HymbaConfig, HymbaForCausalLM
from klfast.sensitivity.measure import SQNR_CAP

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
MAKERS = {
    "mamba": lambda tied: MambaForCausalLM(MambaConfig(**SMALL, state_size=4, tie_word_embeddings=tied)),
    "mamba2": lambda tied: Mamba2ForCausalLM(
        Mamba2Config(
            **SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, tie_word_embeddings=tied
        )
    ),
    "falcon_mamba": lambda tied: FalconMambaForCausalLM(
        FalconMambaConfig(**SMALL, state_size=4, tie_word_embeddings=tied)
    ),
    "hymba": lambda tied: HymbaForCausalLM(
        HymbaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            mamba_d_state=4,
            num_memory_tokens=3,
            sliding_window=6,
            global_attn_idx=[2],
            kv_reuse_group=[[0, 1]],
            tie_word_embeddings=tied,
        )
    ),
    "llama": lambda tied: LlamaForCausalLM(
        LlamaConfig(
            **SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
        )
    ),
}
KL = "kl_teacher_student"


def make(family="mamba2", tied=False, seed=0):
    """A random model with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    model = MAKERS[family](tied).eval()
    with torch.no_grad():
        for weight in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            weight.mul_(4)
    return model


def tokens(windows=3, length=17, seed=1):
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive(model, ids, name, spec):
    """All metrics, [B, T - 1] each, from two whole models and float64 log-probabilities."""
    student = copy.deepcopy(model)
    weight = student.get_submodule(name).weight
    weight.copy_(klfast.quantize(weight, spec).dequantize(torch.float32))
    t, s = (network(ids).logits[:, :-1].double() for network in (model, student))
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    noise = (s - t).square().sum(-1)
    return {
        KL: (p * (log_p - log_q)).sum(-1),
        "kl_student_teacher": (q * (log_q - log_p)).sum(-1),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "mse": noise / t.shape[-1],
        "sqnr_db": (10 * (t.square().sum(-1) / noise).log10()).clamp(max=SQNR_CAP),
        "delta_ce": (log_p - log_q).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1),
        "top1_agree": (t.argmax(-1) == s.argmax(-1)).double(),
    }


def means(sensitivities):
    return {key: (m.mean, m.stderr, m.tokens, m.below_noise) for key, m in sensitivities.measurements.items()}
