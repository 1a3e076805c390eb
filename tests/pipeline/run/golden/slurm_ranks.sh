#!/bin/bash
#SBATCH --job-name=lab:distill-base
#SBATCH --comment=duet-0123456789abcdef
#SBATCH --output=runs/lab/slurm/logs/distill-base-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=TERM@300
#SBATCH --partition=gpu
#SBATCH --account=forgetting
#SBATCH --time=1-12:00:00
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --ntasks-per-node=4
#SBATCH --exclude=node17
#SBATCH --exclusive

module load cuda/12.6
export HF_HOME="$SCRATCH/hf"
/opt/duet/bin/python -m duet attempt runs/lab/slurm/config-1.yaml "distill-base" || exit
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export MASTER_ADDR="$(hostname)" MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
srun --wait=600 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' duet /opt/duet/bin/python -m duet distill --only base
code=$?
case "$code" in 75 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit "$code"
