"""From network and batches to a trained network: the loop, its steps, fits and fine-tuning."""
