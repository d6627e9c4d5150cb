#!/bin/bash
# phi_fast on Slurm: one rank per GPU, started by srun itself so that signals reach every rank.
# Two minutes before the time limit Slurm sends SIGTERM; the run saves, exits with 75, and is queued again.
#SBATCH --job-name=phi-fast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000)) # a new port per restart: the old may be in use

srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m phi_fast.train "$@"
' train --recipe phi-1.5 --data "$DATA" --run-dir "$RUN_DIR" --save-every 250 --elastic "$@"
status=$?

if [ $status -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
