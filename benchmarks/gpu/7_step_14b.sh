#!/usr/bin/env bash
# One streaming step of the published size in bfloat16: eight layers, then all, by kernel.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.92}
# One that fails, or takes too long, does not stop the others.
step() { timeout "${LIMIT:-140}" python benchmarks/dit_step.py "${@:2}" --out "$OUT/$1.json" || failed+=" $1"; }
failed=""
step step_14b_8_layers --layers 8
step step_14b_bf16
step step_14b_bf16_xla --attention xla
step step_14b_bf16_unrolled --unroll 4
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
