#!/usr/bin/env bash
# Renders the talking people at 128x128, on all cores. Stopped by the clock, it goes on when repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
source benchmarks/gpu/flite_path.sh
WORK=${WORK:-runs/small_128}
timeout --signal=INT "${LIMIT:-570}" \
  python launch/prepare_data.py people --out "$WORK/people" --size '128*128' --num_frames 85 --movement 0.3 \
  --people "${PEOPLE:-512}" --clips_per_person "${CLIPS:-5}" --held_out_people 64
