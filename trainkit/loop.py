"""The loop of a run: epochs and steps, checkpoints when they are due, and a clean end on Ctrl-C."""

import argparse
from collections.abc import Callable, Iterable

from trainkit import distributed
from trainkit.checkpoint import Signals
from trainkit.log import RunLog
from trainkit.sampler import ResumableSampler
from trainkit.step import TrainStep, micro_batches


def run_epochs(
    args: argparse.Namespace,
    loader: Iterable,
    sampler: ResumableSampler,
    stepper: TrainStep,
    log: RunLog,
    *,
    step: Callable[[list, int], None],
    validate: Callable[[int, Callable[[], None]], str | None],
    save: Callable[[str], None],
    begin_epoch: Callable[[int], bool] = lambda epoch: True,
) -> None:
    """Train from where `sampler` stands until --epochs or --max-steps are over; then close the log and the group.

    step(batches, epoch): one step of `stepper` over a list of micro-batches, and what is logged of it. When it is
        called the sampler counts its batches as done, so that a checkpoint written in it goes on behind them.
    validate(epoch, between): before the first step (epoch 0), after every --validate-every epochs, after the last, and
        after the steps of --validate-at; once a step. It calls `between`, a collective, as often as it may end. -> why
        this is the best model so far, for the log, where it is; then it is kept as best.pt.
    save(name): write a checkpoint; last.pt after every --save-every steps, and before and after each validation,
        epoch-N.pt after every --keep-every epochs.
    begin_epoch(epoch): before the first batch of each; False ends the run there. Epochs count from 1.

    After Ctrl-C or SIGTERM, or when `torchrun` is gone, the step is finished or the validation given up, last.pt
    written, and SystemExit raised with the customary status. A run that goes on from a last.pt does what an
    uninterrupted one did, wherever it was ended: what the checkpoint counts as validated is in the log, and the rest is
    done again.
    """
    written = None  # the place in the run that last.pt holds
    validate_at = getattr(args, "validate_at", ())

    def save_last() -> None:
        nonlocal written
        place = stepper.steps, stepper.validated, sampler.epoch, sampler.position
        if place != written:
            save("last.pt")
            written = place

    def leave_if_asked() -> None:
        if signals.stop_requested():
            save_last()
            log.say(f"stopped at step {stepper.steps}; go on with --resume {args.output}")
            log.close()
            distributed.stop()
            raise SystemExit(signals.exit_status)

    def validate_once(epoch: int) -> None:
        if stepper.validated == stepper.steps:
            return
        save_last()
        best = validate(epoch, leave_if_asked)
        stepper.validated = stepper.steps
        if best is not None:
            save("best.pt")
            log.say(f"{best}, kept in {args.output}/best.pt")

    def out_of_steps() -> bool:
        return args.max_steps is not None and stepper.steps >= args.max_steps

    with Signals() as signals:
        if stepper.steps == 0:
            validate_once(0)
        for epoch in range(sampler.epoch + 1, args.epochs + 1):
            if not begin_epoch(epoch):
                break
            sampler.set_epoch(epoch - 1)
            if stepper.steps in validate_at:
                validate_once(epoch)
            for batches in micro_batches(loader, args.accumulate) if len(sampler) and not out_of_steps() else ():
                sampler.advance(len(batches))
                before = stepper.steps
                step(batches, epoch)
                if stepper.steps > before and stepper.steps % args.save_every == 0:
                    save_last()
                leave_if_asked()
                if stepper.steps in validate_at:
                    validate_once(epoch)
                if out_of_steps():
                    break
            last = out_of_steps() or epoch == args.epochs
            if last or epoch % args.validate_every == 0:
                validate_once(epoch)
            if len(sampler) == 0:
                sampler.set_epoch(epoch)  # a run resumed here goes straight on
                if args.keep_every and epoch % args.keep_every == 0:
                    save(f"epoch-{epoch}.pt")
            save_last()
            if last:
                break
            leave_if_asked()
    log.close()
    distributed.stop()
