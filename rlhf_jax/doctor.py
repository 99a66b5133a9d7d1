"""What a machine has for a run: versions, devices and their memory, disk, compilation cache, optional extras."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "transformers", "safetensors", "numpy")
EXTRAS = {
    "tpu": "libtpu",
    "cuda": "jax_plugins",
    "torch": "torch",
    "data": "datasets",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "serve": "uvicorn",
}
GIB = 2**30


def examine(directory: Path = Path()) -> str:
    """A page of text; `directory` is where runs would be written."""
    return "\n".join(f"{name + ':':12} {text}" for name, text in _facts(directory))


def _facts(directory: Path) -> Iterator[tuple[str, str]]:
    yield "rlhf-jax", f"{_version('rlhf-jax')} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} {sys.executable}, {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in REQUIRED)
    for device in jax.local_devices():
        memory = device.memory_stats() or {}
        limit = f", {memory['bytes_limit'] / GIB:.1f} GiB" if "bytes_limit" in memory else ""
        yield "device", f"{device.platform} {device.id}: {device.device_kind}{limit}"
    yield "host", f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
    disk = shutil.disk_usage(directory)
    yield "disk", f"{disk.free / GIB:.1f} GiB free in {directory.resolve()}"
    yield "cache", f"compiled programs in {os.environ.get('JAX_COMPILATION_CACHE_DIR', 'no directory')}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    yield "hub", "offline (HF_HUB_OFFLINE)" if offline else "online: names that are no directory are looked up there"
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        yield "extra", f"{extra}: installed" if found else f'{extra}: missing; pip install "rlhf-jax[{extra}]"'


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"
