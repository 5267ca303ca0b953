"""klfast sweep and eval on the command line: which layers, how much text, and what they say meanwhile."""

import json

import pytest
import tiny_folder
from typer.testing import CliRunner

import klfast
from klfast.cli import app

TEXT = "A small text, said over and over, is enough to see how the commands hang together. " * 12


def klf(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_layers_and_exclude(work, tmp_path):
    def swept(*choice):
        out = tmp_path / "s.json"
        klf(
            "sweep",
            work / "model",
            "--calibration",
            work / "text.txt",
            "--windows",
            1,
            "--length",
            16,
            "--spec",
            "int4",
            *choice,
            "--out",
            out,
            "--force",
        )
        return {name for name, _ in klfast.Sensitivities.from_json(out).measurements}

    everything = swept()
    assert swept("--exclude", "lm_head") == everything - {"lm_head"}
    assert swept("--layers", "in_proj", "--layers", "lm_head") == {
        name for name in everything if name.endswith(("in_proj", "lm_head"))
    }
    assert swept("--layers", "layers.0.*", "--exclude", "re:.*in_proj") == {
        name for name in everything if ".layers.0." in name and not name.endswith("in_proj")
    }
    wrong = klf(
        "sweep", work / "model", "--layers", "lm_heat", "--windows", 1, "--out", tmp_path / "none.json", code=1
    ).stderr
    assert "no linear layer matches 'lm_heat'; did you mean 'lm_head'?" in wrong and wrong.count("\n") == 1


def test_all_windows(work, tmp_path):
    def tokens(*windows):
        return json.loads(
            klf("eval", work / "model", "--text", work / "text.txt", "--length", 16, *windows, "--json").stdout
        )["tokens"]

    everything = tokens()
    assert (
        tokens("--windows", "all") == tokens("--windows", 1_000_000) == everything > 32 * 15
        and tokens("--windows", 2) == 30
    )
    found = klf(
        "sweep",
        work / "model",
        "--calibration",
        work / "text.txt",
        "--windows",
        "all",
        "--length",
        16,
        "--layers",
        "lm_head",
        "--out",
        tmp_path / "s.json",
        "--json",
    )
    assert json.loads(found.stdout)["tokens"] == everything // 15 * 16
    for wrong in ("0", "-1", "some", "1.5"):
        assert "from 1 on nor all" in klf("eval", work / "model", "--windows", wrong, code=2).stderr


def test_ctrl_c_says_how_to_go_on(work, tmp_path, monkeypatch):
    import signal

    from klfast.models.block_chain import Chain

    out, step, made = tmp_path / "s.json", Chain.step, []
    arguments = (
        "sweep",
        work / "model",
        "--calibration",
        work / "text.txt",
        "--windows",
        2,
        "--length",
        32,
        "--out",
        out,
    )

    def interrupting(*args):
        made.append(args)
        if len(made) == 15:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Chain, "step", interrupting)
    stopped = klf(*arguments, code=130)
    assert (
        stopped.stdout == ""
        and stopped.stderr
        == f"klfast: stopped; {out}.partial keeps what was measured, and the same command goes on from there.\n"
    )
    monkeypatch.setattr(Chain, "step", step)
    assert json.loads(klf(*arguments, "--json").stdout)["resumed"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]

    def at_once(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(klfast, "sweep", at_once)
    assert klf(*arguments, "--force", code=130).stderr == "klfast: stopped; nothing was measured yet.\n"
