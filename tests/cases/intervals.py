"""What an interval claims, in a figure that tells more of each repeat than whether it holds the truth."""

import math


def miss(truth, value, low, high):
    """How far a value is from the truth, on a log scale, as a share of what its interval allows on that side.

    Of right 95 % intervals one in twenty is above 1, and the root mean square over repeats is about 0.5; of intervals
    half as wide twice that, which few repeats tell. An end of None is open; one that lies beside its value is none.
    """
    if value is not None and not (low or 0.0) <= value <= (math.inf if high is None else high):
        return math.inf
    end = low if truth < (value or math.inf) else high
    if end is None or (value is None and end <= truth):
        return 0.0
    return abs(math.log(truth / value)) / max(abs(math.log(end / value)), 1e-12) if value else math.inf
