"""The bodies that the fuzzer damages are whole ones: they reach the engine."""

from http_bodies import ask, write_bodies


def test_intact_bodies_are_answered(one_thread, tmp_path):
    write_bodies(tmp_path)
    assert {path.name: ask(path)[0] for path in tmp_path.iterdir()} == dict.fromkeys(
        ("completions", "completions_of_many", "chat", "chat_at_once", "chat_in_json"), 200
    )
