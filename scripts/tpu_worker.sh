#!/usr/bin/env bash
# On one TPU VM worker: rlhf-jax with the given arguments. What it prints goes to worker.log, and from there to who is connected;
# its status to worker.status. A run whose connection was lost goes on and holds the chips: it is asked to save and leave first.
set -uo pipefail
cd "$(dirname "$0")/.."
pid=$(cat worker.pid 2>/dev/null) waited=0
while grep -qs rlhf-jax "/proc/${pid:-none}/cmdline"; do # any other process has that number since the machine was started anew
  ((waited++ % 300)) || kill -TERM "$pid"                # after five minutes once more: then it leaves at once
  sleep 1
done
rm -f worker.status
touch worker.log
shown=$(wc -c <worker.log)
{
  echo "== $(date -u +%FT%TZ) rlhf-jax $*"
  exec .venv/bin/rlhf-jax "$@"
} >>worker.log 2>&1 &
run=$!
echo "$run" >worker.pid
tail -c "+$((shown + 1))" -f --pid="$run" worker.log & # no pipe: the run does not depend on who reads
wait "$run"
status=$?
echo "$status" >worker.status
wait
exit "$status"
