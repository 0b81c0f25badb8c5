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
    ((${#stalled[@]} > 0)) && [[ -f $MHF_START_DIR/step ]] || continue
    step=$(<"$MHF_START_DIR/step")
    echo "$(date '+%F %T')  no progress of ${stalled[*]}: its step is killed, Python stacks are in $run_dir/heartbeat/"
    scancel --signal=USR2 "$step" # to mhf: Python stacks; to rank.sh: NCCL's flight recorder
    sleep 20                      # the flight recorder took 6 s, most of them for names in C++ stacks
    scancel --signal=CONT "$step" # a stopped rank writes its stacks when it wakes up; it must not train for long
    sleep 2
    scancel --signal=KILL "$step"
    exit
done
