#!/usr/bin/env bash
# Pins every package with its hashes, for Linux, macOS and Windows and Python 3.11 and later. Needs uv. Writes
# constraints.txt (what runs) and constraints-dev.txt (the same and what tests), neither with an address or a path.
# Usage: scripts/lock.sh            as little change as possible
#        scripts/lock.sh --upgrade  newest versions
set -euo pipefail
cd "$(dirname "$0")/.."
pin() {
  local file=$1
  shift
  echo "setuptools>=77" | uv pip compile pyproject.toml - "$@" --quiet --universal --python-version 3.11 --generate-hashes \
    --no-annotate --no-header --no-emit-package torch --output-file "$file"
  sed -i "1i # Written by scripts/lock.sh from pyproject.toml: versions and hashes, no addresses." "$file"
}
pin constraints.txt "$@"
pin constraints-dev.txt --extra dev --constraints constraints.txt "$@"
