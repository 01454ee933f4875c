"""The loop of a run: epochs and steps, checkpoints when they are due, and a clean end on Ctrl-C."""

import argparse
from collections.abc import Callable, Iterable

from training import distributed
from training.checkpoint import Signals
from training.log import RunLog
from training.sampler import ResumableSampler
from training.step import Stepper, micro_batches


def run_epochs(
    args: argparse.Namespace,
    loader: Iterable,
    sampler: ResumableSampler,
    stepper: Stepper,
    log: RunLog,
    *,
    step: Callable[[list, int], None],
    validate: Callable[[int], None],
    save: Callable[[str], None],
    begin_epoch: Callable[[int], bool] = lambda epoch: True,
) -> None:
    """Train from where `sampler` stands until --epochs or --max-steps are over; then close the log and the group.

    step(batches, epoch): one step of `stepper` over a list of micro-batches, and what is logged of it. When it is
        called the sampler counts its batches as done, so that a checkpoint written in it goes on behind them.
    validate(epoch): after every --validate-every epochs and after the last. save(name): write a checkpoint; last.pt
        after every --save-every steps and every epoch, epoch-N.pt after every --keep-every.
    begin_epoch(epoch): before the first batch of each; False ends the run there. Epochs count from 1.

    After Ctrl-C or SIGTERM the step is finished, last.pt written, and SystemExit raised with the customary status.
    """
    with Signals() as signals:
        for epoch in range(sampler.epoch + 1, args.epochs + 1):
            if not begin_epoch(epoch):
                break
            sampler.set_epoch(epoch - 1)
            done = False
            for batches in micro_batches(loader, args.accumulate) if len(sampler) else ():
                sampler.advance(len(batches))
                step(batches, epoch)
                stop = signals.stop_requested()
                done = args.max_steps is not None and stepper.steps >= args.max_steps
                if stop or stepper.steps % args.save_every == 0:
                    save("last.pt")
                if stop:
                    log.say(f"stopped at step {stepper.steps}; go on with --resume {args.output}")
                    log.close()
                    raise SystemExit(signals.exit_status)
                if done:
                    break
            last = done or epoch == args.epochs
            if last or epoch % args.validate_every == 0:
                validate(epoch)
            if len(sampler) == 0:
                sampler.set_epoch(epoch)  # a run resumed here goes straight on
            save("last.pt")
            if args.keep_every and epoch % args.keep_every == 0:
                save(f"epoch-{epoch}.pt")
            if last:
                break
    log.close()
    distributed.stop()
