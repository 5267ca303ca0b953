"""klfast sweep and eval on the command line: choice of layers, amount of text, and messages."""

import json

import pytest
import tiny_folder
from command_line import TEXT, klf

import klfast


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_layers_and_exclude(work, tmp_path):
    def swept(*choice):
        out = tmp_path / "s.json"
        text = ("--calibration", work / "text.txt", "--windows", 1, "--length", 16)
        klf("sweep", work / "model", *text, "--spec", "int4", *choice, "--out", out, "--force")
        return {name for name, _ in klfast.Sensitivities.from_json(out).measurements}

    everything = swept()
    assert swept("--exclude", "lm_head") == everything - {"lm_head"}
    assert swept("--layers", "in_proj", "--layers", "lm_head") == {
        name for name in everything if name.endswith(("in_proj", "lm_head"))
    }
    assert swept("--layers", "layers.0.*", "--exclude", "re:.*in_proj") == {
        name for name in everything if ".layers.0." in name and not name.endswith("in_proj")
    }
    command = ("sweep", work / "model", "--layers", "lm_heat", "--windows", 1, "--out", tmp_path / "none.json")
    wrong = klf(*command, code=1).stderr
    assert "no linear layer matches 'lm_heat'; did you mean 'lm_head'?" in wrong and wrong.count("\n") == 1


def test_all_windows(work, tmp_path):
    def tokens(*windows):
        command = ("eval", work / "model", "--text", work / "text.txt", "--length", 16)
        return json.loads(klf(*command, *windows, "--json").stdout)["tokens"]

    everything = tokens()
    assert tokens("--windows", "all") == tokens("--windows", 1_000_000) == everything > 32 * 15
    assert tokens("--windows", 2) == 30
    text = ("--calibration", work / "text.txt", "--windows", "all", "--length", 16)
    found = klf("sweep", work / "model", *text, "--layers", "lm_head", "--out", tmp_path / "s.json", "--json")
    assert json.loads(found.stdout)["tokens"] == everything, "predicted ones, as eval's"


def test_an_adaptive_sweep_says_on_how_many_tokens(work, tmp_path):
    text = ("--calibration", work / "text.txt", "--windows", 32, "--length", 16)
    command = ("sweep", work / "model", *text, "--budget", "adaptive", "--out", tmp_path / "s.json", "--force")
    said = klf(*command).stdout
    each = [one.tokens for one in klfast.Sensitivities.from_json(tmp_path / "s.json").measurements.values()]
    assert min(each) < max(each)
    span = f"{min(each)} to {max(each)} tokens"
    assert f"{len(each)} measurements on {span} are in" in said and f"Not measured in full: each on {span}; " in said
    data = json.loads(klf(*command, "--json").stdout)
    assert (data["least_tokens"], data["tokens"]) == (min(each), max(each)) and span in data["measured"]
    assert f"each on {span}; " in klf("report", tmp_path / "s.json").stdout.replace("\n", " ")


@pytest.mark.parametrize("wrong", ["0", "-1", "some", "1.5"])
def test_wrong_windows(work, wrong):
    assert "positive integer nor all" in klf("eval", work / "model", "--windows", wrong, code=2).stderr


def test_ctrl_c_says_how_to_continue(work, tmp_path, monkeypatch):
    import signal

    from klfast.models.block_chain import Chain

    out, step, made = tmp_path / "s.json", Chain.step, []
    text = ("--calibration", work / "text.txt", "--windows", 2, "--length", 32)
    arguments = ("sweep", work / "model", *text, "--out", out)

    def interrupting(*args):
        made.append(args)
        if len(made) == 15:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Chain, "step", interrupting)
    stopped = klf(*arguments, code=130)
    message = f"stopped; {out}.partial keeps what is done, and the same command continues from there."
    assert (stopped.stdout, stopped.stderr) == ("", f"klfast: {message}\n")
    monkeypatch.setattr(Chain, "step", step)
    assert json.loads(klf(*arguments, "--json").stdout)["resumed"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]

    def at_once(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(klfast, "sweep", at_once)
    assert klf(*arguments, "--force", code=130).stderr == "klfast: stopped; nothing is kept yet.\n"
