"""From a trained network to answers for new images, and to files for other programs."""
