#!/usr/bin/env bash
# The stream's parts and the whole, on one GPU: the model that ships, or its shape.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
if [ -f jax_avatar/assets/small/config.json ]; then
  python benchmarks/stream.py --mesh 1 --seconds 20 --out "$OUT/stream_small.json"
fi
python benchmarks/stream.py --small --mesh 1 --seconds 20 --out "$OUT/stream_random_small.json"
python benchmarks/dit_step.py --config small --repeats 100 --out "$OUT/step_small.json"
