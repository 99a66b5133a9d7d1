"""What ends a run without a traceback: the command line prints the message alone and exits with the status given here.
And what does not end it: that nobody reads what it prints."""

import contextlib
import re
from typing import Any

EXIT_USER_ERROR = 2
EXIT_STALLED = 75  # EX_TEMPFAIL: a launcher may start the same command again
EXIT_STOPPED = 143  # 128 + SIGTERM: what batch systems expect of a job that they asked to leave


class UserError(ValueError):
    """One message: file, line or key; the value; the rule; the remedy."""


class Stopped(Exception):
    """The run was asked to leave, and everything is saved."""


class Unheard:
    """A text stream whose reader may go away, as `tee` or a terminal does when a connection is lost: then the text is lost alone.

    The record of a run is metrics.jsonl.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


_SECRETS = re.compile(
    r"(?<=//)[^/@\s]+(?=@)|(?<=[?&])([\w.-]*(?:token|secret|passw|key|signature|credential)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """A text that is written down or sent away: passwords and keys inside addresses become ***."""
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)
