"""What do the options for large models and few GPUs save in a training step of FG-CLIP: memory and time by turns.

    python benchmarks/fgclip_options.py --batch-size 4 --threads 1 --write
    python benchmarks/fgclip_options.py --accumulate 4 --batch-size 2 --threads 1 --options plain cached-negatives

Steps (forward, all four losses, backward, AdamW) take turns in one process. On a CPU the seconds are those that the
process was computing, so that other load does not count. Peak memory is that of two steps in a
fresh process each, above what it held before the first; gradients and optimizer state are in it.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trainkit.process_setup  # noqa: F401  before torch

import torch

from benchmarks import common
from benchmarks.fgclip_step import SIZES, WEIGHTS, make_batch
from fgclip import FGCLIP
from fgclip.freezing import freeze, train_unfrozen
from fgclip.lora import add_lora
from fgclip.objective import FGCLIPLoss
from trainkit.step import TrainStep

OPTIONS = {  # name -> frozen parts, rank of the adapters, whether all micro-batches are one batch
    "plain": ([], 0, False),
    "cached-negatives": ([], 0, True),
    "freeze-text": (["text"], 0, False),
    "freeze-text-cached-negatives": (["text"], 0, True),
    "freeze-vision": (["vision"], 0, False),
    "freeze-9-blocks": (["vision:9", "text:9"], 0, False),
    "lora-rank-8": ([], 8, False),
}


class Contender:
    """A model with its optimizer and an option of OPTIONS."""

    def __init__(self, name: str, args: argparse.Namespace):
        torch.manual_seed(0)
        model = FGCLIP(**SIZES[args.size])
        parts, rank, cached = OPTIONS[name]
        freeze(model, parts)
        if rank:
            add_lora(model, ("q_proj", "v_proj"), rank=rank, alpha=2 * rank, dropout=0.05)
        train_unfrozen(model.to(args.device))
        self.batches = [make_batch(args)] * args.accumulate
        self.batches = [self.batches] if cached else self.batches
        self.objective = FGCLIPLoss(model, names=list(WEIGHTS), banks={}, device=args.device)
        self.train_step = TrainStep(
            model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5), device=args.device,
            forward=lambda _, batch: (self.objective(batch), {}), amp=args.amp, describe=lambda batch: [str(batch)],
            weights={f"loss_{name}": weight for name, weight in WEIGHTS.items()},
        )  # fmt: skip

    def step(self) -> None:
        self.objective.begin(self.batches)
        self.train_step(self.batches)


def cpu_seconds(function) -> float:
    """Seconds of all threads of this process in one call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    parser = common.make_parser(__doc__, rounds=3)
    common.add_step_flags(parser, batch_size=4)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step (default: 1)")
    parser.add_argument("--options", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS), help="default: all")
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = "base"  # ViT-B/16
    torch.set_num_threads(args.threads)
    if args.memory_of:
        contender = Contender(args.memory_of, args)
        return print(common.extra_memory(lambda: [contender.step() for _ in range(2)], args.device))

    peaks = {name: common.in_fresh_process(f"--memory-of={name}") for name in args.options}
    seconds = cpu_seconds if args.device == "cpu" else common.wall_seconds
    contenders = {name: Contender(name, args).step for name in args.options}
    times = common.take_turns(contenders, args.rounds, seconds=seconds)
    rows = common.time_rows(times, args.options[0])
    for row, peak in zip(rows, peaks.values(), strict=True):
        row += [f"{peak:.0f}", f"{peak / peaks[args.options[0]]:.2f}"]
    columns = ["step", *common.TIME_COLUMNS[1:4], "time over the first (all rounds)", "peak MiB", "over the first"]
    report = [
        f"# Options of FG-CLIP training, ViT-B/16 at 224, {args.accumulate} x {args.batch_size} images, amp {args.amp}",
        f"{common.machine(args.device)}; {args.rounds} rounds",
        common.table(columns, rows),
    ]
    common.finish(report, f"fgclip-options-{args.device}-{args.amp}-{args.accumulate}x{args.batch_size}", args.write)


if __name__ == "__main__":
    main()
