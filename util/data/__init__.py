"""Training data: class folders, cached latents, checks, batches."""
