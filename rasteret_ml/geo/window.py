"""Windows: boxes of whole pixels."""

from __future__ import annotations

from dataclasses import dataclass

from rasteret_ml.errors import UsageError

__all__ = ["Window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of pixels; it may reach past the image (boundless), with negative rows and columns."""

    row: int
    """First row."""
    col: int
    """First column."""
    height: int
    """Rows, at least 1."""
    width: int
    """Columns, at least 1."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"A window must have at least one row and column, got {self.height} x {self.width}.")

    @property
    def row_stop(self) -> int:
        """Row just past the last one (exclusive)."""
        return self.row + self.height

    @property
    def col_stop(self) -> int:
        """Column just past the last one (exclusive)."""
        return self.col + self.width

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to index an array that starts at row 0 and column 0."""
        return slice(self.row, self.row_stop), slice(self.col, self.col_stop)

    def intersection(self, other: Window) -> Window | None:
        """Return the shared pixels, None if there are none."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        height = min(self.row_stop, other.row_stop) - row
        width = min(self.col_stop, other.col_stop) - col
        if height < 1 or width < 1:
            return None
        return Window(row=row, col=col, height=height, width=width)

    def relative_to(self, origin: Window) -> Window:
        """Return the same pixels, counted from the first row and column of `origin`."""
        return Window(row=self.row - origin.row, col=self.col - origin.col, height=self.height, width=self.width)

    def __str__(self) -> str:
        return f"rows {self.row}:{self.row_stop}, columns {self.col}:{self.col_stop}"
