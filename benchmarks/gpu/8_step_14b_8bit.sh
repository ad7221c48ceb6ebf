#!/usr/bin/env bash
# The same step with its large products in eight bits.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.92}
# One that fails, or takes too long, does not stop the others.
step() { timeout "${LIMIT:-140}" python benchmarks/dit_step.py "${@:2}" --out "$OUT/$1.json" || failed+=" $1"; }
failed=""
step step_14b_fp8 --dtype fp8
step step_14b_int8 --dtype int8
step step_14b_fp8_xla --dtype fp8 --attention xla
step step_14b_fp8_unrolled --dtype fp8 --unroll 4
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
