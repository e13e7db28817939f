"""The samplers' door: random chips, grids of chips, a chip for each AOI."""

from __future__ import annotations

from rasteret_ml.sampling.drawing import Placement, RandomAOISampler
from rasteret_ml.sampling.each import EachAOISampler
from rasteret_ml.sampling.grids import GridAOISampler

__all__ = ["EachAOISampler", "GridAOISampler", "Placement", "RandomAOISampler"]
