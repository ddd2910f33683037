#!/usr/bin/env bash
# Trains on the GPUs of several hosts, one process for each GPU: sbatch scripts/slurm.sh ARGUMENTS
#
#   sbatch scripts/slurm.sh --config=configs/ucf101.py --workdir=runs/ucf101
#
# The workdir must be on a disk that all hosts see. `scancel --signal=TERM JOB` saves and stops. A
# job that has saved and stopped counts as completed, also where it was preempted: submit it again.
# Jobs that are submitted with --dependency=singleton run one after the other.
# Change what follows to your cluster.
#SBATCH --job-name=freqformer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Time for a checkpoint: SLURM sends SIGTERM to all tasks so many seconds before the end, and when
# the job is preempted, if the partition has a GraceTime. The same command goes on from there.
#SBATCH --signal=TERM@120

# Since SLURM 22.05 srun does not take over --cpus-per-task: tasks bound to cores had one CPU each.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

exec srun --kill-on-bad-exit=1 python train.py "$@"
