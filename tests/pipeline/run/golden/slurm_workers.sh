#!/bin/bash
#SBATCH --job-name=lab:teacher-logits
#SBATCH --comment=duet-0123456789abcdef
#SBATCH --output=runs/lab/slurm/logs/teacher-logits-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=TERM@300
#SBATCH --array=0-6%2
#SBATCH --partition=gpu
#SBATCH --account=forgetting
#SBATCH --time=4:00:00
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --ntasks-per-node=1
#SBATCH --exclude=node17

module load cuda/12.6
export HF_HOME="$SCRATCH/hf"
/opt/duet/bin/python -m duet attempt runs/lab/slurm/config-1.yaml "teacher-logits-$SLURM_ARRAY_TASK_ID" || exit
srun /opt/duet/bin/python -m duet teacher-logits --worker
code=$?
case "$code" in 75 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit "$code"
