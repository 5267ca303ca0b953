"""klfast lm-eval, with the package lm-eval and tasks made of local files."""

import json
import sys

import pytest
import tiny_folder
import torch
from command_line import TEXT, fails, klf

import klfast

pytest.importorskip("lm_eval", reason="pip install 'klfast[lm-eval]'")
datasets = pytest.importorskip("datasets")

CHOICES = [" blue", " green as grass", " a dog"]
QUESTIONS = [{"question": f"Say {i}, what is it?", "choices": CHOICES, "answer": i % 3} for i in range(7)]
LETTERS = [{"text": TEXT[i : i + 60]} for i in range(0, 240, 60)]
COLOURS = """
task: colours
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.json}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PERPLEXITY = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.json}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
CONTINUED = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.json}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: " blue"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with a model, the same in INT4, a text and tasks."""
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    words = klfast.load_tokenizer(str(folder / "model"))
    words.add_special_tokens({"eos_token": "<end>"})  # 256
    words.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    klf("quantize", folder / "model", "--uniform", "int4", "--out", folder / "small")
    (folder / "tasks").mkdir()
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    (folder / "letters.json").write_text(json.dumps(LETTERS))
    for name, text in (("colours", COLOURS), ("letters", PERPLEXITY), ("continued", CONTINUED)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(folder=folder))
    group = "group: both\ntask: [colours, continued]\naggregate_metric_list: [{metric: acc}]\n"
    (folder / "tasks" / "both.yaml").write_text(group)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Look up no data on the network, and leave out lm-eval's description of the machine, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))


def log_probabilities(folder, ids):
    """Return the log probability of each of ids[1:], by the model's own forward in float64."""
    model = klfast.load_model(folder).double()
    klfast.unaccelerate(model)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_scores_are_those_of_the_model_and_stand_beside_kl(work):
    command = (
        "lm-eval",
        work / "model",
        work / "small",
        "--include-path",
        work / "tasks",
        "--tasks",
        "colours,letters",
    )
    compared = ("--teacher", work / "model", "--text", work / "text.txt", "--windows", 4, "--length", 64)
    full, small = json.loads(klf(*command, *compared, "--json").stdout)["models"]
    words = klfast.load_tokenizer(str(work / "model"))
    right = 0
    for one in QUESTIONS:
        context, sums = words.encode(one["question"]), []
        for choice in CHOICES:
            ids = context + words.encode(choice)
            sums.append(log_probabilities(str(work / "model"), ids)[len(context) - 1 :].sum())
        right += int(torch.stack(sums).argmax()) == one["answer"]
    assert full["results"]["colours"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    ids = [[words.eos_token_id, *words.encode(one["text"])] for one in LETTERS]
    nats = [log_probabilities(str(work / "model"), row).sum() for row in ids]
    bits = -float(sum(nats)) / sum(len(one["text"]) for one in LETTERS) / 0.6931471805599453
    assert full["results"]["letters"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert small["results"]["letters"]["bits_per_byte,none"] != pytest.approx(bits, rel=1e-5)
    own = json.loads(klf("eval", work / "small", *compared, "--json").stdout)
    assert small["kl"] == own["kl"] > full["kl"] and small["bytes"] < full["bytes"]


def test_table_has_a_row_a_model_and_a_column_a_metric(work):
    shown = klf(
        "lm-eval", work / "small", work / "model", "--include-path", work / "tasks", "--tasks", "own_tag", "--limit", 3
    ).stdout
    assert "colours acc" in shown and "colours acc_norm" in shown and "KL" not in shown and " ± " in shown
    assert sum("work" in line for line in shown.splitlines()) >= 2


def test_group_and_generated_answers(work):
    command = ("lm-eval", work / "small", "--include-path", work / "tasks", "--limit", 2, "--num-fewshot", 0)
    [row] = json.loads(klf(*command, "--tasks", "both", "--json").stdout)["models"]
    assert row["group_subtasks"] == {"both": ["colours", "continued"]}
    assert row["results"]["both"]["acc,none"] == row["results"]["colours"]["acc,none"]
    assert row["results"]["continued"]["exact_match,none"] in (0, 0.5, 1)
    shown = klf(*command, "--tasks", "both").stdout
    assert "both acc" in shown and "colours acc" not in shown


def test_what_is_wrong_is_said_in_one_line_before_the_model_is_loaded(work, tmp_path, monkeypatch):
    command = ("lm-eval", work / "no_model", "--include-path", tmp_path, "--tasks")
    (tmp_path / "hub.yaml").write_text(COLOURS.format(folder=work).replace("path: json", "path: someone/colours"))
    (tmp_path / "lost.yaml").write_text(COLOURS.format(folder=tmp_path).replace("task: colours", "task: lost"))
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: nothing_known\n")
    assert "cannot load the data of task 'colours'" in (line := fails(*command, "colours")) and "network once" in line
    assert "name at least one task" in fails(*command, ",")
    assert "cannot load the data of task 'lost'" in fails(*command, "lost")
    assert "cannot load the task 'bad'" in fails(*command, "bad")
    monkeypatch.setattr("lm_eval.tasks.manager.Path", lambda _: tmp_path)  # in place of the package's own tasks
    assert "no task 'color' (did you mean colours?)" in fails(*command, "color")
    assert "is not a folder of tasks" in fails("lm-eval", work, "--include-path", tmp_path / "no", "--tasks", "colours")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'klfast[lm-eval]'" in fails(*command, "colours")


def test_a_tokenizer_without_an_end_is_refused(work, tmp_path):
    tiny_folder.save_model(tmp_path / "model")
    command = ("lm-eval", tmp_path / "model", "--include-path", work / "tasks", "--tasks", "colours")
    assert "a token that ends a text" in fails(*command)
