"""The one exception that means "the user's input is wrong"."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """
