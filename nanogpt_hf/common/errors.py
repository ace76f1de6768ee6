"""What a user has done wrong, as an exception of our own; whatever else is raised is a bug or the machine's."""


class UserError(ValueError):
    """A mistake in what the user gave: its message says in one sentence what is wrong, where, and what to do.

    Recipes print it without a traceback and end with status 2.
    """
