"""Groups dealt to splits: at random, and as near to the shares asked for as whole groups allow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.samplers.ranks import epoch_random

__all__ = ["assign", "checked_fractions", "joined_groups"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def checked_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """Names of splits and their shares, as plain values.

    Raises:
        UsageError: fewer than two splits, a share that is not positive, or shares that do not sum to 1.
    """
    if not isinstance(fractions, Mapping) or len(fractions) < 2:
        raise UsageError(f"fractions names two or more splits, as {{'train': 0.8, 'val': 0.2}}, not {fractions!r}.")
    try:
        shares = {str(name): float(share) for name, share in fractions.items()}
    except (TypeError, ValueError):
        raise UsageError(f"fractions maps names of splits to numbers, not {dict(fractions)!r}.") from None
    if not all(share > 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise UsageError(f"fractions are positive and sum to 1, not {shares} (sum {sum(shares.values()):g}).")
    return shares


def assign(
    groups: Integers, weights: Floats, classes: Integers | None, shares: Floats, seed: int, what: str, remedy: str
) -> npt.NDArray[np.int64]:
    """The split of each item `[N]`, a number into `shares`: whole groups, dealt at random.

    Heaviest groups first, rarest classes first of all; each goes to a split drawn in proportion to what that split
    still lacks of the group's rarest class, among those in which it fits; where it fits in none, to the one that
    still lacks some of this class and most of all (the iterative stratification of Sechidis et al. 2011, weighted).
    A split that is left without any group gets the lightest one of the split that has most above its share.

    Args:
        groups: The group of each item `[N]`, numbers from 0.
        weights: What each item counts `[N]`.
        classes: The class of each item `[N]`, numbers from 0, whose shares are to be alike in all splits; or None.
        shares: Of each split, positive, sum 1.
        seed: Of the order and the draws.
        what: What groups are, for the message.
        remedy: What to do where there are too few of them.

    Raises:
        UsageError: fewer groups than splits.
    """
    count = int(np.max(groups)) + 1
    if count < len(shares):
        raise UsageError(f"There are {count} {what} for {len(shares)} splits; each needs one at least: {remedy}.")
    kinds = np.zeros(len(groups), np.int64) if classes is None else classes
    totals: Floats = np.bincount(kinds, weights).astype(np.float64)
    # One entry for each group and class in it.
    pair, entry = np.unique(groups * len(totals) + kinds, return_inverse=True)
    amounts: Floats = np.bincount(entry.reshape(-1), weights).astype(np.float64)
    owner, kind = pair // len(totals), pair % len(totals)
    starts: Integers = np.searchsorted(owner, np.arange(count + 1)).astype(np.int64)
    order = np.lexsort((totals[kind], owner))
    rarest = kind[order][starts[:-1]]
    heavy: Floats = np.bincount(groups, weights, count).astype(np.float64)
    random = epoch_random(seed, 0)
    turns = np.lexsort((random.random(count), -heavy, totals[rarest]))
    dealt = _dealt(turns, rarest, (starts, kind, amounts), np.outer(totals, shares), random.random(count))
    return _nobody_empty(dealt, heavy, shares)[groups]


def _dealt(
    turns: Integers, rarest: Integers, entries: tuple[Integers, Integers, Floats], quotas: Floats, draws: Floats
) -> npt.NDArray[np.int64]:
    """One pass over the groups in their order; plain lists, because a group is too little work for an array."""
    starts, kind, amounts = (part.tolist() for part in entries)
    lacks, total = quotas.tolist(), quotas.sum(axis=0).tolist()
    slack = 1e-9 * sum(total)
    out = np.zeros(len(turns), np.int64)
    for group, draw, key in zip(turns.tolist(), draws.tolist(), rarest[turns].tolist(), strict=True):
        mine = range(starts[group], starts[group + 1])
        own = next(amounts[i] for i in mine if kind[i] == key)
        lack = lacks[key]
        chosen = _drawn([v if v + slack >= own else 0.0 for v in lack], draw)
        if chosen is None:
            lacking = [s for s, v in enumerate(lack) if v > slack] or range(len(lack))
            chosen = max(lacking, key=lambda s: (total[s], lack[s]))
        out[group] = chosen
        for i in mine:
            lacks[kind[i]][chosen] -= amounts[i]
            total[chosen] -= amounts[i]
    return out


def _drawn(chances: list[float], draw: float) -> int | None:
    """The place that a uniform number falls in; None where there is no chance at all."""
    left = draw * sum(chances)
    last = None
    for place, chance in enumerate(chances):
        if chance > 0:
            last = place
            left -= chance
            if left < 0:
                break
    return last


def _nobody_empty(dealt: Integers, heavy: Floats, shares: Floats) -> npt.NDArray[np.int64]:
    for split in np.setdiff1d(np.arange(len(shares)), dealt):
        counts = np.bincount(dealt, minlength=len(shares))
        above = np.bincount(dealt, heavy, len(shares)) - shares * heavy.sum()
        giver = int(np.argmax(np.where(counts > 1, above, -np.inf)))
        its = np.flatnonzero(dealt == giver)
        dealt[its[np.argmin(heavy[its])]] = split
    return dealt


def joined_groups(count: int, a: Integers, b: Integers) -> npt.NDArray[np.int64]:
    """The connected component of each of `count` items, numbered from 0 in the order of their first items `[count]`.

    Args:
        count: Items.
        a: One end of each connection `[M]`.
        b: The other end `[M]`.
    """
    label = np.arange(count)
    while True:
        low, one, two = label.copy(), label[a], label[b]
        np.minimum.at(low, one, two)
        np.minimum.at(low, two, one)
        while True:  # labels point at items: follow them to the end
            further = low[low]
            if np.array_equal(further, low):
                break
            low = further
        if np.array_equal(low, label):
            break
        label = low
    return np.unique(label, return_inverse=True)[1].reshape(-1)
