#!/bin/bash
# One rank of pretrain.sbatch, with the options of mhf fit as arguments.
trap '' USR1 TERM # mhf sees to them; until it has started, they must not end anything
trap dump USR2    # of watch.sh, before it kills what hangs

# Compilers write many small files: on the node's own disk, in a folder of this user, kept for the next start.
cache=${TMPDIR:-/tmp}/mhf-cache-$UID
mkdir -p -m 700 "$cache" 2>/dev/null
[[ -d $cache && -O $cache && ! -L $cache ]] || cache=$(mktemp -d)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
# A thread of NCCL's process group writes the flight recorder when there is something in this pipe, also while a
# collective hangs, long before its own timeout. Tried with torch 2.11 on two H100 of one node, without SLURM.
export TORCH_NCCL_DEBUG_INFO_PIPE_FILE=$cache/nccl-$SLURM_JOB_ID-
pipe=$TORCH_NCCL_DEBUG_INFO_PIPE_FILE$SLURM_PROCID.pipe
dump() { [[ ! -p $pipe ]] || echo dump 1<>"$pipe"; } # <> does not wait for a reader
export SLURM_JOB_NAME=mhf # Lightning takes jobs named "bash" or "interactive" for a terminal, and starts one process

if [[ $SLURM_PROCID == 0 ]]; then
    printf '%s\n' "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$MHF_START_DIR/step"
fi
(trap '' USR2 && exec mhf fit "$@") & # in the background, because bash does not act on a signal before its command ends
mhf=$!
while kill -0 "$mhf" 2>/dev/null; do wait "$mhf"; done
wait "$mhf"
code=$?
rm -f "$pipe"
if [[ $code != 0 ]]; then # the first to end says why: srun kills the others, and returns the largest code
    (set -o noclobber && printf '%s\n' "$code $SLURM_PROCID $SLURMD_NODENAME" >"$MHF_START_DIR/exit") 2>/dev/null
fi
[[ $code != 75 ]] || exit 0 # saved and leaving, like all the others: they are not to be killed on their way out
exit "$code"
