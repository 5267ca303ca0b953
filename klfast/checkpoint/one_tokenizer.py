"""Whether two models' tokenizers give the same ids, without which their predictions cannot be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klfast.checkpoint import by_name
from klfast.core.errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from klfast.core.loading_options import LoadingOptions


def with_tokenizer(first: str, second: str, **loading: Unpack[LoadingOptions]) -> str:
    """Return the one of two models whose tokenizer serves both: the second, or the first if the second has none.

    Ids that only one of the tokenizers has are no difference: files of GGUF name the unused ones.

    Raises:
        InvalidInputError: an id means one token to a model and another to the other.
    """
    own, other = (by_name.find_tokenizer(name, **loading) for name in (first, second))
    if own is None or other is None:
        return first if other is None else second
    tokens, others = ({number: token for token, number in one.get_vocab().items()} for one in (own, other))
    for number in sorted(tokens.keys() & others.keys()):
        if tokens[number] != others[number]:
            raise InvalidInputError(
                f"{first} and {second} have different tokenizers: token {number} is {tokens[number]!r} in the first, "
                f"{others[number]!r} in the second; compare models of one tokenizer"
            )
    return second
