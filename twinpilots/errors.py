"""Every exception that TwinPilots raises on purpose.

    TwinPilotsError
    +-- UserError (exit code 2)          the request cannot be served as it was made
    |   +-- CheckpointError              a model file is missing, truncated, hostile or misshapen
    |   +-- UnsupportedModelError        an architecture or a feature of it that we do not run
    |   +-- LimitError                   a memory limit, or the model's own length limit, cannot be met
    |   +-- NotRunnableError             a plan that can be predicted, but that this version does not run
    |   +-- DeviceUnavailableError       the asked-for device is not on this machine
    |   +-- ProfileMissingError          planning for this machine before it has been measured
    |   +-- RequestError                 a request in OpenAI's format is malformed, out of range, or asks for what we do not have
    +-- NotFiniteError                   the model's logits for one request are not numbers
    +-- DeviceLostError                  a device stopped answering in the middle of a run

A message names the value, the limit and the next action, on one line. Invalid Python arguments raise ``ValueError``, as everywhere in Python.
"""


class TwinPilotsError(Exception):
    """Base class of all errors that TwinPilots raises on purpose."""


class UserError(TwinPilotsError):
    """The request cannot be served as it was made; the message says what to change."""

    def __init__(self, message: str) -> None:
        """Messages quote untrusted files: line breaks and terminal escapes in them must not reach the terminal."""
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


class CheckpointError(UserError):
    """A model file is missing, truncated, hostile or misshapen; the message names the file and the tensor or field."""


class UnsupportedModelError(UserError):
    """The model's architecture, or a feature of it, is not supported."""


class LimitError(UserError):
    """A limit (GPU memory, host memory, model length) cannot be met; the message names the smallest that would do."""


class NotRunnableError(UserError):
    """This version predicts such a plan and does not run it; the message names what is missing and what to do."""


class DeviceUnavailableError(UserError):
    """The asked-for device does not exist on this machine."""


class ProfileMissingError(UserError):
    """This machine has not been measured yet; the message names the command that does."""


class RequestError(UserError):
    """One request in OpenAI's format cannot be served as it is; ``param`` is the field at fault, ``code`` OpenAI's name of the error, where it has one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class NotFiniteError(TwinPilotsError):
    """The model's logits for request ``request_id`` are not finite numbers; the engine can go on without it."""

    def __init__(self, message: str, *, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class DeviceLostError(TwinPilotsError):
    """A device stopped answering in the middle of a run."""
