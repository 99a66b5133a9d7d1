"""What ends a run without a traceback: the command line prints the message alone and exits with the status given here."""

import re

EXIT_USER_ERROR = 2
EXIT_STALLED = 75  # EX_TEMPFAIL: a launcher may start the same command again
EXIT_STOPPED = 143  # 128 + SIGTERM: what batch systems expect of a job that they asked to leave


class UserError(ValueError):
    """One message: file, line or key; the value; the rule; the remedy."""


class Stopped(Exception):
    """The run was asked to leave, and everything is saved."""


_SECRETS = re.compile(
    r"(?<=//)[^/@\s]+(?=@)|(?<=[?&])([\w.-]*(?:token|secret|passw|key|signature|credential)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """A text that is written down or sent away: passwords and keys inside addresses become ***."""
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)
