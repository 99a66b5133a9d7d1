#!/usr/bin/env bash
# The fault matrix with its long rows: kill -9 at more than twenty places of every stage. Prints rows passed/total.
# Usage: scripts/faults.sh [--stages sft,reward,ppo] [--devices 1,8]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv constraints-dev.txt
exec .venv/bin/python scripts/faults.py --kills "$@"
