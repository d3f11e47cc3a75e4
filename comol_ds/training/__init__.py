"""The run: data, batches, the training loop, metrics and checkpoints."""
