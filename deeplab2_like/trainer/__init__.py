"""Training: strategies, optimizer, checkpoints, the loop."""
