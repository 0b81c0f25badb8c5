#!/usr/bin/env bash
# Everything that needs one GPU, in one go: the tests, the memory of `mhf plan` against real steps, and the benchmark
# of the layer. Usage: tests/gpu/run.sh OUT   (results and logs go to the folder OUT; about 5 minutes on an H200)
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tests/gpu/run.sh OUT}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
status=0
"$python" -m mhf_kernels.info | tee "$out/info.txt"
workers=$("$python" -c "import importlib.util as u; print(*(['-n', '8'] if u.find_spec('xdist') else []))")
"$python" -m pytest -q $workers tests/gpu > "$out/tests.log" 2>&1 || status=1
tail -n 25 "$out/tests.log"
"$python" tests/gpu/measure_plan.py --out "$out/plan.csv" 2>&1 | tee "$out/plan.log" || status=1
"$python" -m mhf_lightning.cli bench layer --shape S --output "$out/shape-s" || status=1
"$python" -m mhf_lightning.cli bench layer --quick --output "$out/quick" || status=1
exit $status
