#!/usr/bin/env bash
# Trains on a Cloud TPU slice: copies this checkout to every worker, installs it and starts one process a worker.
#
#   launch/tpu_pod.sh [--dry-run] [--include-uncommitted] NAME ZONE --config=NAME --workdir=gs://BUCKET/RUN [...]
#
# --dry-run              prints the commands that would be executed, and executes none of them
# --include-uncommitted  copies the working tree as it is; without it, uncommitted changes are refused
#
# Variables:
#   ACCELERATOR      such as v5litepod-16: the slice NAME is created (as a queued resource) where it does not exist, and
#                    created again after a preemption. Without it, NAME must exist and a preemption ends the launch.
#   RUNTIME          software version of the machines (default v2-alpha-tpuv5-lite, which is that of v5e)
#   SPOT             1 asks for spot capacity, which is cheaper and preempted more often (default 0)
#   PROJECT          project of Google Cloud (default: that of gcloud)
#   ATTEMPTS         how often the slice may be created in one launch (default 100)
#   POLL             seconds between two looks at a slice that is waited for (default 60)
#   EXTRAS           extras of diffusion_jax to install (default tpu,tfds)
#   PYTHON_VERSION   of the environment on the workers (default 3.12)
#
# The last checkpoint in --workdir is where a run goes on, so give a bucket. Exit codes: 0 trained, 2 refused before
# anything was started, 3 the slice is gone, otherwise that of the workers.
set -euo pipefail

dry_run='' include_uncommitted=''
while [[ ${1:-} == --dry-run || ${1:-} == --include-uncommitted ]]; do
  case $1 in --dry-run) dry_run=1 ;; *) include_uncommitted=1 ;; esac
  shift
done
if [[ $# -lt 3 || $1 == -* || $2 == -* ]]; then
  sed -n '2,24s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
for argument in "$@"; do
  case $argument in --dry-run | --include-uncommitted)
    echo "error: $argument stands before NAME." >&2
    exit 2 ;;
  esac
done
place=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})
cd "$(dirname "$0")/.."

# shellcheck source=launch/snapshot.sh
source launch/snapshot.sh
snapshot=$(snapshot_tree "$include_uncommitted")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
archive=$scratch/diffusion_jax.tar.gz
git archive --format=tar.gz --prefix=diffusion_jax/ -o "$archive" "$snapshot"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# The state of the slice: READY, PREEMPTED, ..., or nothing where there is none.
slice_state() { gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null || true; }
queue_state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  local spot=()
  [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${spot[@]+"${spot[@]}"}
}

remove() { run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

# Waits until the slice can be used, and creates it where it may.
make_ready() {
  local state queued told=''
  while state=$(slice_state) && [[ $state != READY ]]; do
    case $state in CREATING | STARTING | RESTARTING | REPAIRING) ;;
      *)
        if [[ -z ${ACCELERATOR:-} ]]; then
          echo "error: the slice $name is ${state:-absent}; with ACCELERATOR=... it is created here." >&2
          exit 3
        fi
        queued=$(queue_state)
        case $queued in
          '')
            if ((created >= ${ATTEMPTS:-100})); then
              echo "error: the slice $name was lost $created times; start again to go on." >&2
              exit 3
            fi
            created=$((created + 1))
            create ;;
          FAILED)
            # A request that cannot be met is not asked for again and again.
            echo "error: the queued resource $name has failed; gcloud compute tpus queued-resources describe $name" \
              "${place[*]} says why, and 'delete' in its place makes room for another." >&2
            exit 3 ;;
          ACTIVE | SUSPENDING | SUSPENDED)
            # Its machines are gone. (An ACTIVE one without a state has just become so: look again.)
            if [[ $queued != ACTIVE || -n $state ]]; then remove; fi ;;
        esac
        state=${queued:-queued} ;;
    esac
    [[ $state == "$told" ]] || echo "$(date +%T) waiting for the slice $name: $state"
    told=$state
    sleep "${POLL:-60}"
  done
}

copy() {
  run gcloud compute tpus tpu-vm scp "$archive" "$name:~/diffusion_jax.tar.gz" "${place[@]}" --worker=all
}

extras=${EXTRAS-tpu,tfds}
remote="set -e
rm -rf ~/diffusion_jax && tar -xzf ~/diffusion_jax.tar.gz && cd ~/diffusion_jax
python3 -m pip install -q --user uv
~/.local/bin/uv venv -q --allow-existing --python ${PYTHON_VERSION:-3.12} ~/venv
~/.local/bin/uv pip install -q --python ~/venv/bin/python -e '.${extras:+[$extras]}'
exec ~/venv/bin/python -m diffusion_jax train $(printf '%q ' "$@")"
train() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$remote"; }

if [[ $dry_run ]]; then
  if [[ -n ${ACCELERATOR:-} ]]; then
    echo "# Where the slice $name does not exist (and again after a preemption, ${ATTEMPTS:-100} times at most):"
    create
    echo "# ... then a look every ${POLL:-60} s until it is READY. What is left of a preempted one is removed first:"
    remove
  else
    echo "# The slice $name must exist: ACCELERATOR is not set."
  fi
  echo "# On all workers:"
  copy
  train
  exit 0
fi

created=0
while true; do
  make_ready
  code=0
  # A slice that has just become READY may not answer yet: a second try.
  { copy || { sleep "${POLL:-60}" && copy; }; } && train || code=$?
  # A preempted run may have saved and left with 0: only a slice that still stands tells that it is over.
  state=$(slice_state)
  if [[ $state == READY ]]; then
    exit "$code"
  fi
  echo "$(date +%T) the slice $name is ${state:-gone}; the run goes on from its last checkpoint"
done
