"""State of a training: transactions, checkpoints and the format of their files."""
