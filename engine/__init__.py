"""Families of models behind one interface, their flags and their evaluation."""

from engine.base import Family
from engine.janus import JanusFamily
from engine.llamagen import LlamaGenFamily
from engine.lumina import LuminaFamily
from engine.mar import MARFamily

_FAMILIES: tuple[Family, ...] = (MARFamily(), LlamaGenFamily(), JanusFamily(), LuminaFamily())
FAMILIES = {family.name: family for family in _FAMILIES}
