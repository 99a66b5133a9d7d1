"""How the processes of one run find each other, and what they must agree on. With one process every function answers at once."""

import http.client
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError

T = TypeVar("T")
_TEXT_BYTES = 8192
_METADATA = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def start(*, on_tpu: bool = False) -> None:
    """Join the other processes of a run, where the environment tells of some. Call it before anything asks for a device.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe any set of machines. On a
    slice of Cloud TPU nothing needs to be set: JAX finds the other workers itself, and other slices by MEGASCALE_* variables.
    `on_tpu`: this machine has TPU chips.
    Errors: `UserError` for a description that is not whole, and for processes with different numbers of devices.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        count, number = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        if os.environ.get("JAX_PLATFORMS", "") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, number)
    elif _several_tpu_workers(on_tpu):
        jax.distributed.initialize()
    if jax.distributed.is_initialized():
        _check_even(Counter(device.process_index for device in jax.devices()))


def _check_even(counts: Mapping[int, int]) -> None:
    """Refuse processes that hold different numbers of devices: every process -> its number."""
    if len(set(counts.values())) > 1:
        told = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items())[:8])
        raise UserError(f"the processes of a run must hold equally many devices; {told}: give each the same number")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a whole number; it is {text!r}")
    return int(text)


def _several_tpu_workers(on_tpu: bool) -> bool:
    """This machine is one of several of a TPU slice, or of several slices: as GKE's variables say, or a TPU VM's metadata."""
    if os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return True
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names is not None:
        return "," in names
    if not on_tpu or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    server = http.client.HTTPConnection(os.environ.get("GCE_METADATA_IP", "metadata.google.internal"), timeout=5)
    try:
        server.request("GET", _METADATA, headers={"Metadata-Flavor": "Google"})
        answer = server.getresponse()
        return answer.status == 200 and b"," in answer.read()
    except (OSError, http.client.HTTPException):  # no Cloud TPU: a board of one's own
        return False
    finally:
        server.close()


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


def _text_from(process: int, text: str) -> str:
    """That process's text (at most 8 KiB of UTF-8; longer ones are cut), on every process."""
    buffer = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    buffer[: len(data)] = data
    found = multihost_utils.broadcast_one_to_all(buffer, is_source=jax.process_index() == process)
    return bytes(np.asarray(found)).rstrip(b"\0").decode(errors="ignore")


def shared(make: Callable[[], Any]) -> Any:
    """What `make()` returns on process 0, on every process; the others do not call it. It must be what JSON holds.

    For what may differ from call to call, or costs somebody something: a server's scores, a function that draws at random.
    """
    if jax.process_count() == 1:
        return make()
    data = np.frombuffer(json.dumps(make()).encode(), np.uint8) if is_writer() else np.zeros(0, np.uint8)
    buffer = np.zeros(from_writer(len(data)), np.uint8)
    buffer[: len(data)] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))


def fail_together(message: str) -> None:
    """Raise UserError on every process when any has a message: its own, else that of the first which has one; "": all is well."""
    if jax.process_count() == 1:
        if message:
            raise UserError(message)
        return
    failed = np.asarray(multihost_utils.process_allgather(np.array(bool(message)))).reshape(-1)
    if failed.any():
        first = int(failed.argmax())
        told = _text_from(first, message)  # all take part
        raise UserError(message or f"process {first} of this run failed: {told}")


def together(make: Callable[[], T]) -> T:
    """What `make()` returns on this process. Where it raises UserError on any, it is raised on all.

    For what each process does by itself, such as reading its copy of the data, before they first compute together.
    """
    try:
        made, message = make(), ""
    except UserError as error:
        if jax.process_count() == 1:
            raise
        made, message = None, str(error)
    fail_together(message)
    return made  # type: ignore[return-value]


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
