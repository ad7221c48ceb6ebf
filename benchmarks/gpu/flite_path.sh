# Sourced: flite from the PATH, or from what pack_flite.sh packed.
if ! command -v flite >/dev/null && [ -f build/flite.tar.gz ]; then
  tar -xzf build/flite.tar.gz -C build
  export PATH="$PWD/build/flite:$PATH" LD_LIBRARY_PATH="$PWD/build/flite:${LD_LIBRARY_PATH:-}"
fi
command -v flite >/dev/null || { echo "flite is missing; see benchmarks/GPU.md" >&2; exit 1; }
