"""Eight simulated CPU devices and a persistent compilation cache, set before anything imports JAX."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("RLHF_JAX_TEST_DEVICES", "8")
_FLAG = "--xla_force_host_platform_device_count="
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}{os.environ['RLHF_JAX_TEST_DEVICES']}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_cache = Path(os.environ.get("RLHF_JAX_CACHE", Path(tempfile.gettempdir()) / "rlhf_jax_test_cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
