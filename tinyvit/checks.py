"""Checks of settings, each with one clear error."""


def require_number(name, value, least, most, integer=False, below=False):
    """Raise `ValueError` unless `value` is a number, or an integer, from `least` to `most` or to below `most`."""
    kind, what = (int, "an integer") if integer else (int | float, "a number")
    fits = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
    if not fits or (below and value == most):
        limit = f"{'below ' * below}{most:{',' * integer}}"
        raise ValueError(f"{name} must be {what} from {least} to {limit}, not {value!r}")
