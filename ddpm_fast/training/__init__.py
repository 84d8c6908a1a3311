"""Training: data readers, checkpoints, the trainer, and pictures of what it draws."""
