"""Learning rates: schedules, optimizers, the finder."""
