"""The stages of training as tasks for the loop."""
