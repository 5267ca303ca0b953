"""klfast study on the command line: what an earlier run left, and what is refused before the work."""

import pytest
import tiny_folder
from command_line import TEXT, fails, klf

import klfast
from klfast.checkpoint import by_name
from klfast.core import lock


def test_no_resume_discards_what_is_left(tmp_path):
    tiny_folder.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out" / "study.json"
    out.parent.mkdir()
    text = ("--calibration", tmp_path / "text.txt", "--windows", 2, "--length", 16)
    command = ("study", tmp_path / "model", *text, "--layers", "lm_head", "--spec", "int4", "--out", out)
    left = [out.with_name(f"study.json.partial.{half}") for half in (1, 4)]
    for path in left:
        path.write_text("{")
    assert "start over delete it (--no-resume)" in fails(*command)
    with lock.held(left[1]):
        assert "another process" in fails(*command, "--no-resume")
    assert all(path.exists() for path in left)
    klf(*command, "--no-resume")
    assert [path.name for path in out.parent.iterdir()] == ["study.json"]


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--report", "tables.txt", "a report is written as .md or .json, not '.txt'; rename {path}"),
        ("--out", "study.txt", "a study is written as .json, not '.txt'; rename {path}"),
    ],
)
def test_other_suffixes_are_refused_before_the_work(tmp_path, monkeypatch, option, name, message):
    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / name
    assert message.format(path=path) in fails("study", "mamba2", option, path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", [(), ("--no-resume",)])
def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, flag):
    tiny_folder.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "study.json"
    text = ("--calibration", tmp_path / "text.txt", "--windows", 2, "--length", 16)
    command = ("study", tmp_path / "model", *text, "--layers", "lm_head", "--spec", "int4")
    to_json = klfast.Sensitivities.to_json

    def interrupted(self, path=None, **rest):
        to_json(self, path, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(klfast.Sensitivities, "to_json", interrupted)
    again = "the same command without --no-resume" if flag else "the same command"
    message = f"klfast: stopped; {out}.partial.* keeps what is done, and {again} continues from there.\n"
    assert klf(*command, *flag, "--out", out, code=130).stderr == message
    assert out.with_name("study.json.partial.1").exists()
