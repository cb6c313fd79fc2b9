"""Values of JSON that anyone may have written: what they should be, else nothing."""

from lowbit.guards.escape import terminal


def number(value) -> float | None:
    """A number that is not negative and below 10^18: sizes, counts, errors and times all are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e18 else None


def text(value) -> str:
    """A string with what cannot be seen spelled out: control characters, half surrogates, reversed writing."""
    if not isinstance(value, str):
        return ""
    return terminal(value)


def mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def mappings(value) -> list[dict]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
