"""SHA-256 of a whole state: equal for equal states, on any mesh."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.checkpoint import read
from rlhf_jax.leaves import named_leaves


def state_digest(state: Any) -> str:
    """Over names, types, shapes and bytes of every leaf, which this process can address."""
    return _digest({name: np.asarray(leaf) for name, leaf in named_leaves(state).items()})


def read_digest(path: Path) -> str:
    """`state_digest` of the state in one checkpoint directory."""
    return _digest(read(path))


def _digest(leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
