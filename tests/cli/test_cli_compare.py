"""klfast compare."""

import json

import numpy as np
import pytest
import tiny_folder
from command_line import FEW, TEXT, fails, klf
from tokenizer_kinds import tokenizer

import klfast
from klfast.checkpoint import by_name


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with a model, the same in INT4, and a text."""
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    klf("quantize", folder / "model", "--uniform", "int4", "--out", folder / "small")
    return folder


def test_card_as_text_json_and_file(work, tmp_path):
    command = ("compare", work / "model", work / "small", "--text", work / "text.txt", *FEW)
    shown = klf(*command).stdout
    assert "Mean KLD" in shown and "KL by position" in shown and "1 to 64" in shown
    data = json.loads(klf(*command, "--json", "--out", tmp_path / "card.json").stdout)
    assert data["tokens"] == 4 * 63 and data["figures"]["Mean KLD"]["low"] > 0
    card = klfast.Comparison.from_json(tmp_path / "card.json")
    assert card.provenance["base"] == str(work / "model") and card.provenance["length"] == 64
    assert card.figures["Mean KLD"].value == data["figures"]["Mean KLD"]["value"]
    teacher = json.loads(
        klf("eval", work / "small", "--teacher", work / "model", "--text", work / "text.txt", *FEW, "--json").stdout
    )
    assert teacher["kl"] == pytest.approx(data["figures"]["Mean KLD"]["value"], rel=1e-5)
    assert "exists" in fails(*command, "--out", tmp_path / "card.json")
    assert f"The figures are in {tmp_path / 'again.json'}." in klf(*command, "--out", tmp_path / "again.json").stdout


def test_a_card_records_whose_it_is(work, tmp_path):
    """A report shows a plan's measured KL only if the card is of the plan's own model."""
    klf("sweep", work / "model", "--calibration", work / "text.txt", *FEW, "--out", tmp_path / "sens.json")
    plans = [tmp_path / "plan.json", tmp_path / "other.json"]
    for path, bits in zip(plans, (6, 5), strict=True):
        klf("plan", tmp_path / "sens.json", "--mean-bits", bits, "--out", path)
    klf("quantize", work / "model", plans[0], "--out", tmp_path / "small")
    pair = (work / "model", tmp_path / "small", "--text", work / "text.txt", *FEW)
    klf("compare", *pair, "--out", tmp_path / "card.json")
    for path, is_measured in zip(plans, (True, False), strict=True):
        klf("report", tmp_path / "sens.json", path, tmp_path / "card.json", "--html", tmp_path / "page.html", "--force")
        page = (tmp_path / "page.html").read_text()
        assert ("the plan, measured" in page, "KL measured" in page) == (is_measured, is_measured)


def test_one_window_says_that_it_has_no_intervals(work):
    command = ("compare", work / "small", work / "model", "--text", work / "text.txt", "--windows", 1, "--length", 64)
    assert "Intervals need several windows" in klf(*command).stdout


def test_one_of_both_has_a_tokenizer(work, tmp_path):
    bare = tmp_path / "bare"
    tiny_folder.save_model(bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    for pair in ((work / "model", bare), (bare, work / "model")):
        shown = json.loads(klf("compare", *pair, "--text", work / "text.txt", *FEW, "--json").stdout)
        assert shown["tokens"] == 4 * 63 and shown["figures"]["Maximum KLD"]["value"] < 1e-6
    assert "no tokenizer" in fails("compare", bare, bare, "--text", work / "text.txt", *FEW)


def test_other_tokenizers_and_vocabularies_are_refused(work, tmp_path):
    tiny_folder.save_model(tmp_path / "other")
    tokenizer("byte-level BPE").save_pretrained(tmp_path / "other")
    arguments = ("compare", work / "model", tmp_path / "other", "--text", work / "text.txt", *FEW)
    warning, line = klf(*arguments, code=1).stderr.splitlines()
    assert "the tokenizer has 420 tokens, the model 257 embeddings" in warning
    assert "have different tokenizers: token 0 is" in line
    tiny_folder.save_model(tmp_path / "larger", vocab_size=300)
    assert "one vocabulary" in fails("compare", work / "model", tmp_path / "larger", "--text", work / "text.txt", *FEW)
    np.save(tmp_path / "ids.npy", np.arange(200) % 250)  # which needs no tokenizer
    klf("compare", work / "model", tmp_path / "other", "--text", tmp_path / "ids.npy", *FEW)


def test_a_card_is_json(tmp_path, monkeypatch):
    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    line = fails("compare", "mamba2", "mamba2", "--out", tmp_path / "card.md")
    assert f"a KL card is written as .json, not '.md'; rename {tmp_path / 'card.md'}" in line
