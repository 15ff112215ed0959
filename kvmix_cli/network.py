"""Errors of the network, whichever library huggingface_hub asks with: requests, httpx or httpx2, by its version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, cast

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

HTTP_ERROR: Final = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The class of all errors of that library, those without an answer included."""
HUB_ERRORS: Final[tuple[type[Exception], ...]] = (OSError, ValueError, RuntimeError, HTTP_ERROR, HFValidationError)
"""Errors of a question to the hub: no network, no answer, no such repository, no possible name."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_offline(error: BaseException) -> bool:
    """Return whether an error means that the hub could not be reached, so that asking it again is of no use."""
    return any(
        isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled))
        or (isinstance(cause, HTTP_ERROR) and not isinstance(cause, HfHubHTTPError))
        for cause in causes(error)
    )
