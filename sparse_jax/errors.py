"""The one error for bad input: what was given, what is allowed, what to do, in one line."""


class InputError(ValueError):
    """Something the caller gave cannot be used. The message is one line fit to be shown to a user as it is.

    Experiments print it as `error: ...` and end with exit code 2; anything else that is raised is a fault of the
    library and keeps its traceback.
    """
