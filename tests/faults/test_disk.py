"""Row 15 of the fault matrix on a limit that the system enforces: no file grows beyond 64 KiB while a checkpoint is written."""

import resource
import signal
import subprocess
import sys
import textwrap

CODE = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.errors import UserError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = lambda seed: {"w": jnp.asarray(np.random.default_rng(seed).normal(size=100_000).astype(np.float32))}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state(1))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, state(2))
        checkpoints.wait()
        print("nothing was noticed")
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(checkpoints.restore(state(0)).step)
"""


def test_row_15_a_disk_that_is_really_full_keeps_the_older_checkpoint(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    assert signal.SIGXFSZ
    words = [sys.executable, "-c", textwrap.dedent(CODE), str(tmp_path / "checkpoints")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= 15
    assert "checkpoint 2 could not be written below" in done.stdout
    assert "Checkpoint 1 is intact." in done.stdout
    assert done.stdout.splitlines()[-1] == "1"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "LATEST"]
