"""How places are divided between clients and their requests."""

import pytest

from klfast.serving.shares import Shares


class Asked:
    """An answer named by its client and request, such as A1."""

    def __init__(self, name):
        self.client, self.request, self.name = name[0], int(name[1:]), name


def answers(names):
    return list(map(Asked, names.split()))


@pytest.mark.parametrize(
    ("running", "wanting", "got"),
    [
        ("A1 A1 B2", "A3 B4", "B4"),  # the client with fewest
        ("A1 A1 A2 B3 B3 B3", "A1 A2", "A2"),  # then the request with fewest
        ("A1 B2", "A3 B4", "A3"),  # then the first
    ],
)
def test_a_free_place(running, wanting, got):
    assert Shares(answers(running)).next(answers(wanting)).name == got


@pytest.mark.parametrize(
    ("running", "wanting", "exchange"),
    [
        ("A1 A2 A3 A4", "B5", ("B5", 4)),  # from many requests of one client
        ("A1 A1 A2 B3", "B4 C5", ("C5", 1)),  # from its largest, to the client with fewest
        ("A1 A2 B3", "B4", None),  # a lead of one place stays
        ("A1 A1 A1 A2", "A3", ("A3", 1)),  # between requests of one client
        ("A1 A2 A3 B4 B4 B4", "A5 B6", ("B6", 4)),  # A waits for its own; B need not wait for that
        ("A1 A2 A3", "A4", None),
        ("A1 A1 B2 B2", "A1 B2", None),
    ],
)
def test_an_exchange(running, wanting, exchange):
    found = Shares(answers(running)).exchange(answers(wanting))
    assert (found and (found[0].name, found[1])) == exchange
