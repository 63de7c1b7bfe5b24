#!/usr/bin/env bash
# Run examples/save_restore.py on every worker of a TPU VM: copy this repository, install it, save, restore, compare.
#
#   TPU_NAME=my-tpu ZONE=us-central2-b BUCKET=gs://my-bucket tpu_scripts/save_restore.sh [--dry-run]
set -euo pipefail

dry_run=false
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "save_restore.sh: unknown argument $argument (only --dry-run and --help)" >&2; exit 2 ;;
  esac
done
: "${TPU_NAME:?name of the TPU VM}" "${ZONE:?its zone}" "${BUCKET:?where to save, as gs://bucket/folder}"
preset=${PRESET:-124m}
path=$BUCKET/jaxckpt-save-restore-$(date -u +%Y%m%dT%H%M%SZ)
root=$(cd "$(dirname "$0")/.." && pwd)

run() {
  printf '+'; printf ' %q' "$@"; echo
  $dry_run || "$@"
}

on_every_worker() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

archive=$(mktemp -t jaxckpt.XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME":jaxckpt.tar.gz --zone="$ZONE" --worker=all
on_every_worker "mkdir -p jaxckpt && tar -xzf jaxckpt.tar.gz -C jaxckpt && cd jaxckpt && python3 -m venv .venv && .venv/bin/pip install -q -e '.[flax]' 'jax[tpu]'"
on_every_worker "cd jaxckpt && .venv/bin/python examples/save_restore.py --distributed --preset $preset $path"
