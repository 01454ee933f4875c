"""What a person can mend: bad files, folders, values."""


class InputError(ValueError):
    """Bad input. The message is one sentence that names the file, flag or key and what was expected."""
