"""``Shares``: how the places are divided between clients, and those of a client between its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from klfast.serving.answer import Answer


class Shares:
    """Says which answer gets the next place, and which request gives one up.

    Args:
        running: the answers that have a place.
    """

    def __init__(self, running: Iterable[Answer]) -> None:
        self._running = list(running)
        self._places = Counter(owner for answer in self._running for owner in (answer.client, answer.request))

    def next(self, wanting: Iterable[Answer]) -> Answer:
        """Return the first answer of the client that has fewest places, and among its requests of that with fewest."""
        return min(wanting, key=self._rank)

    def exchange(self, wanting: Iterable[Answer]) -> tuple[Answer, int] | None:
        """Return the answer that gets a place from others, and the request that gives it up; None if shares are even.

        A client that has two places more than another one gives one up to it; a request does to one of the same client.
        """
        ranked = sorted(self._running, key=self._rank)
        largest = {answer.client: answer for answer in ranked}  # request of each client
        found = {}
        for answer in wanting:
            clients, requests = self._rank(answer)
            if self._places[ranked[-1].client] - clients > 1:
                found[answer] = ranked[-1].request
            elif (own := largest.get(answer.client)) and self._places[own.request] - requests > 1:
                found[answer] = own.request
        return min(found.items(), key=lambda pair: self._rank(pair[0]), default=None)

    def _rank(self, answer: Answer) -> tuple[int, int]:
        return self._places[answer.client], self._places[answer.request]
