"""The one kind of error that a user's input can cause."""


class FluxError(ValueError):
    """Bad input: a single clear line that names the thing, its value and what would be right.

    Scripts print it after `error: ` and exit with status 2; every other exception is a defect and keeps its
    traceback.
    """
