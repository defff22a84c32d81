"""Checks of settings, with one clear error each."""


def require_number(name, value, minimum, maximum, integer=False, below=False):
    """Check that a setting is a number within limits.

    Parameters
    ----------
    name : str
        Name of the setting in the error.
    value : object
        Value to check.
    minimum : float
        Smallest permitted value.
    maximum : float
        Largest permitted value.
    integer : bool, default False
        Whether the number must be an `int`.
    below : bool, default False
        Whether `maximum` itself is excluded.

    Raises
    ------
    ValueError
        If the value is of another type or out of range.
    """
    types, noun = (int, "an integer") if integer else (int | float, "a number")
    fits = isinstance(value, types) and not isinstance(value, bool) and minimum <= value <= maximum
    if not fits or (below and value == maximum):
        limit = ("below " if below else "") + (f"{maximum:,}" if integer else f"{maximum}")
        raise ValueError(f"{name} must be {noun} from {minimum} to {limit}, not {value!r}")
