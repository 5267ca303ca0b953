"""The text of chats."""

import pytest

from klfast.generation.chat import system_part


def messages(*texts):
    roles = ["system"] * (len(texts) - 1) + ["user"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.mark.parametrize(
    ("text", "chat", "part"),
    [
        ("<s>Be brief.</s><u>Hello</u>", messages("Be brief.", "Hello"), "<s>Be brief."),
        ("<s>Be brief.</s><u>Be brief.</u>", messages(" Be brief.\n", "Be brief."), "<s>Be brief."),
        ("<s>a</s><s>a</s><u>a</u>", messages("a", "a", "a"), "<s>a</s><s>a"),
        ("<s>first</s><s>2ND</s><u>Hello</u>", messages("first", "second", "Hello"), "<s>first"),
        ("<s></s><u>Hello</u>", messages("", "Hello"), ""),
        ("<u>Hello</u>", messages("Hello"), ""),
    ],
)
def test_a_chat_up_to_the_end_of_its_system_messages(text, chat, part):
    assert system_part(text, chat) == part
