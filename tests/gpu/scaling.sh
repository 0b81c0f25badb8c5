#!/usr/bin/env bash
# Everything that needs several GPUs of one host. Usage: tests/gpu/scaling.sh OUT [STAGE ...]   (a folder a stage in OUT)
# On the right: the time on 2 and on 4 H200s; with "?" it is estimated.
#   preflight   all-reduce bandwidth of each pair of GPUs, and of all of them                           20 s?   25 s
#   weak        370M, FlashMHF and SwiGLU, every strategy, the same work for each GPU                   270 s  410 s
#   parity      the widths of 370M with 4 blocks: losses and gradient norms of 50 steps; saved on N
#               GPUs, continued on M                                                                    160 s  260 s
#   large       1.3B, FlashMHF and SwiGLU, FSDP2, the same work for each GPU                            115 s  125 s
#   checkpoint  1.3B, FlashMHF, FSDP2: saves, and a rank that is killed                                 125 s  125 s
#   others      as large, by DDP, ZeRO-2, ZeRO-3 and FSDP2 x TP; in large's folder, with its rows of
#               one GPU where it has them                                                               235 s  480 s?
#   fixed       370M, FlashMHF and SwiGLU, every strategy, 64 sequences a step                          280 s  500 s?
# Without a stage: all, in this order. A stage that fails does not stop the next; the exit code tells.
# Where a call is limited: `timeout 560 tests/gpu/scaling.sh OUT`, and the same again, with the same OUT and the same commit
# (MHF_COMMIT where there is no git), until all is there: every call goes on with the cases that have no row yet.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tests/gpu/scaling.sh OUT [preflight|weak|parity|large|checkpoint|others|fixed ...]}
shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/mhf-scaling-inductor}  # the stages share it
mkdir -p "$out"
status=0
small=(configs/paper/370m/{flash_mhf_dh128,swiglu}.yaml)
large=(configs/paper/1.3b/{flash_mhf_dh128,swiglu}.yaml)
[ $# -gt 0 ] || set -- preflight weak parity large checkpoint others fixed
for stage in "$@"; do
    folder=$stage
    case $stage in
    preflight) options=(--stages preflight) ;;
    weak) options=("${small[@]}" --stages weak --timeout 120) ;;
    parity) options=("${small[@]}" --stages parity --timeout 120) ;;
    large) options=("${large[@]}" --stages weak --strategies fsdp2 --micro_batch 4) ;;
    checkpoint) options=("${large[0]}" --stages checkpoint --micro_batch 4 --timeout 300) ;;
    others)
        folder=large
        options=("${large[@]}" --stages weak --strategies ddp zero2 zero3 fsdp2_tp --micro_batch 4)
        ;;
    fixed) options=("${small[@]}" --stages fixed --steps 5 --timeout 120) ;;
    *)
        echo "unknown stage $stage" >&2
        exit 2
        ;;
    esac
    SECONDS=0
    "$python" -m mhf_lightning.cli bench scaling "${options[@]}" --output "$out/$folder" 2>&1 | tee -a "$out/$stage.log" || status=1
    echo "$stage: $SECONDS s"
done
exit $status
