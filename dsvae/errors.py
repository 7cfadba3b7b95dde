"""The one exception for what a user can cause and can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the command, the configuration or the data.

    The message is one line that says what is wrong, where, and what to do about it. The entry points print it to stderr
    as it stands and leave with exit code 2; nothing has been half-written by then.
    """


EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count it."""
