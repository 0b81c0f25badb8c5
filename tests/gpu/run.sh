#!/usr/bin/env bash
# Everything that needs one GPU. Usage: tests/gpu/run.sh OUT [STAGE ...]   (results and logs go to the folder OUT)
#   check    the tests, and the memory of `mhf plan` against real steps
#   layer    mhf bench layer: shape S, and three lengths
#   sweeps   mhf bench layer over L, d_model and d_h
#   model    mhf bench model: the 1.3B and the 370M models of the paper, FlashMHF against SwiGLU and MH-FFN
#   paper    the paper's efficiency table again: layers and 1.3B models at batch 8, L = 192 to 16,384; efficiency.md
#   generate mhf bench generate: the 1.3B models, FlashMHF against SwiGLU
#   sanitize every kernel once under compute-sanitizer: memory accesses, then races in shared memory, with a control
# Without a stage: check and layer. Each stage goes on where one of its parts fails; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tests/gpu/run.sh OUT [check|layer|sweeps|model|paper|generate|sanitize ...]}
shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
status=0
mhf() { "$python" -m mhf_lightning.cli "$@" || status=1; }
"$python" -m mhf_kernels.info | tee "$out/info.txt"
for stage in "${@:-check layer}"; do
    for part in $stage; do
        case $part in
        check)
            workers=$("$python" -c "import importlib.util as u; print(*(['-n', '8'] if u.find_spec('xdist') else []))")
            timed=tests/gpu/test_callbacks_on_a_gpu.py  # by itself: its figures are times
            "$python" -m pytest -q $workers tests/gpu --ignore $timed > "$out/tests.log" 2>&1 || status=1
            tail -n 25 "$out/tests.log"
            MHF_OVERHEAD_FILE="$out/overhead.json" "$python" -m pytest -q -s $timed > "$out/callbacks.log" 2>&1 || status=1
            grep "370M:" "$out/callbacks.log"
            tail -n 12 "$out/callbacks.log"
            "$python" tests/gpu/measure_plan.py --out "$out/plan.csv" 2>&1 | tee "$out/plan.log" || status=1
            ;;
        layer)
            mhf bench layer --shape S --output "$out/shape-s"
            mhf bench layer --quick --output "$out/quick"
            ;;
        sweeps) mhf bench layer --output "$out/sweeps" ;;
        model)
            for size in 1.3b 370m; do
                files=(configs/paper/$size/{swiglu,flash_mhf_release,mh_ffn}.yaml)
                mhf bench model "${files[@]}" --only inference --output "$out/inference-$size"
                mhf bench model "${files[@]}" --only training --length 1024 4096 16384 --quick --output "$out/training-$size"
            done
            ;;
        paper)
            sizes=(--batch 8 --quick --length 192 1024 2048 4032 4096 8064 8192 16128 16384)
            files=(configs/paper/1.3b/{swiglu,flash_mhf_release,mh_ffn}.yaml)
            mhf bench layer "${sizes[@]}" --output "$out/paper-layer"
            mhf bench model "${files[@]}" --only inference --modes eager compiled compiled_graph "${sizes[@]}" --output "$out/paper-model"
            mhf evidence efficiency --layer "$out/paper-layer/layer.csv" --model "$out/paper-model/model.csv" \
                --out "$out/efficiency.md"
            ;;
        generate)  # without eager, which takes as long as all else and is bound by the host
            files=(configs/paper/1.3b/{swiglu,flash_mhf_release}.yaml)
            mhf bench generate "${files[@]}" --modes graph compiled --output "$out/generate-1.3b"
            ;;
        sanitize)
            for tool in memcheck racecheck; do
                compute-sanitizer --tool $tool --error-exitcode 9 "$python" tests/gpu/sanitized.py > "$out/$tool.log" 2>&1 || status=1
                tail -n 3 "$out/$tool.log"
            done
            for kind in right wrong; do  # what racecheck's word is worth
                compute-sanitizer --tool racecheck "$python" tests/gpu/racecheck_control.py $kind > "$out/control-$kind.log" 2>&1
                tail -n 2 "$out/control-$kind.log"
            done
            ;;
        *)
            echo "unknown stage $part" >&2
            exit 2
            ;;
        esac
    done
done
exit $status
