"""Files of an engine's state: the text goes on as if it had never stopped, and only with its own model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, tiny

import klfast
from klfast.generation.engine import lower
from klfast.models.fingerprint import fingerprint


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mamba", "qwen3_5"])
def test_goes_on_as_if_it_had_never_stopped(family, tmp_path):
    model, ids = tiny(family), batch(2, 9)
    engine = lower(model)
    state = engine.state(2)
    engine(ids[:, :5], state)
    klfast.save_state(tmp_path / "state", state, model)
    again = klfast.load_state(tmp_path / "state", tiny(family))
    assert again.seen.tolist() == [5, 5]
    assert torch.equal(engine(ids[:, 5:], state), engine(ids[:, 5:], again))
    if family == "qwen3_5":  # with attention: without the unused capacity of its cache
        assert sum(t.nbytes for t in load_file(tmp_path / "state").values()) < state.nbytes


@pytest.fixture
def saved(tmp_path):
    model = tiny("mamba")
    state = klfast.lower(model).state()
    klfast.save_state(tmp_path / "state", state, model)
    return model, tmp_path / "state"


def test_refuses_states_of_other_models(saved):
    model, path = saved
    with pytest.raises(klfast.ModelMismatchError, match="was made for other weights"):
        klfast.load_state(path, tiny("mamba", seed=1))
    with pytest.raises(klfast.ModelMismatchError, match="was made for a model with other layers"):
        klfast.load_state(path, tiny("mamba2"))
    with pytest.raises(klfast.InvalidInputError, match="another model's engine"):
        klfast.save_state(path, klfast.lower(tiny("mamba2")).state(), model)
    with pytest.raises(klfast.CannotLowerError, match="does not know models of type phi"):
        klfast.load_state(path, tiny("phi"))


@pytest.mark.parametrize("family", ["llama", "mamba"])  # engines without and with copies of weights
def test_is_for_the_weights_as_they_are(family, tmp_path):
    model, path = tiny(family), tmp_path / "state"
    klfast.save_state(path, klfast.lower(model).state(), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -1.0)
    for fused in (False, True):
        torch.optim.SGD(model.parameters(), lr=1.0, fused=fused).step()
        with pytest.raises(klfast.ModelMismatchError, match="was made for other weights"):
            klfast.load_state(path, model)
        klfast.save_state(path, klfast.lower(model).state(), model)
        assert int(klfast.load_state(path, model).seen) == 0


def test_refuses_damaged_files(saved):
    model, path = saved
    whole = path.read_bytes()
    for content, message in ((whole[: len(whole) // 2], "is damaged"), (b"no state", "is damaged")):
        path.write_bytes(content)
        with pytest.raises(klfast.CheckpointError, match=message):
            klfast.load_state(path, model)
    with pytest.raises(FileNotFoundError):
        klfast.load_state(path.with_name("missing"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: facts.update(format="other"), "is not a klfast state"),
        (lambda tensors, facts: facts.update(model="{}"), "is damaged"),
        (lambda tensors, facts: tensors.pop("seen"), "holds no numbers of tokens"),
        (lambda tensors, facts: tensors.pop("state.1"), "holds 3 tensors, not 4"),
        (lambda tensors, facts: tensors.update(seen=torch.tensor([0] * 17)), r"state\.0 must be .* \[17, "),
        (lambda tensors, facts: tensors.update({"state.0": torch.ones(1, 2)}), r"state\.0 must be torch.float32"),
    ],
)
def test_refuses_states_that_do_not_fit(saved, change, message):
    model, path = saved
    own = fingerprint(model)
    facts = {"format": "klfast state 1", "model": json.dumps({"structure": own.structure, "norms": own.norms})}
    tensors = load_file(path)
    change(tensors, facts)
    save_file(tensors, path, facts)
    with pytest.raises(klfast.CheckpointError, match=message):
        klfast.load_state(path, model)


@torch.inference_mode()
def test_takes_no_memory_for_tokens_that_a_damaged_file_counts(tmp_path):
    model, path = tiny("qwen3_5"), tmp_path / "state"
    engine = lower(model)
    state = engine.state()
    engine(batch(1, 5), state)
    klfast.save_state(path, state, model)
    tensors = load_file(path)
    own = fingerprint(model)
    facts = {"format": "klfast state 1", "model": json.dumps({"structure": own.structure, "norms": own.norms})}
    save_file(tensors | {"seen": torch.tensor([10**15])}, path, facts)
    with pytest.raises(klfast.CheckpointError, match=r"must be torch\.float32 \[1, 2, 1000000000000000, 16\], got"):
        klfast.load_state(path, model)
