"""Rounding that was stopped goes on where it was, to the same bits."""

import gc
import os
import tempfile

import pytest
import torch
from full_disk import files_of_at_most
from killed import killed
from tiny_models import batch, tiny

import klfast
from klfast.core import lock, signed_json, temporaries
from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Carry
from klfast.models.matrices import matrices
from klfast.rounding import carries, walk
from klfast.rounding.rounded import Kept, RoundedModel, forget

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = klfast.QuantSpec(4, 32)


def rounded(model, ids, **options):
    specs = dict.fromkeys(matrices(model), SPEC)
    return walk.round_model(model, specs, ids, progress=False, **options)


def same(a, b):
    assert a.notes == b.notes and a.nearest == b.nearest and a.tensors.keys() == b.tensors.keys()
    for name, qt in a.tensors.items():
        assert qt.spec == b.tensors[name].spec
        assert all(torch.equal(x, y) for x, y in zip(qt.parts, b.tensors[name].parts, strict=True)), name


def stopped(monkeypatch, model, ids, folder, after):
    """Stop a rounding at its matrix number ``after``; return a list that counts those rounded from then on."""
    calls, whole = [], walk.second_order

    def stopping(*args, **options):
        calls.append(None)
        if len(calls) == after:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(walk, "second_order", stopping)
    with pytest.raises(KeyboardInterrupt):
        rounded(model, ids, resume=folder)
    calls.clear()
    calls.extend([None] * after)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("mamba2", True), ("llama", False), ("granite_hybrid_moe", True)])
def test_goes_on_to_the_same_bits(family, tied, tmp_path, monkeypatch):
    model, ids = tiny(family, tied), batch(48, 16)
    truth = rounded(model, ids)
    calls = stopped(monkeypatch, model, ids, tmp_path / "kept", after=4 if family == "mamba2" else 9)
    begun = len(calls)
    same(rounded(model, ids, resume=tmp_path / "kept"), truth)
    again = len(calls) - begun
    calls.clear()
    calls.extend([None] * 10**6)
    same(rounded(model, ids, resume=tmp_path / "kept"), truth)
    assert again > 0 and len(calls) == 10**6, "all is kept now"
    forget(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_damaged_file_is_rounded_again(tmp_path):
    model, ids = tiny("llama"), batch(24, 16)
    truth = rounded(model, ids, resume=tmp_path / "kept")
    for name, change in (("0.safetensors", lambda data: data[:-3] + b"abc"), ("1.safetensors", lambda data: data[:99])):
        path = tmp_path / "kept" / name
        path.write_bytes(change(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged .* its matrices are rounded again"):
        same(rounded(model, ids, resume=tmp_path / "kept"), truth)


@pytest.mark.parametrize(
    "part",
    ["backbone.embeddings.weight", "layers.0.norm.weight", "conv1d.weight", "A_log", "dt_bias", "in_proj.weight"],
)
@torch.no_grad()
def test_another_model_is_refused_whatever_differs(part, tmp_path):
    model, ids = tiny("mamba2", tied=False), batch(4, 8)
    rounded(model, ids, resume=tmp_path / "kept")
    rounded(tiny("mamba2", tied=False), ids, resume=tmp_path / "kept")
    next(value for name, value in model.named_parameters() if part in name).flatten()[1] += 1e-3
    with pytest.raises(InvalidInputError, match="of a rounding with other model; to start over delete the folder"):
        rounded(model, ids, resume=tmp_path / "kept")


def test_another_version_is_refused(tmp_path, monkeypatch):
    model, ids = tiny("llama"), batch(4, 8)
    rounded(model, ids, resume=tmp_path / "kept")
    monkeypatch.setattr(walk, "__version__", "0.0.1")
    with pytest.raises(InvalidInputError, match="of a rounding with other version of klfast"):
        rounded(model, ids, resume=tmp_path / "kept")


def test_other_runs_and_folders_are_refused(tmp_path):
    model, ids = tiny("llama"), batch(24, 16)
    rounded(model, ids, resume=tmp_path / "kept")
    for what, options in (
        ("calibration", dict(model=model, ids=batch(24, 16, seed=9))),
        ("scale", dict(model=model, ids=ids, scale="mse")),
        ("model", dict(model=tiny("llama", seed=8), ids=ids)),
    ):
        with pytest.raises(InvalidInputError, match=f"of a rounding with other {what}"):
            rounded(**options, resume=tmp_path / "kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InvalidInputError, match="no rounding left there"):
        rounded(model, ids, resume=tmp_path / "mine")
    (tmp_path / "mine" / "settings.json").write_text("{}")
    forget(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(NotADirectoryError):
        rounded(model, ids, resume=tmp_path / "mine" / "thesis.tex")
    with pytest.raises(InvalidInputError, match="only rounding"):
        klfast.quantize_model(model, klfast.Plan({}, "uniform"), resume=tmp_path / "kept")


def test_a_kill_at_the_start_leaves_nothing_that_is_refused(tmp_path, monkeypatch):
    model, ids, write = tiny("llama"), batch(24, 16), signed_json.write

    def killed(data, path):
        write(data, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(signed_json, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        rounded(model, ids, resume=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    monkeypatch.setattr(signed_json, "write", write)
    same(rounded(model, ids, resume=tmp_path / "kept"), rounded(model, ids))


def test_a_folder_that_a_kill_leaves_half_removed_is_no_obstacle(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    Kept(path, {"scale": "absmax"}).write(0, ["a"], RoundedModel())

    def forget_half(kill):
        remove = os.unlink
        monkeypatch.setattr(os, "unlink", lambda at, **how: (remove(at, **how), at == "rounding.json" and kill()))
        forget(path)

    killed(forget_half)
    assert not path.exists() and any(tmp_path.iterdir())
    with lock.held(path):
        Kept(path, {"scale": "absmax"})
    assert list(tmp_path.iterdir()) == [path]


def test_one_process_at_a_time(tmp_path):
    model, ids, path = tiny("llama"), batch(24, 16), tmp_path / "kept"
    Kept(path, {})
    with lock.held(path):
        for act in (lambda: rounded(model, ids, resume=path), lambda: forget(path)):
            with pytest.raises(InvalidInputError, match=r"another process .* is working on .*kept"):
                act()
    assert path.is_dir()


def test_hidden_states_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = [Carry(torch.zeros(8), (torch.zeros(8),))]
    killed(lambda kill: (carries.Carries(states, room=0), kill()))
    [left] = tmp_path.iterdir()
    assert any(left.iterdir())
    mine = carries.Carries(states, room=0)
    [own] = tmp_path.iterdir()
    assert own != left
    del mine
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line():
    states = carries.Carries([Carry(torch.zeros(8), (torch.zeros(8),))], room=0)
    said = r"File too large \(TMPDIR names another folder\): '.*0\.safetensors'"
    with files_of_at_most(10**6), pytest.raises(OSError, match=said):
        states[0] = Carry(torch.zeros(10**6))


def test_hidden_states_that_share_memory():
    whole = torch.arange(12.0).view(2, 6)
    (found,) = carries.Carries([Carry(whole, (whole, whole.T))], room=0)
    assert all(map(torch.equal, (found.hidden, *found.extra), (whole, whole, whole.T)))


def test_hidden_states_on_disk_make_no_difference(monkeypatch):
    model, ids = tiny("zamba2", tied=True), batch(24, 16)
    monkeypatch.setattr(walk, "MOST_TOKENS", 6 * 16)
    truth = rounded(model, ids)
    folders, make = [], temporaries.scratch_folder

    def noted(name):
        folders.append(make(name))
        return folders[-1]

    monkeypatch.setattr(carries, "available_memory", lambda: 0)
    monkeypatch.setattr(temporaries, "scratch_folder", noted)
    same(rounded(model, ids), truth)
    assert len(folders) == 2
    gc.collect()
    assert not any(folder.exists() for folder in folders)
