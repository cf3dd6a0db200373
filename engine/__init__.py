"""Families of models behind one interface, their flags and their evaluation."""

from engine.base import Family
from engine.janus import JanusFamily
from engine.llamagen import LlamaGenFamily
from engine.mar import MARFamily

_FAMILIES: tuple[Family, ...] = (MARFamily(), LlamaGenFamily(), JanusFamily())
FAMILIES = {family.name: family for family in _FAMILIES}
