#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: copies this checkout to every worker, installs it, starts one process a worker.
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/imagenet_dit.py:XL/2 --workdir=gs://bucket/run [--config.field=value ...]
#
# JAX finds the other workers of the slice by itself. Start it again after a preemption: the run resumes from its last
# checkpoint.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix=diffusion_jax/ -o "$archive" HEAD

gcloud compute tpus tpu-vm scp "$archive" "$name":~/diffusion_jax.tar.gz --zone="$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  tar -xzf ~/diffusion_jax.tar.gz && cd ~/diffusion_jax
  python3 -m venv ~/venv && ~/venv/bin/pip install -q -e '.[tpu,tfds]'
  ~/venv/bin/python -m diffusion_jax.train $(printf '%q ' "$@")"
