"""The HTTP interface, asked by the real openai client."""

import json

import httpx2
import openai
import pytest
import served
import torch
from running_server import NAME

GREEDY = dict(model=NAME, temperature=0)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CHAT_TEXT = "<s>system: Be brief.\n<s>user: Hello\n<s>assistant: "


def expected(text, new, special=True):
    """Return the prompt's tokens, the answer's, and its text."""
    prompt = served.words()(text, add_special_tokens=special)["input_ids"]
    made = served.alone(prompt, new)
    ends = [served.words().eos_token_id]
    return prompt, made, served.text_after(prompt, [token for token in made if token not in ends])


def logprobs(prompt, made):
    """Return the natural logarithms of the probabilities of each next token, float64 [N, V]."""
    with torch.inference_mode():
        logits = served.model()(torch.tensor([prompt + made[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1)


def test_completion(client):
    prompt, made, text = expected("The sea", 20)
    found = client.completions.create(prompt="The sea", max_tokens=20, **GREEDY)
    assert found.object == "text_completion" and found.model == NAME and found.id.startswith("cmpl-")
    [choice] = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs, choice.index) == (text, "length", None, 0)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), len(made))
    assert found.usage.total_tokens == len(prompt) + len(made)
    assert client.completions.create(prompt=prompt, max_tokens=20, **GREEDY).choices[0].text == text
    assert client.completions.create(prompt="The sea", **GREEDY).usage.completion_tokens == 16


def test_chat(client):
    prompt, _, text = expected(CHAT_TEXT, 12, special=False)
    found = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **GREEDY)
    [choice] = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert found.object == "chat.completion" and found.usage.prompt_tokens == len(prompt)
    parts = [CHAT[0] | {"role": "developer"}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    again = client.chat.completions.create(messages=parts, max_tokens=12, **GREEDY)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens == len(prompt)
    whole = client.chat.completions.create(messages=CHAT, **GREEDY)  # to the end of the context
    assert whole.usage.total_tokens == 300 or whole.choices[0].finish_reason == "stop"


def test_the_next_turn_of_a_chat_is_prefilled_from_the_cache(client):
    ask = dict(max_tokens=10, **GREEDY)
    messages = [{"role": "user", "content": "A first question"}]
    first = client.chat.completions.create(messages=messages, **ask)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And?"},
    ]
    second = client.chat.completions.create(messages=messages, **ask)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    text = served.words().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert second.choices[0].message.content == expected(text, 10, special=False)[2]


def test_chats_with_the_same_system_message_share_its_state(client):
    system = {"role": "system", "content": "Answer as the keeper of a lighthouse would, at length and with patience."}
    before = served.words()("<s>system: " + system["content"], add_special_tokens=False)["input_ids"]
    for question, cached in (("Who are you?", 0), ("Where is the boat?", len(before)), ("Well?", len(before))):
        messages = [system, {"role": "user", "content": question}]
        found = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
        text = served.words().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found.choices[0].message.content == expected(text, 8, special=False)[2]
        assert found.usage.prompt_tokens_details.cached_tokens == cached


def test_streams(client):
    text = expected("The sea", 20)[2]
    events = list(client.completions.create(prompt="The sea", max_tokens=20, stream=True, **GREEDY))
    assert "".join(event.choices[0].text for event in events) == text and len(events) > 10
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len({event.id for event in events}) == 1

    prompt, made, text = expected(CHAT_TEXT, 12, special=False)
    options = dict(messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY)
    *events, last = client.chat.completions.create(**options)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    assert events[-1].choices[0].finish_reason == "length" and last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(made))


def test_logprobs(client):
    prompt, made, _ = expected("The sea", 8)
    truth = logprobs(prompt, made)
    best = truth[2].topk(3)
    spelled = [served.words().decode([token]) for token in made]
    found = client.completions.create(prompt="The sea", max_tokens=8, logprobs=3, **GREEDY).choices[0].logprobs
    begun = [served.text_after(prompt, made[:i]).removesuffix("\ufffd") for i in range(8)]  # complete ones
    assert found.tokens == spelled and found.text_offset == list(map(len, begun))
    assert found.token_logprobs == pytest.approx(truth.max(-1).values.tolist(), abs=1e-3)
    top = {}
    for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        top.setdefault(served.words().decode([token]), pytest.approx(logprob, abs=1e-3))
    assert found.top_logprobs[2] == top

    prompt, made, _ = expected(CHAT_TEXT, 8, special=False)
    truth = logprobs(prompt, made)
    options = dict(messages=CHAT, max_tokens=8, logprobs=True, top_logprobs=2, **GREEDY)
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    streamed = [
        one
        for event in client.chat.completions.create(stream=True, **options)
        if event.choices[0].logprobs
        for one in event.choices[0].logprobs.content
    ]
    for one, token, row in zip(content, made, truth, strict=True):
        assert one.token == served.words().decode([token]) and bytes(one.bytes).decode(errors="replace") == one.token
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    assert [one.token for one in streamed] == [one.token for one in content]


def test_stop_strings(client):
    text = expected("The sea", 40)[2]
    stop = text[7:10]
    options = dict(prompt="The sea", max_tokens=40, stop=["\x00never", stop], **GREEDY)
    found = client.completions.create(**options)
    assert found.choices[0].text == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 40
    events = list(client.completions.create(stream=True, **options))
    assert "".join(event.choices[0].text for event in events) == found.choices[0].text


def test_seeds_and_several_answers(client):
    def ask(seed, n=1, **options):
        found = client.completions.create(
            model=NAME, prompt="The sea", max_tokens=12, temperature=1, seed=seed, n=n, **options
        )
        return [choice.text for choice in found.choices]

    three = ask(7, n=3)
    assert len(set(three)) == 3 and three == ask(7) + ask(8) + ask(9)
    assert ask(7, extra_body={"top_k": 1}) == [expected("The sea", 12)[2]]
    unseeded = client.completions.create(model=NAME, prompt="The sea", max_tokens=12, n=2)
    assert len({choice.text for choice in unseeded.choices}) == 2  # temperature 1, as OpenAI's
    assert 2 <= unseeded.usage.completion_tokens <= 24  # either may draw the end token


def test_penalties(client):
    repetition = dict(extra_body={"repetition_penalty": 1.5})
    for penalties in (dict(presence_penalty=2), dict(frequency_penalty=-0.5), repetition):
        own = penalties.get("extra_body", penalties)
        made = served.alone(served.ids("The sea"), 30, **own)
        found = client.completions.create(prompt="The sea", max_tokens=30, **penalties, **GREEDY).choices[0].text
        assert found == served.text_after(served.ids("The sea"), made) != expected("The sea", 30)[2]


def test_several_prompts(client):
    found = client.completions.create(prompt=["The sea", "A boat"], max_tokens=9, **GREEDY)
    assert [choice.text for choice in found.choices] == [expected(text, 9)[2] for text in ("The sea", "A boat")]
    assert found.usage.prompt_tokens == sum(len(served.ids(text)) for text in ("The sea", "A boat"))
    events = client.completions.create(prompt=["The sea", "A boat"], max_tokens=9, stream=True, **GREEDY)
    texts = ["", ""]
    for event in events:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'other' here") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


BAD = [
    (dict(prompt=""), "the prompt has no tokens"),
    (dict(prompt=[3, 10**6]), "token ids must lie in"),
    (dict(prompt="a" * 3000), "exceed the context of 300 tokens"),
    (dict(prompt="The sea", max_tokens=300), "and 300 for the answer exceed the context"),
    (dict(prompt="The sea", max_tokens=0), "max_tokens: "),
    (dict(prompt="The sea", temperature=-1), "temperature: "),
    (dict(prompt="The sea", top_p=0), "top_p: "),
    (dict(prompt="The sea", extra_body={"top_k": -2}), "top_k: "),
    (dict(prompt="The sea", extra_body={"stop_token_ids": [10**6]}), "stop_token_ids must lie in 0.*, got 1000000"),
    (dict(prompt="The sea", n=17), "n: "),
    (dict(prompt="The sea", stop=[""]), "stop"),
    (dict(prompt="The sea", echo=True), "echo: is not supported; leave it out"),
    (dict(prompt="The sea", presence_penalty=2.5), "presence_penalty: "),
    (dict(prompt="The sea", logit_bias={"5": 1}), "logit_bias: is not supported"),
    (dict(prompt="The sea", extra_body={"beams": 2}), "beams: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_completions(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(**(GREEDY | options))
    assert caught.value.body["type"] == "invalid_request_error" and "\n" not in caught.value.body["message"]


TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
BAD_CHATS = [
    (dict(messages=[]), "messages: "),
    (dict(messages=[{"role": "user", "content": "bad"}]), "chat template of tiny refuses these messages: .*no such"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages.0"),
    (dict(messages=CHAT, top_logprobs=2), "top_logprobs needs logprobs"),
    (dict(messages=CHAT, service_tier="flex"), "service_tier: is not supported"),
    (dict(messages=CHAT, tools=TOOLS), "chat template of tiny does not tell the model of tools; leave them out"),
    (dict(messages=CHAT, tool_choice="required"), "tool_choice: needs tools"),
    (dict(messages=CHAT, tools=TOOLS, tool_choice="any"), "tool_choice: Input should be 'none', 'auto' or 'required'"),
    (
        dict(messages=CHAT, tools=TOOLS, tool_choice=["f"]),
        'tool_choice: Input should be "none", "auto", "required" or a',
    ),
    (
        dict(messages=CHAT, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice: there is no tool 'g'",
    ),
    (
        dict(messages=CHAT, tools=TOOLS, response_format={"type": "json_object"}),
        "response_format: is not supported beside tools",
    ),
    (dict(messages=CHAT, tools=[{"type": "function"}]), r"tools\.0\.function: Field required"),
    (dict(messages=CHAT, tools=[{"type": "web_search"}]), r"tools\.0\.type: "),
    (
        dict(messages=CHAT, tools=[{"type": "function", "function": {"name": "a b"}}]),
        r"tools\.0\.function\.name: String should",
    ),
    (dict(messages=CHAT, tools=TOOLS * 2), "tools: several have one name"),
    (dict(messages=[{"role": "user"}]), r"messages\.0\.content: Field required"),
    (dict(messages=[CALL | {"tool_calls": []}]), r"messages\.0\.content: Field required"),
    (dict(messages=[CALL | {"role": "user"}]), r"messages\.0\.tool_calls: only the assistant calls tools"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CHATS)
def test_bad_chats(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**(GREEDY | options))


def test_what_says_nothing_is_taken(client):
    client.chat.completions.create(
        messages=CHAT, max_tokens=1, user="me", store=False, presence_penalty=0, logit_bias={}, **GREEDY
    )
    client.chat.completions.create(messages=CHAT, max_tokens=1, service_tier="auto", tool_choice="none", **GREEDY)


def test_tools_that_must_not_be_called(client):
    ask = dict(messages=CHAT, max_tokens=9, **GREEDY)
    text = expected(CHAT_TEXT, 9, special=False)[2]
    assert client.chat.completions.create(tools=TOOLS, tool_choice="none", **ask).choices[0].message.content == text


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "conversation",
        "conversations",
        "chat_template",
        "tokenize",
        "self",
        "add_generation_prompt",
        "continue_final_message",
        "return_tensors",
        "return_dict",
        "tools",
        "documents",
    ],
)
def test_what_klfast_gives_the_chat_template_itself(client, name):
    with pytest.raises(openai.BadRequestError, match=f"chat_template_kwargs cannot set {name}, which klfast sets"):
        client.chat.completions.create(
            messages=CHAT, extra_body={"chat_template_kwargs": {"mood": "", name: True}}, **GREEDY
        )


def test_variables_of_the_chat_template(client):
    """They reach the template, and the prefix cache tells chats with other ones apart."""
    for mood in ("calm", "angry", "", "angry"):
        options = dict(extra_body={"chat_template_kwargs": {"mood": mood, "unknown": [1, {}]}})
        found = client.chat.completions.create(messages=CHAT, max_tokens=9, **options, **GREEDY)
        prompt, _, text = expected(CHAT_TEXT + mood, 9, special=False)
        assert (found.choices[0].message.content, found.usage.prompt_tokens) == (text, len(prompt))


def test_limits_that_are_off(client):
    """They are stronger than the model's own."""
    config = served.model().generation_config
    config.top_k = 1
    try:
        ask = dict(model=NAME, prompt="The sea", max_tokens=12, temperature=1, seed=5)
        limited = client.completions.create(**ask).choices[0].text
        free = [client.completions.create(**ask, extra_body={"top_k": k}).choices[0].text for k in (0, -1)]
    finally:
        config.top_k = None
    assert (
        limited == expected("The sea", 12)[2] != free[0] == free[1] == client.completions.create(**ask).choices[0].text
    )


def test_stop_tokens(client):
    prompt, made, _ = expected("The sea", 40)
    end, at = made[20], made.index(made[20])
    ask = dict(prompt="The sea", max_tokens=40, **GREEDY)
    found = client.completions.create(extra_body={"stop_token_ids": [end]}, **ask)
    assert found.choices[0].text == served.text_after(prompt, made[:at]) and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == at + 1


def test_end_tokens_that_are_ignored(server, client, monkeypatch):
    prompt, made, text = expected("The sea", 40)
    at = made.index(made[20])
    monkeypatch.setattr(server.service, "_ends", [made[20]])
    ask = dict(prompt="The sea", max_tokens=40, **GREEDY)
    assert client.completions.create(**ask).choices[0].text == served.text_after(prompt, made[:at])
    found = client.completions.create(extra_body={"ignore_eos": True}, **ask).choices[0]
    assert (found.text, found.finish_reason) == (text, "length")


def test_unknown_models_and_paths(server, client):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        found = httpx2.request(method, server.root + path)
        error = found.json()["error"]
        assert found.status_code == status and error["message"] and error["code"] is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"", "the body"),
        (b"[]", "the body: "),
        (b'{"model": "tiny"}', "prompt: Field required"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', "the body"),
        (b"\xff", "error"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
    ],
)
def test_broken_bodies(server, body, message):
    found = httpx2.post(f"{server.url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400 and message in found.json()["error"]["message"]


def test_bodies_that_are_not_declared_to_be_json(server):
    body = json.dumps(dict(prompt="The sea", **GREEDY))
    for kind in ("application/x-www-form-urlencoded", "text/plain", None):  # the first is what curl -d sends
        headers = {"Content-Type": kind} if kind else {}
        found = httpx2.post(f"{server.url}/completions", content=body, headers=headers)
        assert found.status_code == 400 and "send Content-Type: application/json" in found.json()["error"]["message"]


def test_health_and_metrics(server, client):
    client.completions.create(prompt="Count me", max_tokens=5, **GREEDY)
    assert httpx2.get(f"{server.root}/health").status_code == 200
    assert httpx2.head(f"{server.root}/health").status_code == 200

    def metrics():
        lines = httpx2.get(f"{server.root}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    before = metrics()
    client.completions.create(prompt="Count me", max_tokens=5, **GREEDY)
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["klfast_answer_tokens_total"] == 5
    assert grown["klfast_cached_prompt_tokens_total"] == len(served.ids("Count me"))
    assert grown["klfast_prompt_tokens_total"] == 0
    assert grown['klfast_replies_total{path="/v1/completions",status="200"}'] == 1
    assert grown['klfast_answers_total{end="finished"}'] == 1
    assert grown["klfast_first_token_seconds_count"] == 1
    assert after["klfast_prefix_cache_bytes"] > 0


def test_events_end_with_done(server):
    body = dict(prompt="The sea", max_tokens=3, stream=True, **GREEDY)
    found = httpx2.post(f"{server.url}/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = found.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)
