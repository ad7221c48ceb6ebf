#!/usr/bin/env bash
# Decoding twelve frames at the release's sizes.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.92}
# One that fails, or takes too long, does not stop the others.
step() { timeout "${LIMIT:-180}" python benchmarks/vae_decode.py "${@:2}" --out "$OUT/$1.json" || failed+=" $1"; }
failed=""
step vae_decode
step vae_decode_720x400 --size '720*400'
step vae_decode_float32 --dtype f32
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
