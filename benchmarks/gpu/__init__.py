"""What to run on a machine with a GPU; see `benchmarks/GPU.md`."""
