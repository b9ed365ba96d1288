"""Every error a user or client can cause, as one tree, each with its HTTP status.

Assertions elsewhere mean "our bug"; whatever a person can trigger raises from here and names the
field and the fix. This module knows nothing of HTTP beyond the number, and imports nothing of ours.

    MoEServeError
    ├── InvalidRequestError         400  one request is wrong; `param` names its field
    │   ├── UnsupportedFieldError   400  a field (or a value of it) that this server does not implement
    │   └── ContextTooLongError     400  the prompt does not fit the context window
    ├── UnauthorizedError           401  no API key, or a wrong one
    ├── ForbiddenError              403  from another site's page, or to another host's name
    ├── ModelNotFoundError          404
    ├── ResponseNotFoundError       404  a stored response that is not there, or not any more
    ├── SlowClientError             408  the body did not arrive in time
    ├── BodyTooLargeError           413
    ├── MediaTypeError              415  the body is no JSON in UTF-8, by its headers
    ├── TooManyRequestsError        429  this client has as many requests in flight as it may; carries `retry_after_s`
    ├── OverloadedError             503  the queue is full; carries `retry_after_s`
    │   └── NotServingError         503  the server is loading or shutting down
    ├── RequestTimeoutError         504  the request took longer than the server allows
    ├── EngineDeadError             503  the engine thread died; the server must be restarted
    │   └── CheckpointChangedError  503  a mapped checkpoint file was written to
    ├── BatchStoppedError                a batch of which not all requests are answered
    └── ConfigError                      found at start-up, before any request
        ├── UnsupportedModelError        a model family we cannot run
        ├── CheckpointError              a missing, truncated or inconsistent checkpoint file
        └── TraceFileError               a routing trace that cannot be read
"""

from __future__ import annotations

MOST_CHARS = 400


def one_line(error: BaseException) -> str:
    """What a library says, in one line; with the kind of error where the words alone are none."""
    text = " ".join(str(error).split())
    text = text if " " in text else f"{type(error).__name__}: {text}"
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."


class MoEServeError(Exception):
    """Root of the tree. `message` is safe to show to a client."""

    http_status = 500
    error_type = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(MoEServeError):
    """A request that can never succeed as written. `param` is the offending field."""

    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedFieldError(InvalidRequestError):
    """A field that is valid in the OpenAI API but is not implemented here."""


class ContextTooLongError(InvalidRequestError):
    """Prompt plus requested completion exceed the context window or the KV pages that exist."""


class ForbiddenError(MoEServeError):
    """The request comes from a page, or to a name, that this server does not serve."""

    http_status = 403
    error_type = "permission_error"


class ModelNotFoundError(MoEServeError):
    """The request names a model this server does not serve."""

    http_status = 404
    error_type = "not_found_error"
    param = "model"


class ResponseNotFoundError(MoEServeError):
    """No response of this id is stored for the key that asks."""

    http_status = 404
    error_type = "not_found_error"
    param = "response_id"


class UnauthorizedError(MoEServeError):
    """The request carries no key of this server."""

    http_status = 401
    error_type = "authentication_error"


class SlowClientError(MoEServeError):
    """The request's body took too long to arrive."""

    http_status = 408
    error_type = "timeout_error"


class BodyTooLargeError(MoEServeError):
    """The request's body exceeds the server's limit."""

    http_status = 413
    error_type = "invalid_request_error"


class MediaTypeError(MoEServeError):
    """The request's headers describe a body that this server does not read."""

    http_status = 415
    error_type = "invalid_request_error"


class RequestTimeoutError(MoEServeError):
    """The request did not finish in the time the server gives one."""

    http_status = 504
    error_type = "timeout_error"


class TooManyRequestsError(MoEServeError):
    """The client has as many requests in flight as one may. It should retry after `retry_after_s` seconds."""

    http_status = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(MoEServeError):
    """The waiting queue is full. Clients should retry after `retry_after_s` seconds."""

    http_status = 503
    error_type = "overloaded_error"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotServingError(OverloadedError):
    """The server is loading its model or shutting down; another one, or this one later, can answer."""

    error_type = "unavailable_error"


class EngineDeadError(MoEServeError):
    """The engine thread ended with an error; nothing can be served until a restart."""

    http_status = 503
    error_type = "engine_dead_error"


class CheckpointChangedError(EngineDeadError):
    """A file of the checkpoint was written to while the server had it mapped. The message names it."""


class BatchStoppedError(MoEServeError):
    """Not all requests of a batch are answered; the next run goes on from there."""

    error_type = "batch_error"


class ConfigError(MoEServeError):
    """A setting, flag or file that cannot be used. Raised while starting, never per request."""

    error_type = "config_error"


class UnsupportedModelError(ConfigError):
    """The checkpoint's model family is not one we serve."""


class CheckpointError(ConfigError):
    """A checkpoint folder with a missing, truncated or inconsistent file."""


class TraceFileError(ConfigError):
    """A routing trace that is missing, damaged, or of another model than the one beside it."""
