#!/usr/bin/env bash
# Fine-tuning, reward model, PPO on a laptop: one command, nothing downloaded but Python packages.
# Usage: scripts/quickstart.sh [--out DIR] [--task reviews|addition] [--demo overoptimization] [--seed N]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
(
  cd "$root"
  . scripts/venv.sh
  make_venv constraints.txt
)
exec "$root/.venv/bin/rlhf-jax" quickstart "$@"
