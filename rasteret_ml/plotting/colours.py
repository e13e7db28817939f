"""A colour for each class: the user's own, else one that its number always has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgba, to_rgba_array

from rasteret_ml.errors import UsageError

__all__ = ["NAMED_PALETTE", "Colour", "ColourTable", "class_colours", "class_names", "painted", "palette_colour"]

Colour = str | Sequence[float]
"""A name ("forestgreen"), a hex text ("#228b22"), or red, green, blue (and alpha) in 0..1 or 0..255."""
ColourTable = Mapping[int, Colour] | Sequence[Colour]
"""Colours by class number; a sequence counts from 0."""

NAMED_PALETTE = {
    "indigo": "#332288", "sand": "#DDCC77", "green": "#117733", "rose": "#CC6677", "cyan": "#88CCEE",
    "wine": "#882255", "teal": "#44AA99", "olive": "#999933", "purple": "#AA4499",
}  # fmt: skip
"""Paul Tol's "muted" scheme (SRON/EPS/TN/09-002, issue 3.2, figure 5): told apart with any kind of colour vision."""

_BASE = to_rgba_array(list(NAMED_PALETTE.values()))
_SHADES = ((0.0, 0.0), (0.5, 1.0), (0.4, 0.0))
"""Each time round the palette: how far towards what (0 black, 1 white)."""


def palette_colour(number: int) -> tuple[float, float, float, float]:
    """The colour (r, g, b, a in 0..1) that a class number always has.

    The nine of the palette, then the same lightened, then darkened; class 27 looks like class 0.
    """
    turn, place = divmod(int(number), len(_BASE))
    share, towards = _SHADES[turn % len(_SHADES)]
    r, g, b = (float(v) * (1 - share) + towards * share for v in _BASE[place, :3])
    return r, g, b, 1.0


def class_colours(
    classes: Iterable[int], colours: ColourTable | None = None
) -> dict[int, tuple[float, float, float, float]]:
    """A colour (r, g, b, a in 0..1) for each class, from `colours` where it lists the class, else the palette's.

    Whole numbers in tuples count 0..255 where any tuple of the table goes beyond 1, as a file's colour table does;
    otherwise 0..1.

    Raises:
        UsageError: something that is not a colour; the message names its class.
    """
    table = _by_number(colours, "colours")
    in_bytes = any(_is_whole(colour) and max(colour) > 1 for colour in table.values())
    return {
        int(c): _rgba(int(c), table[int(c)], in_bytes) if int(c) in table else palette_colour(int(c)) for c in classes
    }


def class_names(classes: Iterable[int], names: Mapping[int, str] | Sequence[str] | None = None) -> dict[int, str]:
    """What each class is called: its entry in `names`, else "class 7"."""
    table = _by_number(names, "classes")
    return {int(c): str(table.get(int(c), f"class {int(c)}")) for c in classes}


def painted(
    labels: npt.NDArray[Any], colours: Mapping[int, tuple[float, float, float, float]]
) -> npt.NDArray[np.uint8]:
    """Class numbers `[H, W]` as `[H, W, 4]` bytes; a class without a colour is transparent."""
    present, places = np.unique(labels, return_inverse=True)
    table = np.array([colours.get(int(c), (0.0, 0.0, 0.0, 0.0)) for c in present], np.float64).reshape(-1, 4)
    return np.asarray(np.round(table * 255).astype(np.uint8)[places.reshape(labels.shape)])


def _by_number(table: Any, argument: str) -> dict[int, Any]:
    if table is None:
        return {}
    if isinstance(table, Mapping):
        return {int(number): value for number, value in table.items()}
    if isinstance(table, str) or not isinstance(table, Sequence):
        raise UsageError(f"{argument}= is a mapping by class number or a list from class 0 on, not {table!r}.")
    return dict(enumerate(table))


def _is_whole(colour: Any) -> bool:
    if isinstance(colour, str) or not isinstance(colour, (Sequence, np.ndarray)) or len(colour) not in (3, 4):
        return False
    return all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in colour)


def _rgba(number: int, colour: Any, in_bytes: bool) -> tuple[float, float, float, float]:
    try:
        scaled = [v / 255 for v in colour] if in_bytes and _is_whole(colour) else colour
        r, g, b, a = to_rgba(scaled)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"The colour of class {number} is {colour!r}: give a name, a hex text, or red, green, blue in 0..1 or "
            f"0..255 ({error})."
        ) from None
    return float(r), float(g), float(b), float(a)
