"""Training: options, model, loss, optimizer, the training step, checkpoints and logs."""
