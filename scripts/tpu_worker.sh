#!/usr/bin/env bash
# On one TPU VM worker: rlhf-jax with the given arguments. What it prints goes to worker.log too, its status to worker.status.
# A run whose connection was lost still holds the chips: it is asked to save and leave first.
set -uo pipefail
cd "$(dirname "$0")/.."
rm -f worker.status
if [ -s worker.pid ] && kill -TERM "$(cat worker.pid)" 2>/dev/null; then
  while kill -0 "$(cat worker.pid)" 2>/dev/null; do sleep 1; done
fi
{
  echo "== $(date -u +%FT%TZ) rlhf-jax $*"
  echo "$BASHPID" >worker.pid
  exec .venv/bin/rlhf-jax "$@"
} 2>&1 | tee -a worker.log
status=${PIPESTATUS[0]}
rm -f worker.pid
echo "$status" >worker.status
exit "$status"
