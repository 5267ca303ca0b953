"""Whether two models' tokenizers give the same ids, without which their predictions cannot be compared."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from klfast.checkpoint import by_name
from klfast.core.errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from klfast.core.loading_options import LoadingOptions


def require_one_tokenizer(
    first: str | os.PathLike[str], second: str | os.PathLike[str], **loading: Unpack[LoadingOptions]
) -> None:
    """Raise InvalidInputError if an id means one token to a model and another to the other.

    Ids that only one of the tokenizers has are no difference: files of GGUF name the unused ones. A model without a
    tokenizer takes the other's.
    """
    own, other = (by_name.find_tokenizer(name, **loading) for name in (first, second))
    if own is None or other is None:
        return
    tokens, others = ({number: token for token, number in one.get_vocab().items()} for one in (own, other))
    for number in sorted(tokens.keys() & others.keys()):
        if tokens[number] != others[number]:
            raise InvalidInputError(
                f"{first} and {second} have different tokenizers: token {number} is {tokens[number]!r} in the first, "
                f"{others[number]!r} in the second; compare models of one tokenizer"
            )
