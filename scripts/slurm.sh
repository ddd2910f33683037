#!/usr/bin/env bash
# Trains on the GPUs of several hosts, one process for each GPU: sbatch scripts/slurm.sh ARGUMENTS
#
#   sbatch scripts/slurm.sh --config=configs/ucf101.py --workdir=runs/ucf101
#
# The workdir must be on a disk that all hosts see. Change what follows to your cluster.
#SBATCH --job-name=freqformer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Time for a checkpoint: SLURM sends SIGTERM to all tasks so many seconds before the end, and when
# the job is preempted. The same command goes on from there.
#SBATCH --signal=TERM@120

exec srun --kill-on-bad-exit=1 python train.py "$@"
