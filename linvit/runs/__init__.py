"""What a training run leaves on disk: its folder, checkpoints and weights."""
