#!/usr/bin/env bash
# Latents of all clips, then the transformer: teacher, diffusion forcing, distillation.
# Stopped by the clock, it goes on where it was when it is repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
export WORK=${WORK:-runs/small_128} XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM:-0.9}
end=$((SECONDS + ${LIMIT:-570}))
for stage in teacher diffusion_forcing dmd; do
  [ -f "$WORK/$stage/config.json" ] && continue # written at the end of a stage
  left=$((end - SECONDS))
  [ "$left" -gt 0 ] || exit 124
  timeout --signal=TERM "$left" \
    python launch/train.py --config="benchmarks/gpu/small_128.py:$stage" --workdir "$WORK/$stage"
done
