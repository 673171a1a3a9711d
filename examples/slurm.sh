#!/bin/bash
# Trains a recipe on all GPUs of the nodes, and requeues itself at the time limit until the training has finished.
#   sbatch examples/slurm.sh --config cifar10_uvit_s2_dia --output runs/cifar10_uvit_s2_dia
# The working directory must be on a disk that all nodes share.
#SBATCH --job-name=dia-diffusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@180
set -u

GPUS=${SLURM_GPUS_ON_NODE:-4}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# srun forwards SIGTERM to torchrun, and torchrun to the training, which writes a checkpoint and exits.
# USR1 arrives 180 s before the time limit; TERM where the job is canceled or preempted (Slurm requeues those itself).
requeue=no
trap 'requeue=yes; kill -TERM "$training" 2>/dev/null' USR1
trap 'kill -TERM "$training" 2>/dev/null' TERM

srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m dia_diffusion train "$@" &
training=$!

# A trapped signal ends `wait` early, so wait until the process is gone.
status=0
while true; do
    wait "$training"
    status=$?
    kill -0 "$training" 2>/dev/null || break
done

if [ "$requeue" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
