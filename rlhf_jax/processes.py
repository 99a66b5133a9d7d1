"""What the processes of one run must agree on. With one process every function answers at once."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError

_TEXT_BYTES = 8192


def is_writer() -> bool:
    """Process 0 alone writes text, manifests and pointers."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """True on every process when it is True on one. All processes must call it at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.array(flag))).any())


def from_writer(number: int) -> int:
    """Process 0's number, on every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def text_from_writer(text: str) -> str:
    """Process 0's text (at most 8 KiB of UTF-8; longer ones are cut), on every process."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    buffer[: len(data)] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).rstrip(b"\0").decode(errors="ignore")


def fail_together(message: str) -> None:
    """Raise UserError(message) on every process when any process has a message (the writer's wins); "" means all is well."""
    if not any_process(bool(message)):
        return
    raise UserError(text_from_writer(message) or message or "another process of this run failed; its own message says why")


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
