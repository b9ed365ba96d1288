#!/usr/bin/env bash
# What ten minutes on a lent GPU should answer, the most wanted first, so that a cut keeps the more valuable part.
#
#   WHEELS=.gpu-wheels benchmarks/gpu_10min.sh [FOLDER]      results go into FOLDER (default: $OUT, else ./gpu-results)
#   benchmarks/gpu_10min.sh --simulate [FOLDER]              the same parts without a GPU: tiny sizes, Triton's interpreter
#
# Every part is a process of its own and ends at the second of the run that the list below gives it; what an earlier
# part leaves of its time, the next one has. r.jsonl gets a line after every number, log.txt everything that is printed.
#
#   facts 25      environment, pinning, link, copy, matrix product
#   smoke 85      four tiny models at once through every way of running, against transformers and themselves
#   tests 190     the kernels' tests, on the GPU's own tiles
#   memcheck 240  compute-sanitizer over a GEMV, a ragged tile, attention, plan and copy
#   kernels 330   MoE layers by format and tokens, attention, copies over the link, pipelines of the GEMV
#   engine 480    Qwen3-30B's width with 8 layers, then Mixtral's with 2: memory, decoding, prompts, caches, transformers
#   profile 530   kernels of one decoding step and of one prompt, by time
#   prompts 555   GPT-OSS's prompts behind 8k and 32k tokens
#   soak 575      2,000 steps of the cache that the GPU manages
#   ncu 595       one kernel each of three kinds in Nsight Compute
#
# PYTHON=...   the interpreter (default: python3)
# WHEELS=...   folder of benchmarks/gpu_wheels.sh, where the machine lacks what is in it
# PARTS=...    names of parts (default: all)
# The exit status is 1 if a part failed or was cut off.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
simulate=
[[ ${1:-} == --simulate ]] && { simulate=1; shift; }
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
out=$(realpath "$out")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export GPU_LINES="$out/r.jsonl" TMPDIR="$scratch" TRITON_CACHE_DIR="$scratch/triton"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
if [[ -n $simulate ]]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
fi
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl || exit 2
    PYTHONPATH="$PYTHONPATH:$scratch/site"
    # Ahead of what the machine has: transformers is there in another version.
    PYTHONPATH="$scratch/site:$PYTHONPATH"
fi
[[ -n $simulate ]] || "$python" -c 'import torch; torch.cuda.is_available() or exit("torch sees no GPU; --simulate needs none")' || exit 2
: >"$GPU_LINES"
: >"$out/log.txt"
failed=0

# line NAME STATUS SECONDS: that a part is over
line() {
    printf '{"part": "%s", "status": %d, "seconds": %d, "at_s": %d, "is_over": true}\n' "$@" "$SECONDS" | tee -a "$GPU_LINES"
}

# part NAME END COMMAND...: runs until second END of this script; in simulation, 10 minutes at most
part() {
    local name=$1 left=$(($2 - SECONDS)) start=$SECONDS status
    shift 2
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    [[ -n $simulate ]] && left=600
    echo "== $name" | tee -a "$out/log.txt"
    if ((left < 3)); then
        status=124
    else
        timeout --kill-after=5 "$left" "$@" >>"$out/log.txt" 2>&1
        status=$?
    fi
    line "$name" "$status" $((SECONDS - start))
    ((status == 0)) || failed=1
}

smoke() {
    local family pids=() status=0
    for family in mixtral qwen3_moe gpt_oss deepseek_v2; do
        "$python" -m gpu_parts.smoke "$family" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || status=1
    done
    return $status
}

# tool NAME ARGUMENTS...: the calls below under a tool, or by themselves in simulation and where it is not installed
tool() {
    local name=$1
    shift
    if [[ -z $simulate ]] && command -v "$name" >/dev/null; then
        "$name" "$@"
    else
        echo "{\"part\": \"$name\", \"missing\": true}" >>"$GPU_LINES"
        while [[ $1 != "$python" ]]; do shift; done
        "$@"
    fi
}

if [[ -n $simulate ]]; then
    chosen=(-n 2 -k "test_slots_and_owners_agree or test_no_tokens or test_a_decode_step_is_one_graph")
else
    chosen=(-m gpu -n 8)
fi
export -f smoke tool
export python simulate
part facts 25 "$python" -m gpu_parts.facts
part smoke 85 bash -c smoke
part tests 190 "$python" -m pytest -q "${chosen[@]}" -c /dev/null --rootdir . --import-mode=importlib -p gpu_parts.test_lines \
    --continue-on-collection-errors -p no:cacheprovider tests/kernels/gpu
part memcheck 240 bash -c 'tool compute-sanitizer --error-exitcode 9 "$python" -m gpu_parts.calls memcheck gemv grouped attend cache'
part kernels 330 "$python" -m gpu_parts.kernels
part engine 420 "$python" -m gpu_parts.engine qwen3-30b-8l
part engine 480 "$python" -m gpu_parts.engine mixtral-8x7b-2l --sides "resident, graphs" "device cache, graphs"
part profile 530 "$python" -m gpu_parts.profile qwen3-30b-8l "$out"
part prompts 555 "$python" -m gpu_parts.prompts gpt-oss-20b-2l
part soak 575 "$python" -m gpu_parts.soak
part ncu 595 bash -c 'tool ncu --set basic --launch-count 12 --log-file "$0/ncu.txt" "$python" -m gpu_parts.calls ncu gemv grouped attend --large' "$out"
exit $failed
