#!/usr/bin/env bash
# On one TPU VM worker: .venv with the pinned packages and the TPU library. Nothing is done where that was done before.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv constraints.txt
if ! .venv/bin/python -c 'import libtpu' 2>/dev/null; then
  # No hashes: the TPU library follows the version of JAX.
  pip_install "jax[tpu]==$(.venv/bin/python -c 'from importlib.metadata import version; print(version("jax"))')"
fi
