"""A training run: loop, step, state, checkpoints, guards, monitors."""
