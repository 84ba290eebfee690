#!/bin/bash
#SBATCH --job-name=autoresearch
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=15
#SBATCH --requeue
#SBATCH --output=/dev/null
#
# One run in a slot of a fleet, called in the night's folder:  fleet/slot.sh COMMIT SEED
# by Slurm as `sbatch fleet/slot.sh COMMIT SEED`, by fleet/sky.yaml, or by hand after CUDA_VISIBLE_DEVICES=<n>.
# The log is runs/COMMIT-SEED.log. What cannot be written there goes into the temporary folder and is said.
commit=$1
seed=$2
night=$PWD
temporary=${TMPDIR:-/tmp}
export GIT_CONFIG_COUNT=2 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
export GIT_CONFIG_KEY_1=core.hooksPath GIT_CONFIG_VALUE_1=/dev/null

say() {
    echo "FAIL: harness: $1"
    exit 1
}

store=$(git -C "$night" rev-parse --path-format=absolute --git-common-dir) || say "$night is in no git repository; call this in the night's folder"
runs=$(dirname "$store")/runs
log=$runs/$commit-$seed.log
mkdir -p "$runs" && touch "$log" || log=$temporary/autoresearch-$commit-$seed.log
exec >> "$log" 2>&1 < /dev/null
echo "slot: $(date -u +%FT%TZ) on $(hostname), job ${SLURM_JOB_ID:-by hand}, device ${CUDA_VISIBLE_DEVICES:-as found}"

for left in "$temporary"/autoresearch-slot-*; do # clones of slots that were killed on this machine
    owner=${left##*-}
    if [ -O "$left" ] && ! kill -0 "$owner" 2> /dev/null; then rm -rf "$left"; fi
done

git -C "$night" rev-parse --verify --quiet "$commit^{commit}" > /dev/null || say "there is no commit $commit in $night; submit one that is there"
python=${UV_PROJECT_ENVIRONMENT:-$(dirname "$store")/.venv}/bin/python
[ -x "$python" ] || say "there is no $python on $(hostname); run there, in $(dirname "$store"): uv sync"
clone=$temporary/autoresearch-slot-$commit-$$
trap 'rm -rf "$clone"' EXIT
git clone --quiet --shared --no-checkout "$store" "$clone" || say "no clone could be made in $temporary of $(hostname); free some room there"
cd "$clone" || exit 1
git checkout --quiet --detach "$commit" || say "the commit could not be checked out in $temporary of $(hostname); free some room there"

# the shared environment's own interpreter: uv would forward a SIGTERM twice
AUTORESEARCH_RUNS=$runs SEED=$seed PYTHONUNBUFFERED=1 "$python" referee supervise train.py &
run=$!
trap 'kill -TERM "$run" 2> /dev/null' TERM INT # Slurm signals all processes of a job, a shell only this one
wait "$run"
while kill -0 "$run" 2> /dev/null; do wait "$run"; done # a signal ends a wait, not the run
