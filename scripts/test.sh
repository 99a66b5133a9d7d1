#!/usr/bin/env bash
# Lint, format, types, security, then every test. Ends with pytest's closing line; non-zero if anything failed.
# Usage: scripts/test.sh [--torch] [pytest arguments]     --torch: also compare exported models with PyTorch
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
torch=
if [ "${1:-}" = --torch ]; then
  torch=yes
  shift
fi
make_venv constraints-dev.txt
bin=.venv/bin
# The TPU compiler, with which a small run is compiled for a slice that is not there. No hashes: it follows the version of JAX.
"$bin/python" -c 'import libtpu' 2>/dev/null || pip_install "jax[tpu]==$("$bin/python" -c 'from importlib.metadata import version; print(version("jax"))')"
if [ -n "$torch" ]; then
  # No hashes: CPU and CUDA builds of one version differ, and which of them is at hand depends on the machine.
  "$bin/python" -c 'import torch' 2>/dev/null || { pip_install torch==2.13.0 && warm_up torch; }
fi
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get update && apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 ||
      echo "NOT RUN: screenshots of the report (chromium could not be installed)"
  else
    echo "NOT RUN: screenshots of the report (no chromium, and no right to install it)"
  fi
fi

failed=()
check() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}
# An index without pip-audit's service knows no package: that is said, and is no failure.
audit() {
  local found known
  found=$("$bin/pip-audit" --progress-spinner off --disable-pip --require-hashes --format json -r constraints-dev.txt 2>/dev/null) || true
  known=$(grep -o '"vulns"' <<<"$found" | wc -l)
  if [ "$known" = 0 ]; then
    echo "NOT RUN: pip-audit (no vulnerability data can be reached from here)"
  else
    echo "$known packages known to the vulnerability data"
    ! grep -oE '"id": "[^"]+"' <<<"$found"
  fi
}
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "pyright" "$bin/pyright"
check "bandit" "$bin/bandit" --quiet --recursive --configfile pyproject.toml rlhf_jax
check "pip-audit" audit
for name in "${failed[@]}"; do
  echo "FAILED: $name"
done
# Files in the order of their names: by default those of few tests, the longest among them, come last, and one process waits.
echo "== pytest"
status=0
"$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
[ "${#failed[@]}" = 0 ] || status=1
exit "$status"
