"""Families of models behind one protocol, and what the scripts do with them."""

from engine.base import Family
from engine.janus import JanusFamily
from engine.llamagen import LlamaGenFamily
from engine.mar import MARFamily

_FAMILIES: tuple[Family, ...] = (MARFamily(), LlamaGenFamily(), JanusFamily())
FAMILIES = {family.name: family for family in _FAMILIES}
