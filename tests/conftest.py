"""Eight simulated CPU devices and a persistent compilation cache, set before anything imports JAX."""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("RLHF_JAX_TEST_DEVICES", "8")
_FLAG = "--xla_force_host_platform_device_count="
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}{os.environ['RLHF_JAX_TEST_DEVICES']}".strip()
# Most programs here run once or twice, and LLVM's work on them was a fifth of the suite's time. XLA's own passes stay.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{_FLAGS} {_FAST}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_cache = Path(os.environ.get("RLHF_JAX_CACHE", Path(tempfile.gettempdir()) / "rlhf_jax_test_cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))

from rlhf_jax import environment  # noqa: E402

os.environ["PJRT_NPROC"] = str(environment.THREADS * environment.simulated_devices())  # as environment.prepare does

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from rlhf_jax import config, parallel  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
parallel.COMPILER_OPTIONS["cpu"] = {}  # what the flags say
# A command that is called in this process does not end it, whatever reward a test has left behind here.
importlib.import_module("rlhf_jax.rewards.call").leave = lambda status: None
jax.devices()
os.environ["XLA_FLAGS"] = _FLAGS  # this and the next were for this process alone: those that it starts have devices of their own
del os.environ["PJRT_NPROC"]
KEPT = jax.config.jax_enable_compilation_cache  # compiled programs, on disk


@pytest.fixture(autouse=True)
def compiled_programs_are_read_again():
    """A mesh of several CPU devices ends that (`parallel.compile_anew`); here it ends with the test."""
    yield
    if jax.config.jax_enable_compilation_cache != KEPT:
        jax.config.update("jax_enable_compilation_cache", KEPT)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _one_device():
    whole = parallel.make_mesh

    def make_mesh(shape, devices=None):
        return whole(shape, (devices or jax.devices())[:1] if shape == config.Mesh() else devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", make_mesh)
        yield


@pytest.fixture
def one_device():
    """Runs of this test that ask for no mesh take the first device: they compile sooner, and are read the next time."""
    with _one_device():
        yield


@pytest.fixture(scope="session")
def on_one_device():
    """The same for what fixtures run: a context."""
    return _one_device
