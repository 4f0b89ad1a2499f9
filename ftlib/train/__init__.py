"""From network and batches to a trained network: rates, schedules, freezing, history."""
