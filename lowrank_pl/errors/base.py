"""The common ancestor of every exception the package raises on purpose."""


class LowRankError(ValueError):
    """What happened, what was given, what is allowed, what to do: in that order, values quoted.

    It is a `ValueError`, so that callers who know nothing of this package still catch bad input as such.
    """
