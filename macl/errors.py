"""What a person can mend: bad files, folders, values."""

from training.errors import InputError

__all__ = ["InputError"]
