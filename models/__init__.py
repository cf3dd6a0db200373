"""The networks: MAR and its diffusion head, the GPTs, the tokenizers, and the caches.

Importing it lets torch's safe loader read `argparse.Namespace`, in which the official checkpoints keep
their flags: `torch.load(path)["model_ema"]` of the original's notebook works with torch 2.6 and later.
"""

import argparse

from torch.serialization import add_safe_globals

add_safe_globals([argparse.Namespace])
