"""What a user did wrong, in one sentence; the command line prints it and exits with 2."""


class UserError(Exception):
    """A mistake the user can mend: what was found, where, and what to do. Never shown with a traceback."""
