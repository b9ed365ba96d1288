#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: torch with CUDA, triton, no network.
#
#   benchmarks/gpu.sh [FOLDER]        results go into FOLDER (default: $OUT, else ./gpu-results)
#
# PYTHON=...   the interpreter (default: python3)
# PARTS=...    any of: tests compile bench cached (default: all)
# A part that fails does not stop the others; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
failed=0

part() {
    local name=$1
    shift
    [[ " ${PARTS:-tests compile bench cached} " == *" $name "* ]] || return 0
    echo "== $name"
    "$@" >"$out/$name.txt" 2>&1
    local status=$?
    tail -n 5 "$out/$name.txt" | cut -c -300
    ((status == 0)) || { echo "== $name FAILED ($status): $out/$name.txt"; failed=1; }
}

"$python" -c 'import torch; torch.cuda.is_available() or exit("gpu.sh needs a GPU, and torch sees none")' || exit 2
"$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' \
    | tee "$out/machine.txt" || exit 1
part tests "$python" -m pytest -q -m gpu -c /dev/null --rootdir . --import-mode=importlib --continue-on-collection-errors \
    -p no:cacheprovider tests/kernels/gpu
part compile "$python" -m moe_serve_kernels.compile_check
part bench "$python" benchmarks/bench_kernels.py
part cached "$python" benchmarks/bench_cached_layer.py
exit $failed
