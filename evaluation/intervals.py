"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` `(n,)`, from 2,000 resamples; the same every time."""
    means = values[np.random.default_rng(0).integers(len(values), size=(2000, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summarize(values: Iterable[float]) -> dict[str, Any]:
    """Mean, count, and 95 % bootstrap interval of the mean (`low`, `high`; None for a single value)."""
    array = np.asarray(list(values))
    low, high = bootstrap_interval(array) if len(array) > 1 else (None, None)
    return {"mean": float(array.mean()), "low": low, "high": high, "count": len(array)}
