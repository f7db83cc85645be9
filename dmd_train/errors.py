"""The one exception whose message is written for the person at the keyboard."""


class UserError(Exception):
    """Bad input. The message is one line: the file or key, its value, and the way out."""
