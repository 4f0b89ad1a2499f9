"""From predictions to probabilities and metrics."""
