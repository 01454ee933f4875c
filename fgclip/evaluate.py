"""Evaluate FG-CLIP: retrieval, regions among hard negatives, boxes and folders by class names.

python -m fgclip.evaluate --checkpoint runs/NAME/best.pt                          # new synthetic scenes
python -m fgclip.evaluate --checkpoint WEIGHTS --task retrieval --annotations captions_val2017.json --image-root val2017
python -m fgclip.evaluate --checkpoint WEIGHTS --task long-retrieval --format dci --annotations DCI --image-root IMAGES
python -m fgclip.evaluate --checkpoint WEIGHTS --task fg-ovd --annotations FGOVD --image-root coco
python -m fgclip.evaluate --checkpoint WEIGHTS --task boxes --annotations instances_val2017.json --image-root val2017
python -m fgclip.evaluate --checkpoint WEIGHTS --task folder --image-root imagenet/val --class-names names.txt
python -m fgclip.evaluate --checkpoint WEIGHTS --suite sets.txt --cache features

WEIGHTS is a run's checkpoint, or a file or folder of CLIP's or FG-CLIP's published weights; --vocab names CLIP's merges
where they lie neither beside the weights nor in an installed CLIP package.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fgclip.data import benchmarks
from fgclip.data.dataset import RegionDataset, evenly
from fgclip.data.records import COCO, FGOVD, FineHARD, Record, annotation_files
from fgclip.embedding import Embedder
from fgclip.embedding_cache import CachedEmbedder
from fgclip.loading import check_image_size, load_model
from fgclip.model import FGCLIP
from fgclip.prompts import TEMPLATES, read_templates
from fgclip.synthetic import PLACEMENTS, SyntheticRegions
from fgclip.tasks import choice, classify, retrieval, validation_metrics
from fgclip.tokenizer import Tokenizer
from fgclip.transformer import ACTIVATIONS
from trainkit import distributed
from trainkit.arguments import make_parser, non_negative_int, positive_int
from trainkit.device import AUTOCAST
from trainkit.errors import InputError, one_sentence
from trainkit.files import read_lines, write_json
from trainkit.tables import aligned

FORMATS = {
    "coco": lambda args: COCO(args.annotations[0], most_captions=args.captions),
    "flickr30k": lambda args: benchmarks.Flickr30k(args.annotations[0], args.split, most_captions=args.captions),
    "finehard": lambda args: FineHARD(args.annotations[0]),
    "sharegpt4v": lambda args: benchmarks.ShareGPT4V(args.annotations[0]),
    "dci": lambda args: benchmarks.DCI(args.annotations[0]),
    "docci": lambda args: benchmarks.DOCCI(args.annotations[0], args.split),
    "urban1k": lambda args: benchmarks.CaptionFiles(args.annotations[0], args.image_root),
}
NEEDED = object()
RETRIEVAL = dict(annotations=NEEDED, image_root=NEEDED, split="test", captions=5, limit=None, crop=False)
TASKS = {  # the flags of each and their defaults, None where there is none
    "synthetic": dict(count=200, seed=20_000, placement="grid"),
    "retrieval": dict(format="coco", **RETRIEVAL),
    "long-retrieval": dict(format=NEEDED, **RETRIEVAL),
    "fg-ovd": dict(annotations=NEEDED, image_root=NEEDED, limit=None),
    "boxes": dict(annotations=NEEDED, image_root=NEEDED, templates=None, limit=None),
    "folder": dict(image_root=NEEDED, class_names=None, templates=None, limit=None, crop=False),
}
NOT_PERCENT = ("loss", "relative", "cosine", "cosine_unmatched", "effective_rank", "effective_rank_texts")
COLUMNS = 6  # of a table, so that it fits a terminal
LEVELS = {"h_": "hard", "1_": "hard", "m_": "medium", "2_": "medium", "e_": "easy", "3_": "easy", "shuffle": "trivial"}


# fmt: off
def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `open_model` reads."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run's best.pt or last.pt, or published weights")
    add("--base", metavar="PATH", help="of a run's best.pt that was trained with --base: those weights, if they moved")
    add("--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged (EMA) weights if any, or raw ones")
    add("--vocab", metavar="FILE", help="published weights: bpe_simple_vocab_16e6.txt.gz, merges.txt or "
        "tokenizer.json; bytes goes without, to no good where they were trained on merges")
    add("--trust-torchscript", action="store_true", help="read OpenAI's archives, which can hold code")
    add("--heads", type=positive_int, nargs=2, metavar=("VISION", "TEXT"), help="published weights without a config: "
        "attention heads of both towers; without it, of published sizes, width / 64")
    add("--activation", choices=tuple(ACTIVATIONS), help="published weights without a config; without it quick_gelu")
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the square that images are resized to, "
        "instead of that of the weights, whose positions are then interpolated")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the tasks, see TASKS, and of the run."""
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=tuple(TASKS), help="what to evaluate; without it and without data: synthetic")
    add("--suite", metavar="FILE", help="several data sets in one table: a name and the flags of a task on each line")
    add("--annotations", nargs="+", metavar="PATH", help="annotation file or folder; of fg-ovd one or several")
    add("--image-root", metavar="DIR", help="the folder that image names start from; folder: that of the class folders")
    add("--format", choices=FORMATS, help="retrieval: layout of the annotations (retrieval: coco)")
    add("--split", metavar="NAME", help="flickr30k, docci: which split (test)")
    add("--captions", type=positive_int, metavar="N", help="retrieval: most short captions per image (5)")
    add("--templates", metavar="FILE", help="boxes, folder: sentences with {} for the class name, one per line")
    add("--class-names", metavar="FILE", help="folder: one name per line for the folders, 2 before 10; else their own")
    add("--limit", type=positive_int, metavar="N", help="only the first N records; folder: N images evenly among all")
    add("--crop", action="store_true", default=None, help="scale the short side and cut out the centre, as CLIP does; "
        "otherwise images are squashed to a square, as FG-CLIP does")
    add = parser.add_argument_group("synthetic scenes").add_argument
    add("--count", type=positive_int, metavar="N", help="number of scenes (200)")
    add("--seed", type=non_negative_int, metavar="N", help="seed of the scenes (20000)")
    add("--placement", choices=PLACEMENTS, help="where the objects are (grid)")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=positive_int, default=32, metavar="N", help="images or texts at once, of each process")
    add("--workers", type=non_negative_int, default=2, metavar="N", help="loading processes of each process")
    add("--amp", choices=tuple(AUTOCAST), default="none", help="number format of the forward pass")
    add("--output", metavar="FILE", help="also write all metrics to this json file")
    add("--cache", metavar="DIR", help="keep the features of images there, for other tasks with the same weights")
# fmt: on


def open_model(args: argparse.Namespace) -> tuple[FGCLIP, Tokenizer]:
    """The model and tokenizer that `add_model_flags` name; args.image_size becomes the one to use."""
    options = ("weights", "trust_torchscript", "heads", "activation", "base")
    model, tokenizer = load_model(args.checkpoint, args.vocab, **{name: getattr(args, name) for name in options})
    if any(note.startswith("guessed") for note in model.load_report.notes) and distributed.is_main():
        print(model.load_report, file=sys.stderr)
    args.image_size = args.image_size or model.vision_model.image_size
    check_image_size(model, args.image_size)
    return model, tokenizer


def settle(args: argparse.Namespace) -> None:
    """Fill in the task's defaults. Raises InputError on a flag that is missing or that nothing would read."""
    if args.task is None:
        if args.annotations or args.image_root:
            raise InputError(f"--task is missing; expected one of {', '.join(TASKS)}")
        args.task = "synthetic"
    known = TASKS[args.task]
    for name in dict.fromkeys(name for flags in TASKS.values() for name in flags):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and name not in known:
            raise InputError(f"{flag} has no part in --task {args.task}")
        if value is None and known.get(name) is NEEDED:
            raise InputError(f"--task {args.task} needs {flag}")
        setattr(args, name, known.get(name) if value is None else value)
    if args.annotations and len(args.annotations) > 1 and args.task != "fg-ovd":
        raise InputError(f"--annotations: --task {args.task} takes one path, got {len(args.annotations)}")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise InputError(f"--output {args.output}: expected a file in a folder that exists")


def first_records(data: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """At most --limit records, all read."""
    records = [data[i] for i in range(min(len(data), args.limit or len(data)))]
    if not records:
        raise InputError(f"--annotations {args.annotations[0]}: expected at least one record, found none")
    return records


def fgovd_files(paths: list[str]) -> dict[str, Path]:
    """FG-OVD's files by the level that their published names stand for, hardest first; others by their own name."""
    files = [file for path in paths for file in annotation_files(path)]
    names = [next((level for start, level in LEVELS.items() if f.stem.startswith(start)), f.stem) for f in files]
    order = list(LEVELS.values())
    named = {name if names.count(name) == 1 else str(file): file for name, file in zip(names, files, strict=True)}
    return dict(sorted(named.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))


def evaluate(args: argparse.Namespace, embedder: Embedder) -> tuple[dict[str, dict], list[str]]:
    """Rows of metrics by name, and sentences about the data they are of."""

    def dataset(records: Sequence[Record]) -> RegionDataset:
        shown = dict(max_regions=0, crop=True) if args.crop else dict(max_regions=None)
        return RegionDataset(records, args.image_root, image_size=args.image_size, **shown)

    if args.task == "synthetic":
        data = SyntheticRegions(args.count, seed=args.seed, image_size=args.image_size, placement=args.placement)
        long = embedder.model.text_model.long_context_length is not None
        sentence = f"{args.count} drawn scenes of seed {args.seed}, {args.placement}"
        return validation_metrics(embedder, data, long=long), [sentence]
    if args.task in ("retrieval", "long-retrieval"):
        records = first_records(FORMATS[args.format](args), args)
        metrics, sentence = retrieval(embedder, dataset(records), long=args.task == "long-retrieval")
        return metrics, [sentence]
    if args.task == "fg-ovd":
        metrics, sentences = {}, []
        for name, file in fgovd_files(args.annotations).items():
            metrics[name], sentence = choice(embedder, dataset(benchmarks.by_image(first_records(FGOVD(file), args))))
            sentences.append(f"{name}: {sentence}")
        return metrics, sentences
    templates = read_templates(args.templates) if args.templates else TEMPLATES
    if args.task == "boxes":
        data = benchmarks.COCOBoxes(args.annotations[0])
        row, sentence = classify(embedder, dataset(first_records(data, args)), data.categories, templates, boxes=True)
        return {"boxes": row}, [sentence]
    data = benchmarks.ClassFolders(args.image_root, args.class_names)
    records = evenly(data, args.limit or len(data))
    row, sentence = classify(embedder, dataset(records), data.categories, templates, boxes=False)
    if args.class_names:
        sentence += "; folders: " + ", ".join(map(" = ".join, zip(data.folders, data.categories, strict=True)))
    return {"images": row}, [sentence]


def tasks_of(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, argparse.Namespace]:
    """The flags of every data set of --suite by its name, settled; without it those of the command by "".

    Raises InputError on a line without flags and on a name that occurs twice.
    """
    args = parser.parse_args(arguments)
    if args.suite is None:
        settle(args)
        return {"": args}
    tasks = {}
    for line in read_lines(args.suite, "lines of a name and flags"):
        name, *flags = shlex.split(line, comments=True) or [""]
        if flags and name not in tasks:
            tasks[name] = parser.parse_args([*arguments, *flags])
            settle(tasks[name])
        elif name:
            raise InputError(f"{args.suite}: {name}: expected a name of its own and flags such as --task retrieval")
    return tasks


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Rows of metrics as aligned text, shares in percent; rows with the same columns share a heading."""

    def cell(name: str, value: float) -> str:
        text = f"{value:.3f}" if name in NOT_PERCENT else f"{100 * value:.1f}"
        return str(value) if isinstance(value, int) else text

    blocks, groups = [], {}
    for row in metrics:
        groups.setdefault(tuple(metrics[row]), []).append(row)
    for names, rows in groups.items():
        for part in (names[i : i + COLUMNS] for i in range(0, len(names), COLUMNS)):
            cells = [["", *part], *([row, *(cell(name, metrics[row][name]) for name in part)] for row in rows)]
            blocks.append(aligned([[text.replace("_", " ") for text in line] for line in cells]))
    return "\n".join(blocks)


def main(arguments: list[str] | None = None) -> None:
    """Print the metrics of a task. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add_arguments(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    tasks, args = tasks_of(parser, arguments), parser.parse_args(arguments)
    device = distributed.start(args.device)
    model, tokenizer = open_model(args)
    kind = partial(CachedEmbedder, folder=args.cache) if args.cache else Embedder
    embedder = kind(model, tokenizer, device=device, batch_size=args.batch_size, workers=args.workers, amp=args.amp)
    metrics, sentences = {}, []
    for name, task in tasks.items():
        task.image_size, prefix = args.image_size, f"{name}: " if name else ""
        rows, about = evaluate(task, embedder)
        metrics |= {prefix + row: values for row, values in rows.items()}
        sentences += [prefix + sentence for sentence in about]
    if embedder.truncated:
        sentences.append(f"{embedder.truncated} distinct texts were longer than the model reads, and were cut")
    if distributed.is_main():
        print("\n".join([f"{args.checkpoint}, {args.image_size} pixels; {tokenizer.description}", *sentences]))
        print(table(metrics))
        if args.output:
            names = {name: task.task for name, task in tasks.items()}
            record = dict(checkpoint=args.checkpoint, task=names.get("", names), data=sentences)
            write_json(args.output, dict(**record, truncated=embedder.truncated, metrics=metrics), indent=2)
    distributed.stop()


if __name__ == "__main__":
    with one_sentence():
        main()
