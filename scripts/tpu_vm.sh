#!/usr/bin/env bash
# One command on every worker of a TPU VM slice: installs this checkout, runs rlhf-jax, and after a preemption goes on.
# Usage: scripts/tpu_vm.sh --name NAME --zone ZONE [options] -- STAGE CONFIG [KEY=VALUE ...]
#   scripts/tpu_vm.sh --name pod --zone us-west4-a --setup 'sudo mount -o nolock 10.0.0.2:/share /mnt/share' \
#     --create '--accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite --spot' \
#     -- ppo configs/ppo_llama3_8b_v5e64.yaml out=/mnt/share/llama3-8b
# Options:
#   --project PROJECT   default: gcloud's own
#   --setup COMMAND     run on every worker after each start of the slice: mounts what all of them share, logs in to a hub
#   --create FLAGS      of `gcloud compute tpus tpu-vm create`: makes the slice where there is none, and anew after a preemption
#   --tries N           of creating it, a minute apart (1440); flags that gcloud does not know end it at once
#   --restarts N        at most N times (100)
#   --logs DIR          where the workers' logs are copied to after each run (logs/NAME)
#   --dry-run           print the commands of a first run and do nothing
# `out` must be a directory that every worker shares. Ends with the run's status: 0 finished, 2 a mistake to mend.
set -euo pipefail
cd "$(dirname "$0")/.."

name= zone= project= setup= create= tries=1440 restarts=100 logs= dry=
while [ "$#" -gt 0 ]; do
  case $1 in
    --name | --zone | --project | --setup | --create | --tries | --restarts | --logs)
      [ "$#" -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry=yes; shift ;;
    --) shift; break ;;
    -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
    *) echo "$1 is not an option of scripts/tpu_vm.sh (--help tells them)" >&2; exit 2 ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ "$#" -gt 1 ] || {
  echo "usage: scripts/tpu_vm.sh --name NAME --zone ZONE [options] -- STAGE CONFIG [KEY=VALUE ...]" >&2
  exit 2
}
logs=${logs:-logs/$name}
where=("--zone=$zone" ${project:+"--project=$project"})
archive=$(mktemp -u "${TMPDIR:-/tmp}/rlhf-jax-XXXXXX").tar.gz
trap 'rm -f "$archive"' EXIT

# run COMMAND...: does it, or prints it as one could type it.
run() {
  if [ -z "$dry" ]; then
    "$@"
    return
  fi
  local word line=
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+-]*) line="$line '${word//\'/\'\\\'\'}'" ;;
      *) line="$line $word" ;;
    esac
  done
  echo "${line# }"
}
tpu() { run gcloud compute tpus tpu-vm "$@"; }
everywhere() { tpu ssh "$name" "${where[@]}" --worker=all --command="$1"; }
state() { gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2> >(grep -v NOT_FOUND >&2) || echo ABSENT; }

make_slice() {
  local now=ABSENT try result
  for ((try = 1; ; try++)); do
    [ -n "$dry" ] || now=$(state)
    if [ "$now" = READY ]; then return; fi
    [ -n "$create" ] || { echo "$name is $now; start it, or give --create and its flags" >&2; exit 1; }
    [ "$now" = ABSENT ] || tpu delete "$name" "${where[@]}" --quiet || true
    result=0
    # shellcheck disable=SC2086 # flags are several words
    tpu create "$name" "${where[@]}" $create || result=$?
    if [ "$result" = 0 ]; then return; fi
    [ "$result" != 2 ] || exit 2 # a flag that gcloud does not know
    echo "$name could not be made, gcloud says why (try $try of $tries)" >&2
    [ "$try" -lt "$tries" ] || exit "$result"
    sleep "${TPU_VM_PAUSE_S:-60}"
  done
}

# The checkout as it lies here, with changes and new files: all but what git ignores. git names deleted files too.
# shellcheck disable=SC2016 # the inner shell reads its own variables
PACK='git ls-files -coz --exclude-standard | while IFS= read -rd "" f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done'
PACK="$PACK"' | tar -czf "$0" --no-recursion --null -T -'

install() {
  run bash -o pipefail -c "$PACK" "$archive" || exit
  tpu scp "$archive" "$name:rlhf-jax.tar.gz" "${where[@]}" --worker=all || return
  [ -z "$setup" ] || everywhere "$setup" || return
  everywhere "mkdir -p rlhf-jax && tar -xzf rlhf-jax.tar.gz -C rlhf-jax && cd rlhf-jax && bash scripts/tpu_install.sh"
}

# Returns the run's own status, where the first worker can still be asked for it, else gcloud's; 255 where the run has not ended.
start() {
  local words result=0
  printf -v words ' %q' "$@"
  everywhere "cd rlhf-jax && bash scripts/tpu_worker.sh$words" || result=$?
  [ "$result" = 0 ] || result=$(tpu ssh "$name" "${where[@]}" --worker=0 --command='cat rlhf-jax/worker.status || echo 255' 2>/dev/null || echo "$result")
  return "$result"
}

collect() {
  [ -n "$dry" ] || mkdir -p "$logs"
  local worker=0
  while tpu scp "$name:rlhf-jax/worker.log" "$logs/worker-$worker.log" "${where[@]}" "--worker=$worker" 2>/dev/null; do
    worker=$((worker + 1))
    [ -z "$dry" ] || break
  done
}

installed=
for ((attempt = 0; attempt <= restarts; attempt++)); do
  if [ "$attempt" = 0 ] || [ "$(state)" != READY ]; then
    [ -z "$create" ] && [ "$attempt" = 0 ] || make_slice
    installed=
  fi
  status=0
  if [ -z "$installed" ] && ! install; then
    status=255 # the slice may be gone again
    [ "$(state)" != READY ] || { echo "$name could not be made ready for the run: see above" >&2; exit 1; }
  else
    installed=yes
    start "$@" || status=$?
    collect
  fi
  [ -z "$dry" ] || exit 0
  case $status in
    0 | 2) exit "$status" ;;
    75 | 143 | 255) ;; # stalled; asked to stop, as before a preemption; connection lost
    134 | 137 | 139) ;; # another process died, at which JAX aborts this one; killed, as when memory runs out
    *) [ "$(state)" != READY ] || exit "$status" ;;
  esac
  echo "ended with status $status; starting again ($((attempt + 1)) of $restarts)" >&2
  sleep "${TPU_VM_PAUSE_S:-10}"
done
exit "$status"
