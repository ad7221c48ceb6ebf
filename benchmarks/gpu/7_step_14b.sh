#!/usr/bin/env bash
# One streaming step of the published size, random bfloat16 weights: first eight layers, then all.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.92}
python benchmarks/dit_step.py --config 14b --layers 8 --repeats 20 --out "$OUT/step_14b_8_layers.json"
python benchmarks/dit_step.py --config 14b --repeats 20 --out "$OUT/step_14b.json"
