"""From a trained network to numbers and plots to trust."""
