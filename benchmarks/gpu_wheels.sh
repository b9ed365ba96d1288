#!/usr/bin/env bash
# Wheels for a lent machine that has torch, triton and transformers' own needs, but no network. Run where there is one.
#
#   benchmarks/gpu_wheels.sh [FOLDER]     default: .gpu-wheels, which git ignores; 20 MB
#
# TARGET=3.12   Python of that machine (x86-64 Linux)
# Versions are those of constraints.txt. benchmarks/gpu_10min.sh uses the folder: WHEELS=FOLDER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
folder=${1:-.gpu-wheels}
TARGET=${TARGET:-3.12}
most_mib=60 # what a lent machine is willing to take along is 64 MiB, this tree included
mkdir -p "$folder"
wanted=()
for name in transformers gguf msgspec xxhash llguidance; do
    wanted+=("$(grep -i "^$name==" constraints.txt)")
done
tags=(--implementation cp --abi "cp${TARGET//./}" --abi abi3 --abi none)
for glibc in 2_31 2_28 2_27 2_24 2_17; do
    tags+=(--platform "manylinux_${glibc}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$TARGET" "${tags[@]}" \
    --dest "$folder" "${wanted[@]}"
mib=$(du -sm "$folder" | cut -f 1)
echo "$folder: $(ls "$folder" | wc -l) wheels, $mib MiB"
((mib <= most_mib)) || { echo "more than the $most_mib MiB that may be carried" >&2; exit 1; }
