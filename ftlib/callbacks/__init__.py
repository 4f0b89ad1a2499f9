"""Callbacks of the training loop: history, progress, stopping, best weights."""
