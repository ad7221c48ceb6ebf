#!/usr/bin/env bash
# Surroundings, then every golden case of the official implementation on the GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"
nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv
nproc; free -g | head -2; df -h . | tail -1
python - <<'PY'
import importlib.util, sys
import jax
print("python", sys.version.split()[0], "jax", jax.__version__, jax.devices())
wanted = "flax optax orbax.checkpoint einops librosa scipy soxr grain array_record tensorstore"
wanted += " safetensors ml_collections absl jaxtyping av PIL tqdm numba"
def missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
print("missing:", [name for name in wanted.split() if missing(name)] or "nothing")
if jax.default_backend() != "gpu":
    sys.exit('JAX sees no GPU; install "jax[cuda13]" (or cuda12) for this driver')
PY
command -v flite || echo "no flite: 3_data.sh and 4_encoders.sh need it, see GPU.md"
time python -m conversion.verify tests/golden --failures-only | tee "$OUT/verify.txt"
