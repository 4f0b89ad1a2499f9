"""Hyperparameter search: try many settings, keep the best."""
