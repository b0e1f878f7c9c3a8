"""Every error rnn2bin raises on purpose, and the one table error -> exit code -> HTTP status.

A message says what is wrong, where, and what to do, in one line a reason. Anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence


class Rnn2binError(Exception):
    """Base of all expected errors. `reasons` holds every reason found, one line each; `code` is stable for machines."""

    exit_code = 1
    http_status = 500
    code = "bug"

    def __init__(self, *reasons: str) -> None:
        self.reasons: Sequence[str] = reasons
        super().__init__("\n".join(reasons))


class UsageError(Rnn2binError):
    """A command, an argument or the data given does not fit."""

    exit_code, http_status, code = 2, 422, "usage"


class RecipeError(UsageError):
    """A recipe has unknown, missing or impossible values; one reason for each, with file:line:column."""

    code = "recipe"


class UnreachableError(RecipeError):
    """A recipe asks for a density that this network's gates cannot bring about."""

    code = "unreachable"


class DataError(UsageError):
    """The data file is empty, malformed, not finite, or does not fit the network."""

    code = "data"


class UnsupportedError(Rnn2binError):
    """The source file holds something that rnn2bin does not convert; every reason is listed."""

    exit_code, http_status, code = 3, 422, "unsupported"


class UnsafeError(Rnn2binError):
    """The source file could run code or exhaust the machine; it was not opened further."""

    exit_code, http_status, code = 4, 422, "unsafe"


class BudgetError(Rnn2binError):
    """The converted network lost more accuracy than the user allowed."""

    exit_code, http_status, code = 5, 409, "accuracy-budget"


class ResourceError(Rnn2binError):
    """Disk or memory does not suffice."""

    exit_code, http_status, code = 6, 507, "resources"


class InterruptedRunError(Rnn2binError):
    """The run was stopped and can be resumed with the same command."""

    exit_code, http_status, code = 7, 503, "interrupted"


class DivergedError(BudgetError):
    """Training met a loss, weight or gradient that is not finite; the last good checkpoint is kept."""

    code = "diverged"


class NotReproducedError(Rnn2binError):
    """A recorded conversion was run again and came out otherwise, or its inputs are others; the first difference is named."""

    exit_code, http_status, code = 5, 409, "not-reproduced"


class AuthenticationError(Rnn2binError):
    """The service wants a key, or does not know this one."""

    exit_code, http_status, code = 2, 401, "unauthorized"


class ForbiddenError(Rnn2binError):
    """A request from another site, or to a name that is not this service's."""

    exit_code, http_status, code = 2, 403, "forbidden"


class NotFoundError(Rnn2binError):
    """There is no such upload, job or file, or it is somebody else's."""

    exit_code, http_status, code = 2, 404, "not-found"


class ConflictError(Rnn2binError):
    """What was asked does not fit the state of the job or upload."""

    exit_code, http_status, code = 2, 409, "conflict"


class TooLargeError(Rnn2binError):
    """An upload is larger than the service takes."""

    exit_code, http_status, code = 6, 413, "too-large"


class QuotaError(Rnn2binError):
    """The key's jobs or bytes are used up."""

    exit_code, http_status, code = 6, 429, "quota"


class UnavailableError(Rnn2binError):
    """The service cannot be reached, or is shutting down."""

    exit_code, http_status, code = 7, 503, "unavailable"
