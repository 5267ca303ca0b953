"""Why a server takes no request now."""

from klfast.core.errors import KlfastError


class QueueFullError(KlfastError):
    """The queue has no room for all answers of a request now."""


class ClosedError(KlfastError):
    """The server takes no more requests."""
