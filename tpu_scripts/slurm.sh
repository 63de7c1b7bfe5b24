#!/usr/bin/env bash
# Train on a GPU cluster under Slurm, one process per GPU. Resumes by itself when Slurm requeues the job, which gets
# SIGTERM two minutes before its time is over.
#
#   tpu_scripts/slurm.sh --name my-run --folder /shared/runs/1 [--processes 8] [--gpus 4] [--partition p] [--time 4:00:00] [--dry-run]
# --processes: of the whole job; --gpus: of one node.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "$0")/lib.sh"
parse_options "" "$@"
need NAME FOLDER

gpus=${GPUS:-4}
processes=${PROCESSES:-$gpus}
batch=(sbatch --job-name="$NAME" --ntasks="$processes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
  --requeue --signal=TERM@120 --open-mode=append --output="$NAME-%j.log" --chdir="$root" --time="${TIME:-4:00:00}")
[ -z "${PARTITION-}" ] || batch+=(--partition="$PARTITION")
# jax.distributed finds Slurm's variables; each process takes the GPU of its local rank.
run "${batch[@]}" --wrap="PYTHONPATH=. srun --kill-on-bad-exit=1 .venv/bin/python $(train_command "$FOLDER") --distributed"
