#!/usr/bin/env bash
# The same shapes in plain PyTorch, on the same GPU; needs PyTorch with CUDA beside JAX.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
# One that fails, or takes too long, does not stop the others.
step() { timeout "${LIMIT:-90}" python benchmarks/yardstick_torch.py "${@:2}" --out "$OUT/$1.json" || failed+=" $1"; }
failed=""
step torch_step_14b
step torch_step_14b_flash --attention flash
step torch_step_14b_cudnn --attention cudnn
step torch_vae_decode --network vae
step torch_vae_decode_last --network vae --layout channels_last
step torch_step_14b_compiled --compile
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
