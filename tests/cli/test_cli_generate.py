"""klfast generate."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny_folder
import torch
from command_line import fails, klf, silent
from tokenizer_kinds import tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from writing_model import writing_model

from klfast.checkpoint import by_name
from klfast.cli import texts

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and m.content == 'bad' %}{{ raise_exception('no such system') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    "{% if enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Create folders with a model that writes letters: "plain", and "chat" with a template."""
    folder, words = tmp_path_factory.mktemp("models"), tokenizer("byte-level BPE")
    model = writing_model(words)
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
        if template:
            own = AutoTokenizer.from_pretrained(folder / name)
            own.chat_template = template
            own.save_pretrained(folder / name)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected(folder, text, new=12, special=True, **options):
    """Return the token ids that transformers' generate adds."""
    model, words = loaded(folder)
    ids = words(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    options = {"tokenizer": words, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, do_sample=False, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


def said(*arguments):
    return json.loads(klf("generate", *arguments, "--json").stdout)


def test_shown_text_is_the_decoded_whole(folders):
    found = said(folders / "plain", "The sea 🦜", "--max-new-tokens", 40)
    words = loaded(folders / "plain")[1]
    assert found["token_ids"] == expected(folders / "plain", "The sea 🦜", 40)
    whole = words.decode(words("The sea 🦜")["input_ids"] + found["token_ids"], skip_special_tokens=True)
    assert whole == found["prompt"] + found["text"]
    assert klf("generate", folders / "plain", "The sea 🦜", "--max-new-tokens", 40).stdout == whole + "\n"


def test_chat_uses_the_template_of_the_model(folders):
    prompt = "<s>system: Be brief.\n<s>user: Hello\nassistant:"
    found = said(folders / "chat", "Hello", "--chat", "--system", "Be brief.", "--max-new-tokens", 12)
    assert found["token_ids"] == expected(folders / "chat", prompt, special=False) and found["prompt"] == "Hello"
    shown = klf("generate", folders / "chat", "Hello", "--chat", "--system", "Be brief.", "--max-new-tokens", 12)
    assert shown.stdout == found["text"] + "\n" and silent(shown.stderr)  # only the answer


def test_variables_of_the_chat_template(folders):
    command = (folders / "chat", "Hello", "--chat", "--max-new-tokens", 6)
    for given, shown in ((False, ""), (True, "<think>")):
        found = said(*command, "--chat-template-kwargs", json.dumps({"enable_thinking": given, "unknown": 1}))
        prompt = f"<s>user: Hello\nassistant:{shown}"
        assert found["token_ids"] == expected(folders / "chat", prompt, 6, special=False)


def test_impossible_chats(folders):
    assert "plain has no chat template; leave --chat out" in fails("generate", folders / "plain", "Hello", "--chat")
    assert re.search(
        "chat template of .* refuses these messages: .*no such system",
        fails("generate", folders / "chat", "Hello", "--chat", "--system", "bad"),
    )
    assert "--chat-template-kwargs goes with --chat" in fails(
        "generate", folders / "chat", "Hello", "--chat-template-kwargs", "{}", code=2
    )
    for text in ("", "[]", "{", "3", "{'a': 1}", "[" * 10**5):
        found = fails("generate", folders / "chat", "Hello", "--chat", "--chat-template-kwargs", text, code=2)
        assert "takes an object of JSON" in found
    assert "cannot set tokenize, which klfast sets itself" in fails(
        "generate", folders / "chat", "Hello", "--chat", "--chat-template-kwargs", '{"tokenize": true}'
    )
    assert "--system goes with --chat" in fails("generate", folders / "chat", "Hello", "--system", "x", code=2)
    hint, speed = klf("generate", folders / "chat", "Hello", "--max-new-tokens", 2).stderr.splitlines(keepends=True)
    assert "chat template" in hint and "--chat" in hint and silent(speed)
    assert silent(klf("generate", folders / "plain", "Hello", "--max-new-tokens", 2).stderr)


@pytest.mark.parametrize("options", [(), ("--repetition-penalty", 1.5)])
def test_stop_texts(folders, options):
    penalty = {"repetition_penalty": float(options[1])} if options else {}
    free = expected(folders / "plain", "The sea", 30, **penalty)
    words = loaded(folders / "plain")[1]
    stops = [words.decode(free[9:11])[1:], words.decode(free[12:14])]
    stop = [part for text in stops for part in ("--stop", text)]
    found = said(folders / "plain", "The sea", "--max-new-tokens", 30, *stop, *options)
    assert found["token_ids"] == expected(folders / "plain", "The sea", 30, stop_strings=stops, **penalty)
    assert len(found["token_ids"]) < 30 and any(text in found["text"] for text in stops)


def test_end_tokens_of_generation_config_and_tokenizer_count(folders, tmp_path):
    free = expected(folders / "plain", "The sea", 30)
    ends = {free[6], free[9]}
    GenerationConfig(eos_token_id=sorted(ends), max_new_tokens=25).save_pretrained(tmp_path)
    for file in (folders / "plain").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    first = next(i for i, token in enumerate(free) if token in ends)
    assert said(tmp_path, "The sea")["token_ids"] == free[: first + 1]
    GenerationConfig(max_new_tokens=25).save_pretrained(tmp_path)
    assert len(said(tmp_path, "The sea")["token_ids"]) == 25
    assert len(said(folders / "plain", "The sea")["token_ids"]) == 100  # without a generation_config


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_prompts_of_a_file(folders, tmp_path, batch):
    prompts = ["The sea was calm", "Ü", "He's seen 12 birds and three boats", "A"]
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff" + "\r\n".join([*prompts[:2], "", *prompts[2:], ""]), encoding="utf-8")
    command = (folders / "plain", "--prompts", file, "--batch-size", batch, "--max-new-tokens", 8)
    results = said(*command)["results"]
    assert [one["prompt"] for one in results] == prompts
    assert [one["token_ids"] for one in results] == [expected(folders / "plain", prompt, 8) for prompt in prompts]
    alone = [said(folders / "plain", prompt, "--max-new-tokens", 8)["text"] for prompt in prompts]
    assert [one["text"] for one in results] == alone
    shown = klf("generate", *command).stdout
    assert shown == "".join(f"--- {i}\n{one['prompt']}{one['text']}\n" for i, one in enumerate(results, 1))


def test_rows_of_a_batch_end_independently(folders, tmp_path):
    prompts = ["The sea was calm", "Birds", "He's seen 12 birds and three boats"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = loaded(folders / "plain")[1]
    free = expected(folders / "plain", prompts[0], 12)
    stop = words.decode(free[5:7])
    command = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12, "--stop", stop)
    found = said(folders / "plain", *command)["results"]
    assert [one["token_ids"] for one in found] == [
        expected(folders / "plain", prompt, 12, stop_strings=[stop]) for prompt in prompts
    ]
    assert len({len(one["token_ids"]) for one in found}) > 1


def test_padding_is_left_out_where_a_stop_string_began_in_the_prompt(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("The sea was calm\nBirds")
    words = loaded(folders / "plain")[1]
    command = (folders / "plain", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 9)
    free = [one["token_ids"] for one in said(*command)["results"]]
    found = said(*command, "--stop", "calm" + words.decode(free[0][:1]))["results"]
    assert [one["token_ids"] for one in found] == [free[0][:1], free[1]]
    assert [one["text"] for one in found] == [words.decode(one["token_ids"]) for one in found]


def test_padding_is_left_out_after_a_special_token_that_stops(folders, tmp_path):
    model, words = loaded(folders / "plain")
    (tmp_path / "prompts.txt").write_text("The sea was calm\nBirds")
    free = expected(folders / "plain", "The sea was calm", 9)
    head = model.lm_head.weight
    with torch.no_grad():  # "<s>" takes the place of the third token
        head[words.bos_token_id], head[free[2]] = head[free[2]].clone(), 0
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    command = (tmp_path, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 9)
    with_specials = [one["token_ids"] for one in said(*command)["results"]]
    found = said(*command, "--stop", "<s>")["results"]
    cut = [row[: row.index(words.bos_token_id) + 1] if words.bos_token_id in row else row for row in with_specials]
    assert [one["token_ids"] for one in found] == cut and len(set(map(len, cut))) > 1


def test_several_texts_of_a_prompt(folders):
    limits = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--max-new-tokens", 6)
    command = (folders / "plain", "The sea", "--num-return-sequences", 3, *limits)
    found = said(*command)["results"]
    assert len(found) == 3 and len({one["text"] for one in found}) > 1
    assert {one["prompt"] for one in found} == {"The sea"}
    assert found == said(*command)["results"] != said(*command, "--seed", 2)["results"]
    assert "needs sampling" in fails("generate", folders / "plain", "The sea", "--num-return-sequences", 3)


def test_speed_is_shown_apart_from_the_text(folders):
    command = (folders / "plain", "The sea", "--max-new-tokens", 5)
    tokens = len(loaded(folders / "plain")[1]("The sea")["input_ids"])
    shown = klf("generate", *command).stderr
    number = r"\d+\.\d+"
    counts = rf"{tokens} prompt tokens at {number}/s, 5 new tokens at {number}/s"
    assert re.fullmatch(rf"klfast: first token after ({number} s|{number} ms|\d+ ms), {counts}\n", shown)
    speed = said(*command)["speed"]
    assert (speed["prompt_tokens"], speed["new_tokens"]) == (tokens, 5)
    assert speed["prompt_tokens_per_second"] == pytest.approx(tokens / speed["prompt_seconds"])


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.00042, "0.4 ms"), (0.0042, "4.2 ms"), (0.0421, "42 ms"), (0.42, "420 ms"), (4.2, "4.20 s")],
)
def test_times_of_first_tokens(seconds, shown):
    assert texts._duration(seconds) == shown


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_idle_threads_spin_briefly_unless_told_otherwise(monkeypatch, own):
    """Otherwise they hold cores against each other beside busy programs."""
    monkeypatch.setattr(os, "environ", {**own})
    fails("generate", "no-such-folder", "a")
    assert os.environ == (own or {"GOMP_SPINCOUNT": "10000"})


def test_without_tokenizer(tmp_path):
    folder = tiny_folder.save_model(tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    copy = "copy the model's tokenizer files into it"
    for command in (("generate", folder, "x"), ("serve", folder, "--port", 0)):
        assert fails(*command).endswith(f"m has no tokenizer; {copy}")
    found = fails("eval", folder, "--text", "my.txt")
    assert found.endswith(f"m has no tokenizer for my.txt; {copy} or give token ids in a file")


def test_logprobs_beside_the_tokens(folders, tmp_path):
    model, words = loaded(folders / "plain")
    command = (folders / "plain", "The sea", "--max-new-tokens", 4, "--logprobs", 2)
    found = said(*command)
    ids = words("The sea")["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([ids + found["token_ids"]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    for one, token, row in zip(found["logprobs"], found["token_ids"], logs, strict=True):
        best = row.topk(2)
        assert one["token"] == words.decode([token]) and one["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert [each["token"] for each in one["top"]] == [words.decode([i]) for i in best.indices]
        assert [each["logprob"] for each in one["top"]] == pytest.approx(best.values.tolist(), abs=1e-3)
    text, *lines = klf("generate", *command).stdout.splitlines()
    assert text == "The sea" + found["text"] and len(lines) == 4
    assert all(repr(one["token"]) in line for one, line in zip(found["logprobs"], lines, strict=True))
    (tmp_path / "prompts.txt").write_text("The sea\nA boat\n")
    several = said(folders / "plain", "--prompts", tmp_path / "prompts.txt", *command[2:])["results"]
    assert [one["token"] for one in several[0]["logprobs"]] == [one["token"] for one in found["logprobs"]]
    assert len(several[1]["logprobs"]) == 4


def test_beams(folders):
    command = (folders / "plain", "The sea", "--max-new-tokens", 8, "--num-beams", 3, "--length-penalty", 0.5)
    found = said(*command)
    assert found["token_ids"] == expected(folders / "plain", "The sea", 8, num_beams=3, length_penalty=0.5)
    assert klf("generate", *command).stdout == "The sea" + found["text"] + "\n"
    assert len(said(*command, "--num-return-sequences", 3)["results"]) == 3


@pytest.mark.parametrize("draft", [True, False])
def test_speculative_decoding(folders, draft):
    options = ("--draft-model", folders / "chat") if draft else ("--num-draft-tokens", 3)
    found = said(folders / "plain", "The sea, the sea, the sea", "--max-new-tokens", 30, *options)
    assert found["token_ids"] == expected(folders / "plain", "The sea, the sea, the sea", 30)
    assert found["speed"]["draft_tokens"] >= found["speed"]["accepted_tokens"] >= (23 if draft else 0)


@pytest.mark.filterwarnings("ignore:generate .* runs row by row")
def test_models_that_read_padding_as_text_get_no_padding(folders, tmp_path, monkeypatch):
    model = by_name.load_model(folders / "plain")
    widths = []
    forward = model.forward

    def without_mask(input_ids, past_key_values=None, use_cache=True, position_ids=None, logits_to_keep=0):
        widths.append(tuple(input_ids.shape))
        return forward(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, position_ids=position_ids
        )

    model.forward = without_mask
    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: model)
    (tmp_path / "prompts.txt").write_text("A\nThe sea was calm\n")
    found = said(folders / "plain", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 4)["results"]
    assert [one["token_ids"] for one in found] == [
        expected(folders / "plain", prompt, 4) for prompt in ("A", "The sea was calm")
    ]
    assert {rows for rows, _ in widths} == {1}


def test_impossible_prompts(folders, tmp_path):
    plain = folders / "plain"
    (tmp_path / "latin").write_bytes("Ü".encode("latin-1"))
    (tmp_path / "empty").write_text("\n \n")
    assert "latin is not valid UTF-8 (byte 0)" in fails("generate", plain, "--prompts", tmp_path / "latin")
    assert "empty holds no prompts" in fails("generate", plain, "--prompts", tmp_path / "empty")
    assert "none" in fails("generate", plain, "--prompts", tmp_path / "none")
    assert "prompt is not valid UTF-8 (letter 2)" in fails("generate", plain, "a\udcff")
    assert "exactly one of PROMPT, --prompts" in fails("generate", plain, code=2)
    assert "exactly one of PROMPT, --prompts" in fails("generate", plain, "a", "--prompts", tmp_path / "empty", code=2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--min-p", "nan", "min-p must be between 0 and 1"),
        ("--min-p", "-0.1", "min-p"),
        ("--repetition-penalty", "0", "repetition-penalty must be"),
        ("--repetition-penalty", "inf", "repetition-penalty"),
        ("--presence-penalty", "2.1", "presence-penalty must be between -2 and 2"),
        ("--frequency-penalty", "nan", "frequency-penalty"),
        ("--length-penalty", "11", "length-penalty"),
        ("--num-beams", "0", "num-beams"),
        ("--num-draft-tokens", "16", "num-draft-tokens"),
        ("--logprobs", "-1", "logprobs"),
        ("--seed", "-1", "seed"),
        ("--seed", str(2**64), "seed"),
        ("--num-return-sequences", "0", "num-return-sequences"),
        ("--batch-size", "0", "batch-size"),
        ("--temperature", "nan", "temperature"),
    ],
)
def test_wrong_numbers_are_wrong_usage(option, value, message):
    assert message in fails("generate", "mamba2", "Once", option, value, code=2)


def test_extreme_numbers(folders):
    likeliest = said(folders / "plain", "The sea", "--max-new-tokens", 8)["token_ids"]
    for options in (("--temperature", "1e-40"), ("--temperature", 1, "--top-p", "1e-300")):
        assert said(folders / "plain", "The sea", "--max-new-tokens", 8, *options)["token_ids"] == likeliest
    assert "64 bits" in fails("generate", folders / "plain", "The sea", "--max-new-tokens", 10**30)


@pytest.mark.slow
def test_interrupt_keeps_the_generated_text(folders, tmp_path):
    prompt = [str(folders / "plain"), "The sea", "--max-new-tokens", "1000000"]
    command = [sys.executable, "-m", "klfast", "generate", *prompt]
    shown = tmp_path / "shown"
    with shown.open("wb") as file:
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)
        try:
            begin = time.monotonic()
            while time.monotonic() < begin + 90 and shown.stat().st_size < 200:
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130 and silent(errors.decode())
    text = shown.read_text(encoding="utf-8")
    assert text.startswith("The sea") and text.endswith("\n") and len(text) >= 200


def test_interrupt_in_this_process(folders, monkeypatch):
    made = []

    def forward(*arguments, **options):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(0)
        return plain(*arguments, **options)

    model = by_name.load_model(folders / "plain")
    plain, model.forward = model.forward, forward
    forward.__wrapped__ = plain  # inspect then sees its arguments
    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: model)
    result = klf("generate", folders / "plain", "The sea", "--max-new-tokens", 12, "--json", code=130)
    assert json.loads(result.stdout)["token_ids"] == expected(folders / "plain", "The sea", 5)


def test_generation_without_generation_config(tmp_path):
    folder = tiny_folder.save_model(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    assert len(said(folder, "Once", "--max-new-tokens", 3)["token_ids"]) <= 3
