"""What a person can mend: bad files, folders, values."""

from trainkit.errors import InputError  # noqa: F401
