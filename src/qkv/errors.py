"""The one exception class for mistakes a user can mend."""

from importlib.util import find_spec


class InputError(ValueError):
    """Something the user gave cannot work: one line saying what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def need(what: str, extra: str, *packages: str) -> None:
    """Raise InputError unless all of the packages are installed.

    what: that needs them, as the message begins; extra: of qkv, which brings them.
    """
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f"{what} needs {package}: pip install 'qkv[{extra}]'")
