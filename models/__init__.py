"""The networks: MAR and its diffusion head, the tokenizers, and LazyMAR's caches beside them."""
