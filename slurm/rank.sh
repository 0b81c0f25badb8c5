#!/bin/bash
# One rank of pretrain.sbatch, with the options of mhf fit as arguments.
trap '' USR1 TERM USR2 # mhf sees to them; until it has started, they must not end anything

# Compilers write many small files: on the node's own disk, in a folder of this user, kept for the next start.
cache=${TMPDIR:-/tmp}/mhf-cache-$UID
mkdir -p -m 700 "$cache" 2>/dev/null
[[ -d $cache && -O $cache && ! -L $cache ]] || cache=$(mktemp -d)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export SLURM_JOB_NAME=mhf # Lightning takes jobs named "bash" or "interactive" for a terminal, and starts one process

if [[ $SLURM_PROCID == 0 ]]; then
    printf '%s\n' "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$MHF_STATE_DIR/step"
fi
mhf fit "$@"
code=$?
if [[ $code != 0 ]]; then # the first to end says why: srun kills the others, and returns the largest code
    (set -o noclobber && printf '%s\n' "$code $SLURM_PROCID $SLURMD_NODENAME" >"$MHF_STATE_DIR/exit") 2>/dev/null
fi
[[ $code != 75 ]] || exit 0 # saved and leaving, like all the others: they are not to be killed on their way out
exit "$code"
