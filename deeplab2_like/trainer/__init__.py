"""Training: strategies, optimiser, checkpoints, the loop."""
