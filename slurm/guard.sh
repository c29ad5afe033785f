#!/usr/bin/env bash
# Requeues a job whose first node has died, the one that runs its script. Usage, submitted by the job: guard.sh JOB ATTEMPTS_FILE
#
# A job of --no-kill outlives all its nodes but that one; then Slurm fails it, and requeues it no more. This waits for the end of the job
# (--dependency=afternotok) and does it, unless the job's script said how it ended.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=none
#SBATCH --mem=100M
#SBATCH --time=10
#SBATCH --open-mode=append
set -uo pipefail

job=$1 attempts=$2
state=$(scontrol show job -o "$job" | sed -n '1s/.*JobState=\([A-Z_]*\).*/\1/p')
latest=$(readlink "$(dirname "$attempts")/latest")
echo "[$(date '+%F %T')] job $job is ${state:-unknown to Slurm}; its attempt is $latest"
! grep -qs " $latest " "$attempts" || exit 0
if [[ -z $state ]]; then # this waited in the queue for longer than the controller remembers jobs (MinJobAge)
    echo "error: job $job cannot be requeued any more; submit its script again to go on" >&2
    exit 1
fi
[[ $state == FAILED || $state == NODE_FAIL ]] || exit 0
for _ in {1..20}; do
    if scontrol requeue "$job" && scontrol release "$job"; then
        echo "[$(date '+%F %T')] requeued"
        exit 0
    fi
    sleep 10
done
echo "[$(date '+%F %T')] error: job $job cannot be requeued; submit its script again to go on" >&2
exit 1
