#!/usr/bin/env bash
# Everything that needs several GPUs of one host. Usage: tests/gpu/scaling.sh OUT [STAGE ...]   (a folder a stage in OUT)
#   preflight   all-reduce bandwidth of each pair of GPUs, and of all of them
#   weak        370M, FlashMHF and SwiGLU, every strategy, the same work for each GPU
#   parity      the widths of 370M with 4 blocks: losses and gradient norms of 50 steps; saved on N GPUs, continued on M
#   large       1.3B, FlashMHF and SwiGLU, FSDP2, the same work for each GPU
#   checkpoint  1.3B, FlashMHF, FSDP2: saves, and a rank that is killed
#   fixed       370M, DDP and FSDP2, 64 sequences a step
# Without a stage: all, in this order. A stage that fails does not stop the next; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tests/gpu/scaling.sh OUT [preflight|weak|parity|large|checkpoint|fixed ...]}
shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/mhf-scaling-inductor}  # the stages share it
mkdir -p "$out"
status=0
small=(configs/paper/370m/{flash_mhf_dh128,swiglu}.yaml)
large=(configs/paper/1.3b/{flash_mhf_dh128,swiglu}.yaml)
[ $# -gt 0 ] || set -- preflight weak parity large checkpoint fixed
for stage in "$@"; do
    case $stage in
    preflight) options=(--stages preflight) ;;
    weak) options=("${small[@]}" --stages weak) ;;
    parity) options=("${small[@]}" --stages parity) ;;
    large) options=("${large[@]}" --stages weak --strategies fsdp2 --micro_batch 4) ;;
    checkpoint) options=("${large[0]}" --stages checkpoint --micro_batch 4 --timeout 300) ;;
    fixed) options=("${small[@]}" --stages fixed --strategies ddp fsdp2 --steps 5) ;;
    *)
        echo "unknown stage $stage" >&2
        exit 2
        ;;
    esac
    SECONDS=0
    "$python" -m mhf_lightning.cli bench scaling "${options[@]}" --output "$out/$stage" 2>&1 | tee "$out/$stage.log" || status=1
    echo "$stage: $SECONDS s"
done
exit $status
