"""The smallest drop that a task's test set could have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lori_manager.auditing.results import POWER, SIGNIFICANCE, Sensitivity
from lori_manager.metrics.paired import PairedDifference
from lori_manager.metrics.power import smallest_drop, smallest_mean_drop


def sensitivity(steps: Sequence[PairedDifference], rows: int, several: int) -> Sensitivity | None:
    """What a comparison on these rows can show; None without a step to learn from.

    Args:
        steps: what was seen from version to version; its median share of rows that change
            is assumed, or for graded outcomes its median standard deviation.
        rows: of the test set.
        several: tasks; the level is the strictest of Holm's.
    """
    measured = [d for d in steps if d.rows > 0 and not math.isnan(d.error)]
    if not measured:
        return None
    alpha = SIGNIFICANCE / several
    shares = [
        (d.only_a_right + d.only_b_right) / d.rows
        for d in measured
        if d.only_a_right is not None and d.only_b_right is not None
    ]
    if len(shares) == len(measured):
        # Rounded, so that one task's figure serves another's.
        found = smallest_drop(rows, round(median(shares), 3), alpha=alpha / 2, power=POWER)
    else:
        spread = median(d.error * math.sqrt(d.rows) for d in measured)
        found = smallest_mean_drop(rows, spread, alpha=alpha / 2, power=POWER)
    return Sensitivity(
        found.drop, rows, found.discordance, found.deviation, alpha, POWER, found.assumption
    )
