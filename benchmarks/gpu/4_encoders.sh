#!/usr/bin/env bash
# Speech encoder, then VAE. Stopped by the clock, it goes on when repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
source benchmarks/gpu/flite_path.sh
export WORK=${WORK:-runs/small_128} XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.9}
train() { timeout --signal=TERM "$2" python launch/train.py \
  --config="benchmarks/gpu/small_128.py:$1" --workdir "$WORK/$1"; }
[ -f "$WORK/speech/speech.safetensors" ] || train speech "${SPEECH_LIMIT:-240}"
train vae "${LIMIT:-560}"
