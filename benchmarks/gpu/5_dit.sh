#!/usr/bin/env bash
# Latents of all clips, then the transformer. Stopped by the clock, it goes on when repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
export WORK=${WORK:-runs/small_128} XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.9}
timeout --signal=TERM "${LIMIT:-570}" \
  python launch/train.py --config=benchmarks/gpu/small_128.py:dit --workdir "$WORK/dit"
