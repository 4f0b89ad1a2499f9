"""From a trained network to numbers and pictures to trust."""
