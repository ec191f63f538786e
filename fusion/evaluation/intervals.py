"""Means, gains and retained shares with 95% bootstrap intervals over held-out rows (scipy's percentile bootstrap)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[low, high]."""
        return [self.low, self.high]


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """The (weighted) mean of `values` over rows. A loss per token is summed nats weighted by each row's tokens.

    Where every row is right, or every one wrong, the interval is Wilson's.
    """
    rows = np.asarray(values, dtype=float)
    if weights is None and len(rows) > 1 and np.ptp(rows) == 0 and rows[0] in (0, 1):  # nothing to resample
        exact = stats.binomtest(int(rows.sum()), len(rows)).proportion_ci(method="wilson")
        return Interval(float(rows[0]), float(exact.low), float(exact.high))
    return _weighted_mean(rows, np.ones_like(rows) if weights is None else np.asarray(weights, dtype=float))


def _weighted_mean(rows: np.ndarray, counts: np.ndarray) -> Interval:
    return _bootstrap((rows, counts), lambda v, w, axis=-1: v.sum(axis=axis) / w.sum(axis=axis))


def difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """mean(first) - mean(second), paired by row."""
    rows = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return _weighted_mean(rows, np.ones_like(rows) if weights is None else np.asarray(weights, dtype=float))


def retained_share(anchor: Sequence[float], fused: Sequence[float], own: Sequence[float]) -> Interval | None:
    """(fused - anchor) / (own - anchor) of per-row figures, paired by row.

    None where the own expert's gain over the anchor has no 95% interval clear of 0: there is nothing to retain.
    Scores and losses both work, as the sign cancels; for losses pass the negative, so that a gain is positive.
    """
    if difference(own, anchor).low <= 0:
        return None
    rows = tuple(np.asarray(figures, dtype=float) for figures in (anchor, fused, own))

    def share(a: np.ndarray, f: np.ndarray, o: np.ndarray, axis: int = -1) -> np.ndarray:
        gain = (o - a).mean(axis=axis)
        return (f - a).mean(axis=axis) / np.where(np.abs(gain) < 1e-9, np.nan, gain)

    return _bootstrap(rows, share)


def share_of_gain(anchor: float, loss: float, own: float, least: float = 0.0) -> float | None:
    """(anchor - loss) / (anchor - own) of losses that have no rows; None where the gain is not more than `least`."""
    gain = anchor - own
    return (anchor - loss) / gain if gain > least else None


def _bootstrap(rows: tuple[np.ndarray, ...], statistic: object) -> Interval:
    value = float(statistic(*rows))  # type: ignore[operator]
    if len(rows[0]) < 2 or all(np.ptp(column) == 0 for column in rows):
        return Interval(value, value, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # resamples that are all alike are no fault
        result = stats.bootstrap(
            rows, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile", rng=0
        )
    finite = result.bootstrap_distribution[np.isfinite(result.bootstrap_distribution)]  # a resample without any gain
    low, high = np.percentile(finite, [2.5, 97.5])
    return Interval(value, float(low), float(high))
