"""Several records on one chip: the first valid pixel wins, and nothing is fetched that cannot matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import DataError
from rasteret_ml.raster.chip import Chip, Scaling, scaling_of
from rasteret_ml.raster.plan import fill_value
from rasteret_ml.raster.requests import ChipRequest, Layer, next_layers


class Mosaic:
    """The state of one chip between rounds of reading.

    Each pixel has a rank: 0 outside every raster, 1 inside one, 2 valid and, with `clear_first`, 3 clear. A later
    record replaces the pixels for which it has a higher rank.
    """

    def __init__(self, request: ChipRequest) -> None:
        self.request = request
        self._planned = 0
        self._chip: Chip | None = None
        self._rank = np.zeros(request.grid.shape, np.uint8)
        self._supplier: Layer | None = None
        self._overlapping: Layer | None = None

    def next_layers(self) -> Sequence[Layer]:
        """Return the request's layers, then plan the next ones, up to one that covers the chip; none if it is complete.

        Data that could not be planned raise DataError or FetchError.
        """
        if self.request.error is not None:
            raise self.request.error
        best = 3 if self.request.rules.clear_first else 2
        layers: Sequence[Layer] = self.request.layers
        if self._planned:
            if self._planned >= len(self.request.records) or (self._rank == best).all():
                return ()
            layers = list(next_layers(self.request, self._planned))
        self._planned += len(layers)
        return layers

    def add(self, layer: Layer, chip: Chip, quality: Chip | None) -> None:
        """Use a record's pixels where earlier records left gaps.

        A record of another scale or offset than the first raises DataError, unless the rules say `harmonize`.
        """
        rules = self.request.rules
        valid, clear = chip.valid_all, None
        rank = chip.covered.astype(np.uint8) + valid
        if quality is not None:
            assert rules.quality is not None
            clear = rules.quality.apply(quality.data[0], quality.valid[0]) & valid
            if rules.clear_first:
                rank += clear
        if self._chip is None:
            self._chip, self._rank = replace(chip, clear=clear), rank
            self._note_supplier(layer, chip, valid)
            return
        better = rank > self._rank
        if not better.any():
            return
        data = self._in_first_units(layer, chip)
        self._note_supplier(layer, chip, valid & better)
        np.copyto(self._chip.data, data, where=better)
        np.copyto(self._chip.valid, chip.valid, where=better)
        np.copyto(self._rank, rank, where=better)
        if clear is not None:
            np.copyto(self._chip.clear, clear, where=better)

    def _note_supplier(self, layer: Layer, chip: Chip, used: npt.NDArray[np.bool_]) -> None:
        """Remember the first record that supplied a valid pixel, and the first whose raster overlaps the chip."""
        if self._supplier is None and used.any():
            self._supplier = layer
        if self._overlapping is None and chip.covered.any():
            self._overlapping = layer

    def _in_first_units(self, layer: Layer, chip: Chip) -> npt.NDArray[Any]:
        """Return a record's pixels in the stored units of the first record that supplied valid ones."""
        if self._supplier is None:
            return np.asarray(chip.data)
        first, own = scaling_of(self._supplier.image), scaling_of(layer.image)
        if first.numbers == own.numbers:
            return np.asarray(chip.data)
        if not self.request.rules.harmonize:
            raise DataError(
                f"Records {self._supplier.record.id} and {layer.record.id} meet in one chip but have different scale "
                f"or offset ({first}; {own}); convert them with harmonize=True, or split the Collection by them, for "
                "example with where()."
            )
        nodata = [band.source.nodata for band in self._supplier.image.bands]
        return first.restore(own.values(chip.data), chip.data, np.asarray(chip.valid), nodata)

    def finish(self) -> Chip:
        """Return the finished chip."""
        assert self._chip is not None
        first, supplier = self.request.layers[0].image, self._supplier or self._overlapping
        return replace(
            self._chip,
            covered=self._rank > 0,
            record=None if supplier is None else supplier.record,
            scaling=Scaling.none(len(first.bands)) if supplier is None else scaling_of(supplier.image),
            fill=tuple(fill_value(band.source.nodata, first.dtype) for band in first.bands),
        )
