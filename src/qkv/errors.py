"""The one exception class for mistakes a user can mend."""


class InputError(ValueError):
    """Something the user gave cannot work: one line saying what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
