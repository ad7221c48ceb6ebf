#!/usr/bin/env bash
# The distilled model folder in bfloat16 (under 16 MiB a file), its scores, its times.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORK=${WORK:-runs/small_128} OUT=${OUT:-runs/gpu}
mkdir -p "$OUT/small_128"
cp "$WORK"/dmd/{config.json,speech.safetensors} "$OUT/small_128/"
python - "$WORK/dmd" "$OUT/small_128" <<'PY'
import sys

sys.path.insert(0, ".")
from jax_avatar.weights.files import load_weights, save_weights

source, folder = sys.argv[1:]
for part in ("dit", "vae"):
    save_weights(folder, part, *load_weights(source, part), dtype="bfloat16")
PY
for stage in teacher diffusion_forcing dmd; do
  cp "$WORK/$stage/metrics.jsonl" "$OUT/metrics_$stage.jsonl"
done
ls -l "$OUT/small_128"
python benchmarks/stream.py --checkpoint "$OUT/small_128" --mesh 1 --out "$OUT/stream_128.json"
timeout --signal=INT "${LIMIT:-300}" \
  python launch/evaluate.py --checkpoint "$OUT/small_128" --data "$WORK/people" --out "$OUT/eval"
