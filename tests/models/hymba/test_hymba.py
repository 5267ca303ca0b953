"""Hymba against the released code's results, with and without a cache."""

import copy

import pytest
import torch
from cached_calls import GENERATE_CACHE
from hymba_models import SETS, golden_model, golden_tensors, tiny_model

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.calling import returned_cache
from klfast.models.hymba import HymbaCache, HymbaConfig, HymbaForCausalLM, attention, state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS, HIDDEN = {"rtol": 0, "atol": 5e-4}, {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module", params=SETS)
def golden(request):
    return golden_model(request.param), golden_tensors(request.param)


def prompts(tensors):
    return sorted(int(name.split(".")[0][3:]) for name in tensors if name.endswith("consistent.tokens"))


@pytest.mark.parametrize("sequence", ["short", "long"])
@torch.no_grad()
def test_forward(golden, sequence, tier):
    model, expected = golden
    out = model(expected[f"{sequence}.input_ids"], output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected[f"{sequence}.logits"], **LOGITS)
    layers = model.config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    for i, hidden in enumerate(out.hidden_states[:-1]):
        torch.testing.assert_close(hidden, expected[f"{sequence}.hidden.{i}"], **HIDDEN)
    torch.testing.assert_close(out.hidden_states[-1], expected[f"{sequence}.final"], **HIDDEN)


def test_forward_with_gradients(golden):
    """Functions with gradients give the same results, and every parameter gets a gradient."""
    model, expected = golden
    with pytest.warns(klfast.SlowPathWarning, match="no gradients"):
        out = model(expected["short.input_ids"], labels=expected["short.input_ids"])
    torch.testing.assert_close(out.logits, expected["short.logits"], **LOGITS)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_rotary_frequencies(golden):
    model, expected = golden
    cos, sin = attention.rotary_tables(model.config, torch.tensor([[1]]), torch.float32)
    angles = torch.atan2(sin, cos)[0, 0, 0]
    torch.testing.assert_close(angles, expected["rope.inv_freq"].repeat(2), rtol=1e-6, atol=1e-7)


@torch.inference_mode()
def test_greedy_generation(golden):
    model, expected = golden
    for prompt in prompts(expected):
        ids, tokens = expected["long.input_ids"][:, :prompt], expected[f"gen{prompt}.consistent.tokens"]
        want = torch.cat((ids, tokens), dim=1)
        assert torch.equal(klfast.generate(model, ids, 24), want)
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for use_cache in (False, True):
            out = model.generate(ids, use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **options)
            assert torch.equal(out.sequences, want)
            torch.testing.assert_close(torch.stack(out.logits, 1), expected[f"gen{prompt}.consistent.logits"], **LOGITS)


@torch.inference_mode()
def test_prefill_state(golden):
    model, expected = golden
    names = [name.split(".") for name in expected if name.startswith("cache")]
    prompt = int(names[0][0][5:])
    cache = model(expected["long.input_ids"][:, :prompt], use_cache=True).past_key_values
    assert cache.get_seq_length() == prompt
    fields = {"conv_state": "conv", "ssm_state": "ssm", "key": "keys", "value": "values"}
    for first, layer, name in names:
        found = getattr(cache.layers[int(layer[5:])], fields[name])
        torch.testing.assert_close(found, expected[f"{first}.{layer}.{name}"], rtol=0, atol=2e-5)
    shared = [i for i, state in enumerate(cache.layers) if state.keys is None]
    assert shared == [i for i in range(model.config.num_hidden_layers) if not model.config.owns_kv(i)]


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [1, 1, 20, 1, 20, 7], [45, 5], [2, 48]])
@torch.inference_mode()
def test_continuing_in_chunks(golden, chunks):
    """Chunks of any length give the logits of the whole sequence, even beyond the window."""
    model, expected = golden
    cache, logits = HymbaCache(model.config), []
    for ids in expected["long.input_ids"][:, :50].split(chunks, dim=1):
        out = model(ids, past_key_values=cache)
        assert out.logits.shape[1] == ids.shape[1] and out.past_key_values is cache
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected["long.logits"][:, :50], **LOGITS)


@torch.inference_mode()
def test_the_cache_by_both_its_names():
    """Transformers calls it ``cache`` since 5.24, ``past_key_values`` before."""
    model, ids = tiny_model(), torch.randint(0, 61, (2, 12))
    whole = model(ids).logits
    for name in ("cache", "past_key_values"):
        cache = HymbaCache(model.config)
        first, rest = (model(part, **{name: cache}) for part in ids.split([7, 5], dim=1))
        assert cache.length == 12 and returned_cache(first) is returned_cache(rest) is cache
        torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_chunk_is_one_scan(monkeypatch):
    """A chunk does not run a step for each of its tokens."""
    model, ids = tiny_model(), torch.randint(0, 61, (2, 20))
    cache = model(ids[:, :6], use_cache=True).past_key_values
    monkeypatch.delattr("klfast.ops.selective_state_update")
    rest = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 6:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("smallest", [1, 11, 16])
@torch.inference_mode()
def test_windows_in_blocks(golden, smallest, monkeypatch):
    """A long windowed prefill runs block by block; here the short golden ones do as well."""
    model, expected = golden
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", smallest)
    blocks = attention.Blocks.of(68, model.config.num_memory_tokens, model.config.sliding_window, "cpu")
    assert len(blocks.parts) == -(-68 // max(smallest, model.config.sliding_window // 2))
    torch.testing.assert_close(model(expected["long.input_ids"]).logits, expected["long.logits"], **LOGITS)


def test_visible():
    """Two memory tokens and a window of two; the second row starts with two places of padding."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [-2, -1, 0, 1, 2, 3, 4]])
    seen = attention.visible(positions, positions, memory=2, window=2)[:, 0].int().tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    assert seen[1] == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1],
    ]


def test_continuing_with_gradients():
    """The results are the same, and the cache keeps no graph."""
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        whole = model(ids).logits
    with pytest.warns(klfast.SlowPathWarning):
        cache = model(ids[:, :9], use_cache=True).past_key_values
    rest = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=0, atol=1e-4)
    assert not any(t.requires_grad for state in cache.layers for t in vars(state).values() if t is not None)
    rest.sum().backward()


@torch.inference_mode()
def test_sampling():
    model = tiny_model()
    ids = torch.randint(0, 61, (3, 5))
    options = {
        "max_new_tokens": 15,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        found.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*found)
    torch.manual_seed(3)
    greedy = model.generate(ids, use_cache=True, **{**options, "do_sample": False, "temperature": None, "top_k": None})
    assert not torch.equal(greedy, found[0])


@torch.inference_mode()
def test_generate_from_a_cache():
    """Continue a conversation: the cache of the text so far, then generate() with the whole text and its mask."""
    model, ids = tiny_model(), torch.randint(0, 61, (2, 25))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    cache = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
    found = model.generate(ids, use_cache=True, **{GENERATE_CACHE: cache}, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    assert cache.get_seq_length() == 25 + 9 - 1


@torch.inference_mode()
def test_beam_search():
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 5))
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_16_bit(dtype):
    """Computing in 16 bits adds about the error of rounding the weights to them, with and without a cache."""
    model, ids = tiny_model(), torch.randint(0, 61, (2, 30))
    expected = model(ids).logits
    model.to(dtype)
    whole, cache = model(ids).logits, model(ids[:, :20], use_cache=True).past_key_values
    rest = model(ids[:, 20:], past_key_values=cache).logits
    assert (
        whole.dtype == torch.float32
        and cache.layers[0].keys.dtype == dtype
        and cache.layers[0].ssm.dtype == torch.float32
    )
    inevitable = model.float()(ids).logits - expected
    assert (whole - expected).std() < 3 * inevitable.std()
    assert (rest - expected[:, 20:]).std() < 3 * inevitable[:, 20:].std()  # later tokens have larger errors


@torch.inference_mode()
def test_16_bit_at_the_depth_of_the_release():
    """Over 32 layers rounding errors grow, so cached and uncached logits differ.

    But both are equally far from float32 with the same weights, and not further from each other.
    """
    depth = {"num_hidden_layers": 32, "global_attn_idx": [0, 15, 31], "kv_reuse_group": HymbaConfig().kv_reuse_group}
    model, ids = tiny_model(torch.bfloat16, **depth), torch.randint(0, 61, (4, 20))
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            parameter.mul_(64**-0.5)  # 64 parts add to the hidden states
    truth = copy.deepcopy(model).float()(ids).logits
    whole = model(ids).logits
    error = (whole - truth).square().mean().sqrt()
    assert error < 0.2 * truth.std()
    for chunks in ([10, 10], [8] + [1] * 12):
        cache, logits = HymbaCache(model.config), []
        for part in ids.split(chunks, dim=1):
            logits.append(model(part, past_key_values=cache).logits)
        cached = torch.cat(logits, dim=1)
        assert (cached - truth).square().mean().sqrt() < 1.4 * error
        assert (cached - whole).square().mean().sqrt() < 1.4 * error


@pytest.mark.slow
@torch.inference_mode()
def test_the_sizes_of_the_release():
    """Run two of its layers, one of which owns keys that both use, until tokens leave the window."""
    config = HymbaConfig(vocab_size=64, num_hidden_layers=2, global_attn_idx=[], kv_reuse_group=[[0, 1]])
    torch.manual_seed(0)
    model, ids = HymbaForCausalLM(config).eval(), torch.randint(0, 64, (1, 1250))
    whole = model(ids, logits_to_keep=9).logits
    cache = model(ids[:, :1241], use_cache=True, logits_to_keep=1).past_key_values
    torch.testing.assert_close(model(ids[:, 1241:], past_key_values=cache).logits, whole, rtol=0, atol=1e-4)
    assert cache.layers[0].keys.shape[2] == 128 + 1024 and cache.nbytes == state_bytes(config, 1250, torch.float32)


@torch.inference_mode()
def test_without_options():
    """Without rotation, inner norms and window, and with biased projections, chunks still equal the whole."""
    for changes in (
        {"rope": False},
        {"mamba_inner_layernorms": False, "mamba_proj_bias": True, "mamba_conv_bias": False},
        {"sliding_window": None, "global_attn_idx": None},
        {"kv_reuse_group": None, "kv_reuse_every_i_layer": 2, "global_attn_idx": []},
        {"num_memory_tokens": 0},
        {"tie_word_embeddings": False},
    ):
        model, ids = tiny_model(**changes), torch.randint(0, 61, (2, 20))
        whole = model(ids).logits
        cache = model(ids[:, :11], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 11:], past_key_values=cache).logits, whole[:, 11:], rtol=0, atol=1e-4)
        torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, whole)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])


@torch.inference_mode()
def test_loss_is_of_the_next_token():
    model, ids = tiny_model(), torch.randint(0, 61, (2, 9))
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:])
    torch.testing.assert_close(out.loss, expected)


def test_bad_input():
    model, ids = tiny_model(), torch.randint(0, 61, (2, 5))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        for message, call in (
            ("give either input_ids or inputs_embeds", model),
            (r"at least one sequence of one token, got \[2, 0\]", lambda: model(ids[:, :0])),
            ("cache must be a klfast.models.hymba.HymbaCache, got list", lambda: model(ids, past_key_values=[])),
            (
                "cache and past_key_values are the same; give one of them",
                lambda: model(ids, past_key_values=cache, cache=cache),
            ),
            (r"attention_mask must be \[2, 5\] as the tokens", lambda: model(ids, attention_mask=torch.ones(2, 4))),
            (
                "padding only in the call that starts it",
                lambda: model(ids, past_key_values=cache, attention_mask=torch.tensor([[1] * 5, [0] + [1] * 4])),
            ),
            (
                "padding only in the call that starts it",
                lambda: model(ids, past_key_values=cache, attention_mask=torch.tensor([[1] * 9 + [0]] * 2)),
            ),
            ("the Hymba cache holds 2 sequences, got 1", lambda: model(ids[:1], past_key_values=cache)),
            (
                "other padding than the Hymba cache was made with",
                lambda: model(ids, past_key_values=cache, attention_mask=torch.tensor([[1] * 10, [0] + [1] * 9])),
            ),
        ):
            with pytest.raises(InvalidInputError, match=message):
                call()
