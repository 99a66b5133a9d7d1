"""What the process needs to know before JAX and transformers are imported: where compiled programs are kept, and quiet.

Everything is a default: a variable that is already set stays as it is.
"""

import ctypes
import functools
import gc
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
TPU_PCI_VENDOR = "0x1ae0"  # Google's; its network cards and disks have it too
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # as JAX knows them: v2/v3 … tpu7x
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's notes about machine features, autotuning and absent devices
    "TPU_MIN_LOG_LEVEL": "2",
    "TPU_STDERR_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",  # "PyTorch was not found"
    "TOKENIZERS_PARALLELISM": "false",  # warns after every fork otherwise
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs too: there are many
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
CACHE_BYTES = 4 * 2**30  # the least recently used programs go first

DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
# Of XLA's pool, for each simulated device. A collective holds a thread until every device has come to it, and a device may be in
# several at once; by default there are as many threads as devices. When all of them wait, XLA aborts the process after 40 s.
THREADS = 16

MALLOPT = ((-8, 1), (-4, 0), (-1, 2**31 - 1))  # malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD in bytes
COLLECT_AFTER = 20_000  # new objects; Python's default is 700
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
TRIM_FROM_S = 0.1  # seconds of compilation from which it leaves enough behind
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


def cache_dir() -> Path:
    """Where compiled programs are kept by default: under the user's own cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlhf-jax" / "xla"


def has_tpu() -> bool:
    """This machine has TPU chips."""

    def word(path: Path) -> str:
        return path.read_text().strip()

    google = (path.parent for path in PCI_DEVICES.glob("*/vendor") if word(path) == TPU_PCI_VENDOR)
    return any(word(device / "device") in TPU_PCI_DEVICES for device in google)


def _tpu_library_without_tpu() -> bool:
    """libtpu is installed (for `rlhf-jax fit`), but there is no chip: it would print half a page while it finds out."""
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is not None:
        return False
    return not has_tpu()


def prepare() -> None:
    """Sets the defaults. JAX_COMPILATION_CACHE_DIR moves the cache, JAX_ENABLE_COMPILATION_CACHE=false switches it off.

    A directory that was given keeps its own limit: where one process wrote without a limit, JAX writes nothing more with one.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "JAX_PLATFORMS" not in os.environ and "JAX_FORCE_TPU_INIT" not in os.environ and _tpu_library_without_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = cache_dir()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:  # a home that cannot be written to
            directory = Path(tempfile.mkdtemp(prefix="rlhf-jax-xla-"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
    for name, value in CACHE.items():
        os.environ.setdefault(name, value)
    devices = simulated_devices()
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS * devices))


def simulated_devices() -> int:
    """CPU devices that the environment asks for."""
    told = [*DEVICES.findall(os.environ.get("XLA_FLAGS", "")), os.environ.get("JAX_NUM_CPU_DEVICES", "")]
    return max((int(number) for number in told if number.isdigit()), default=1)


def collect_seldom() -> None:
    """Python's collector of reference cycles looks 30 times less often: it took a tenth of a second start.

    Tracing makes hundreds of thousands of objects that all stay, and each round looks at them once more. What has no cycle is
    freed at once as ever.
    """
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


def keep_freed_memory() -> bool:
    """On a CPU: memory that a program frees waits for the next one. True where that was arranged.

    By default glibc gives large blocks back at once, and the kernel hands them out anew page by page, cleared: 85,000 page
    faults, a third of the time, in one gradient of a 4-layer model. To be called before threads start and have their own arenas.
    """
    mine = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform != "linux" or mine or has_tpu() or any(Path(path).exists() for path in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    return mallopt is not None and all(mallopt(key, value) for key, value in MALLOPT)


def give_back() -> None:
    """Memory that is free in this process goes back to the system at once: after what needs much of it and comes once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


@functools.cache
def give_back_after_compiling() -> None:
    """With `keep_freed_memory`: what the compiler used goes back to the system, or it lies beside what the run uses.

    330 MB after the programs of a 4-layer PPO run, whose peak was 1.5 GB. To be called once JAX is imported.
    """
    import jax

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= TRIM_FROM_S:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(compiled)
