"""Exceptions whose message is all that the user needs."""


class InputError(ValueError):
    """Bad input from a user; the command line prints the message and exits with status 2."""


class Diverged(RuntimeError):
    """Training has diverged; the message says how. `healthy_until` is the last step without any sign of it."""

    def __init__(self, message: str, healthy_until: int = 0) -> None:
        super().__init__(message)
        self.healthy_until = healthy_until
