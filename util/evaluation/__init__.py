"""Evaluation: generate images into a run folder and score them."""
