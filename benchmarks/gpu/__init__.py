"""Commands for a machine with a GPU; see `benchmarks/GPU.md`."""
