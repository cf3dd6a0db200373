"""Families of models behind one protocol, and what the scripts do with them."""

from engine.base import Family
from engine.llamagen import LlamaGenFamily
from engine.mar import MARFamily

FAMILIES: dict[str, Family] = {family.name: family for family in (MARFamily(), LlamaGenFamily())}
