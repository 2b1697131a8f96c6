"""The one exception that means: the input was at fault, and its message is all the user needs."""


class InputError(ValueError):
    """Bad input from a user (an option, a folder, a file); the command line prints the sentence and exits with 2."""
