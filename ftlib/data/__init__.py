"""From files to batches: sources, splits, transforms and the audit of images."""
