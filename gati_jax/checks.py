"""Checks of arguments that several rooms share."""

from .errors import InputError


def check_share(name: str, value: float) -> None:
    """Check that a number lies strictly between 0 and 1.

    Args:
        name: The argument, for the message.
        value: What was given; NaN is refused.

    Raises:
        InputError: It does not.
    """
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")
