"""Training: one step, the optimizer, averaged weights, monitoring."""
