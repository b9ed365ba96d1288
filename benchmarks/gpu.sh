#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: torch with CUDA, triton, no network. In 30 minutes; what is
# wanted most, in ten: gpu_10min.sh.
#
#   benchmarks/gpu.sh [FOLDER]        results go into FOLDER (default: $OUT, else ./gpu-results)
#
# PYTHON=...   the interpreter (default: python3)
# PARTS=...    any of these, in this order, the most wanted first (default: all); minutes on an H100 are guesses:
#   bars       one MoE layer against its bars, and what the slot table costs                          2
#   tests      every operation's tests, decoding steps captured                                       5
#   cached     a captured step of CachedLayers by number of misses                                    1
#   engine     a random Mixtral: captured and launched, cached by the GPU and by the host             6
#   bench      all shapes, formats and peers                                                          9
#   compile    machine code of all kernels                                                            5
# SECONDS_PER_PART=...   longest time of a part (default: 540)
# WHEELS=...   folder of wheels to use, for packages that the machine lacks and cannot fetch
#
# Written: log.txt with everything, summary.json with the status, time and last line of each part, and by bars, cached,
# engine and bench a JSON file of their own as they go. A part that fails does not stop the others; the exit status says
# whether all passed. `engine`, and the tests that run a whole model, need llguidance and the transformers of
# constraints.txt; without them they fail and say so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit 2
    PYTHONPATH="$PYTHONPATH:$site"
fi
failed=0
rows=()

part() {
    local name=$1 start=$SECONDS status last
    shift
    [[ " ${PARTS:-bars tests cached engine bench compile} " == *" $name "* ]] || return 0
    echo "== $name" | tee -a "$out/log.txt"
    timeout --kill-after=10 "${SECONDS_PER_PART:-540}" "$@" >"$out/part.txt" 2>&1
    status=$?
    cat "$out/part.txt" >>"$out/log.txt"
    last=$(grep -v '^{' "$out/part.txt" | tail -n 1 | cut -c -300 | tr -d '\\"\t\r')
    grep -v '^{' "$out/part.txt" | tail -n 12 | cut -c -200
    rm -f "$out/part.txt"
    ((status == 0)) || { echo "== $name FAILED ($status)" | tee -a "$out/log.txt"; failed=1; }
    rows+=("\"$name\": {\"status\": $status, \"seconds\": $((SECONDS - start)), \"last\": \"$last\"}")
    (IFS=,; printf '{"machine": "%s", "parts": {%s}}\n' "$machine" "${rows[*]}") >"$out/summary.json"
}

"$python" -c 'import torch; torch.cuda.is_available() or exit("gpu.sh needs a GPU, and torch sees none")' || exit 2
machine=$("$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)') || exit 1
echo "$machine" | tee "$out/log.txt"
part bars "$python" benchmarks/bench_gpu_bars.py --json "$out/bars.json"
part tests "$python" -m pytest -q -m gpu -n 8 -c /dev/null --rootdir . --import-mode=importlib \
    --continue-on-collection-errors -p no:cacheprovider tests/kernels/gpu
part cached "$python" benchmarks/bench_cached_layer.py --json "$out/cached.json"
part engine "$python" benchmarks/bench_gpu_engine.py --json "$out/engine.json"
part bench "$python" benchmarks/bench_kernels.py --json "$out/bench.json"
part compile "$python" -m tests.support.compile_check
exit $failed
