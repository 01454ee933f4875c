"""Ctrl-C and SIGTERM: the loop finishes its step first."""

import signal

from trainkit import distributed


class Signals:
    """Remembers Ctrl-C and SIGTERM, so that the loop can finish its step, write last.pt and leave.

    A second signal stops at once, except under `torchrun`. Terminals and schedulers send the signal to DataLoader
    workers as well, and a worker that dies of it takes the loop with it: `loader.make_loader` has them ignore it.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        # A batch system tells every process, and `torchrun` passes on to its own what it is told.
        if self.received is not None and not distributed.launched():
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = number

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop, or has lost its `torchrun`. A collective: all ask at the same place."""
        return distributed.all_reduce_any(self.received is not None or distributed.orphaned())

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C and 143 after SIGTERM, as shells have it; 143 too on a rank that got no signal itself."""
        return 128 + (self.received or signal.SIGTERM)
