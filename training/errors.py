"""Bad input ends a script with one sentence and exit status 2, Ctrl-C with 130, and neither with a traceback."""

import contextlib
import sys


class InputError(ValueError):
    """Bad input. The message is one sentence that names the file, flag or key and what was expected."""


@contextlib.contextmanager
def one_sentence(*kinds: type[Exception]):
    """Print an `InputError`, an `OSError` or one of `kinds` as one sentence on standard error and exit with status 2.

    An exception from a DataLoader worker carries the worker's traceback in its message; only its last sentence shows.
    A KeyboardInterrupt that comes so far exits with status 130, as shells have it.
    """
    try:
        yield
    except (InputError, OSError, *kinds) as error:
        name = type(error).__name__
        sentence = str(error).rsplit(f"{name}: ", 1)[-1].strip()
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
