"""The networks: MAR and its diffusion head, the tokenizers, and LazyMAR's caches beside them."""

import argparse

from torch.serialization import add_safe_globals

add_safe_globals(
    [argparse.Namespace]
)  # official checkpoints hold one: torch.load reads them safely
