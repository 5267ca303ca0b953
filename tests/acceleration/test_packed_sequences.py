"""Packed sequences in transformers' Mamba-2 mixers, which hand seq_idx on to their functions."""

import pytest
import tiny_models
import torch

import klfast


@pytest.mark.parametrize("family", ["mamba2", "granite_hybrid", "falcon_h1", "bamba"])
def test_a_mixer_keeps_packed_sequences_apart(family):
    model = tiny_models.tiny(family)
    klfast.accelerate(model)
    mixer = next(module for module in model.modules() if hasattr(module, "conv1d"))
    lengths = [5, 1, 19, 8]
    x = torch.randn(1, sum(lengths), model.config.hidden_size)
    seq_idx = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    with torch.inference_mode():
        packed = mixer(x, seq_idx=seq_idx)
        alone = torch.cat([mixer(piece) for piece in x.split(lengths, 1)], 1)
        mixed = mixer(x)
    terms = mixer.out_proj.in_features  # whose sum is rounded by sqrt(terms) epsilons of what they are
    rounding = torch.finfo().eps * terms**0.5 * float(alone.abs().max())
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=rounding)
    assert not torch.allclose(mixed, alone, rtol=1e-3), "the sequences would see each other"
