#!/bin/bash
# Ends the job step in which a rank makes no progress: watch.sh RUN_DIR, on the batch node, beside srun.
# A heartbeat (steps done, batches done by this process, time) counts when it changes: clocks of two nodes never meet.
run_dir=$1
hang=${MHF_HANG_SECONDS:-600}
start=${MHF_START_SECONDS:-3600} # before a rank's first batch: imports, data, compilation, first validation

declare -A beat since
look() { # sets stalled
    local file name now batches
    stalled=()
    for file in "$run_dir"/heartbeat/rank-*; do
        [[ -f $file ]] || continue
        name=${file##*/}
        read -r now <"$file"
        if [[ ${beat[$name]-} != "$now" ]]; then
            beat[$name]=$now since[$name]=$SECONDS
        fi
        read -r _ batches _ <<<"$now"
        ((SECONDS - since[$name] <= (batches > 0 ? hang : start))) || stalled+=("$name")
    done
    ((${#beat[@]} > 0 || SECONDS <= start)) || stalled=("every rank")
}

while sleep $((hang < 50 ? 1 : 5)); do
    look
    ((${#stalled[@]} > 0)) && [[ -f $run_dir/slurm/step ]] || continue
    step=$(<"$run_dir/slurm/step")
    echo "$(date '+%F %T')  no progress of ${stalled[*]}: its step is killed, Python stacks are in $run_dir/heartbeat/"
    scancel --signal=USR2 "$step"
    sleep 1
    scancel --signal=CONT "$step" # a stopped rank writes its stacks when it wakes up
    sleep 5
    scancel --signal=KILL "$step"
    exit
done
