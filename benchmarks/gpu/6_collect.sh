#!/usr/bin/env bash
# Weights -> a model folder (under 16 MiB a file), its scores, its times.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORK=${WORK:-runs/small_128} OUT=${OUT:-runs/gpu}
mkdir -p "$OUT/small_128"
for part in speech vae dit; do cp "$WORK/$part/$part.safetensors" "$OUT/small_128/"; done
python - "$OUT/small_128" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, ".")
from jax_avatar.io.checkpoint import load_json, load_weights, save_json, save_weights
from jax_avatar.streaming.model import SMALL

folder = Path(sys.argv[1])
content = load_json(SMALL / "config.json")
content["name"], content["stream"]["size"] = "small-128", [128, 128]
save_json(folder / "config.json", content)
for part in ("dit", "vae"):
    save_weights(folder, part, *load_weights(folder, part), dtype="bfloat16")
PY
ls -l "$OUT/small_128"
python benchmarks/stream.py --checkpoint "$OUT/small_128" --mesh 1 --out "$OUT/stream_128.json"
timeout --signal=INT "${LIMIT:-300}" \
  python launch/evaluate.py --checkpoint "$OUT/small_128" --data "$WORK/people" --out "$OUT/eval"
