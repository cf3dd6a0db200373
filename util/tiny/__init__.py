"""Data, scores and trainings of the bundled models."""
