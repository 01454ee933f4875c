"""Bad input ends a script with one sentence and exit status 2, Ctrl-C with 130, and neither with a traceback."""

import contextlib
import signal
import sys
from pickle import UnpicklingError

MAX_MESSAGE = 480  # characters of a sentence
LOST_PROCESS = (
    "a loading process was lost ({}): memory, room in /dev/shm or open files (ulimit -n) ran out; "
    "use fewer --workers or a smaller --batch-size"
)


class InputError(ValueError):
    """Bad input: one sentence that names the file, flag or key and what was expected.

    It stays on one printable line of at most MAX_MESSAGE characters, whatever a damaged file put into it.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        if text.startswith("Caught InputError in "):  # of a loading process, behind its traceback
            text = text.rstrip("\n").rpartition("\n")[2].partition("InputError: ")[2]
        super().__init__(one_line(text, MAX_MESSAGE))


def one_line(text: str, limit: int) -> str:
    """`text` with what cannot be printed written as an escape, and without its middle where it is longer."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit * 3 // 4]} ... {text[5 - limit // 4 :]}"


def lost_process(error: BaseException) -> str | None:
    """The sentence where `error` says that a process of a DataLoader is gone, or cannot hand over what it loaded."""
    text = str(error).strip() or type(error).__name__
    inside = "in DataLoader worker process" in text  # what a data set raised there
    signs = ("can't allocate memory",) if inside else ("DataLoader worker (pid", "items of ancdata")
    gone = isinstance(error, OSError | EOFError | UnpicklingError) and not inside
    if gone or (isinstance(error, RuntimeError) and any(sign in text for sign in signs)):
        return LOST_PROCESS.format(text.splitlines()[-1].rstrip(". "))
    return None


def out_of_memory(error: BaseException) -> str | None:
    """The sentence where `error` says that something is too large for the memory of the machine or the GPU."""
    text = str(error).strip() or type(error).__name__
    signs = ("allocate memory", "out of memory", "calculation overflowed", "multiplication overflow")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"not enough memory: a smaller --batch-size, image or model needs less ({text.splitlines()[0]})"
    return None


@contextlib.contextmanager
def one_sentence():
    """Print an InputError, an OSError or a lack of memory as one sentence on standard error; exit with status 2.

    Ctrl-C and SIGTERM exit with 130 and 143. Characters that the terminal does not know are printed as escapes.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        elif isinstance(error, RuntimeError | MemoryError):
            sentence = lost_process(error) or out_of_memory(error)  # a killed worker interrupts its parent anywhere
            if sentence is None:
                raise
        print(f"error: {one_line(sentence, MAX_MESSAGE)}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        print("interrupted" if number == signal.SIGINT else "terminated", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame) -> None:
    raise KeyboardInterrupt(number)
