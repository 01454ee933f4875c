"""FG-CLIP: train image, long text and region contrast, on your captions and boxes or on scenes that it draws itself.

    python train_fgclip.py                                              # drawn scenes, minutes on two CPU cores
    python train_fgclip.py --data-root FineHARD --init-from clip-vit-base-patch16 --amp bf16
    python train_fgclip.py --annotations mine.json --image-root images --init-from WEIGHTS --bank-size 128
    torchrun --nproc-per-node 4 train_fgclip.py --data-root FineHARD --init-from WEIGHTS --amp bf16
    torchrun --nproc-per-node 8 train_fgclip.py --shards 'shards/data-{000000..001199}.tar' --init-from WEIGHTS
    python train_fgclip.py --resume auto                                # go on after Ctrl-C
    python train_fgclip.py --annotations mine.json --image-root images --check

The defaults are those for fine-tuning published weights. Without data they are those of the drawn scenes, and without
--init-from those of a start from nothing; add --help to see the defaults of just that command.
"""

import trainkit.process_setup  # noqa: F401, I001  before torch

import argparse
import math
from functools import partial
from pathlib import Path

import torch

from fgclip import FGCLIP, Tokenizer, load_model
from fgclip.data.collate import Collate
from fgclip.data.dataset import DataStatistics, RegionDataset, data_statistics, evenly, hold_out, image_ids
from fgclip.data.records import COCO, FineHARD
from fgclip.data.shards import ShardDataset, Shards, lengths_of, sound
from fgclip.embedding import Embedder
from fgclip.freezing import freeze, train_unfrozen
from fgclip.loading import beside, check_image_size, load_base
from fgclip.lora import TARGETS, add_lora
from fgclip.losses import PairBank
from fgclip.model import MAX_LOGIT_SCALE
from fgclip.objective import LOSSES, FGCLIPLoss, freeze_unreached, parts_of
from fgclip.reckoning import reckoning
from fgclip.synthetic import PLACEMENTS, SyntheticRegions, vocabulary
from fgclip.tasks import best_metric, validation_metrics, validation_text
from fgclip.transformer import ACTIVATIONS
from trainkit import distributed
from trainkit.arguments import (
    add_recipe_flags,
    below_one,
    check_needed,
    fraction,
    int_list,
    make_parser,
    non_negative_float,
    non_negative_int,
    parse_with_resume,
    peek_flags,
    positive_float,
    positive_int,
)
from trainkit.errors import InputError, one_sentence
from trainkit.loader import make_loader
from trainkit.optimizer import build_optimisation, ema
from trainkit.run import Run
from trainkit.run_folder import find_resume
from trainkit.sampler import ResumableSampler, ShardSampler
from trainkit.step import TrainStep, print_step

SCRIPT = "fgclip"
MAY_CHANGE = ("annotations", "image_root", "val_annotations", "val_image_root", "validate_at", "shards", "max_damaged")
MAY_CHANGE += ("reset_logit_scales", "logit_scale_init", "base")
OF_WEIGHTS = ("trust_torchscript", "heads", "activation")  # what --init-from and --base may need said
VALIDATION_SEED = 10_000  # of the drawn validation scenes, plus --seed: never a training scene
LOOKED_AT = 2000  # records whose boxes are looked at before a run begins
CHECKED = 100_000  # records that --check reads
FAR = math.log(2)  # a scale twice or half of what the flag says is worth a word
# What the console shows of a step's figures; the others are in metrics.jsonl.
PRINTED = (
    *("region_in_batch", "region_in_batch_r1", "region_relative", "region_candidates"),
    *("logit_scale_global", "logit_scale_region", "logit_scale_hard"),
)
# What reads a format, and where its annotations and images lie below --data-root.
LAYOUTS = {
    "finehard": (FineHARD, "jsonfiles", "."),
    "coco": (COCO, "annotations/captions_train2017.json", "train2017"),
}

# The recipe for fine-tuning published weights: the defaults of the flags. Then what differs for a start from nothing,
# and on top of that for the drawn scenes.
FINE_TUNING_RECIPE = dict(
    epochs=1, batch_size=32, optimizer="adamw", lr=1e-6, weight_decay=1e-3, schedule="cosine",
    warmup_steps=200, clip_norm=1.0, ema_decay=0.999,
    lr_scale="vision_model=1 text_model=1 visual_projection=1 text_projection=1 text_filip_projection=1".split(),
)  # fmt: skip
SIZES = dict(
    patch_size=16, vision_width=768, vision_layers=12, vision_heads=12, text_width=512, text_layers=12, text_heads=8,
    embed_dim=512, context_length=77, activation="quick_gelu",
)  # fmt: skip
FROM_NOTHING_RECIPE = dict(image_size=224, lr=5e-4, weight_decay=0.2, warmup_steps=2000, **SIZES)
SYNTHETIC_RECIPE = dict(
    epochs=4, batch_size=48, workers=1, lr=1.5e-3, weight_decay=0.01, warmup_steps=50, ema_decay=0.98,
    logit_scale_init=math.log(1 / 0.07), region_weight=1.0, image_size=64, patch_size=8, vision_width=128,
    vision_layers=4, vision_heads=4, text_width=128, text_layers=4, text_heads=4, embed_dim=128,
)  # fmt: skip

# Drawn scenes with a bank, which is for small batches: one region an image, and a rate that follows the batch.
BANK_RECIPE = dict(max_regions=1, lr_base_batch=48, warmup_steps=500, region_weight=0.1)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the data, the weights or the resumed run that they name."""
    parser = make_parser(__doc__)
    add_recipe_flags(parser, SCRIPT, MAY_CHANGE)
    add_data_flags(parser)
    add_model_flags(parser)
    add_loss_flags(parser)

    deciding = "--data-root --annotations --shards --init-from --format --stage --bank-size --lora-rank --loss".split()
    given = peek_flags(arguments, *deciding)
    synthetic = draws(given)
    defaults = dict(FINE_TUNING_RECIPE)
    if synthetic or given.init_from is None:
        defaults |= FROM_NOTHING_RECIPE
    if synthetic:
        defaults |= SYNTHETIC_RECIPE
        if given.bank_size not in (None, "0"):
            defaults |= BANK_RECIPE
    if given.loss == "sigmoid" and given.init_from is None:
        defaults |= dict(logit_scale_init=math.log(10))
    if given.init_from is not None:
        defaults |= dict(image_size=None, **dict.fromkeys(SIZES))
        defaults |= dict(lr=1e-4) if given.lora_rank not in (None, "0") else {}
    if given.format == "coco" and not synthetic:
        defaults |= dict(hard_weight=0.0)
    if given.stage == "global":
        defaults |= dict(region_weight=0.0, hard_weight=0.0, best_by="captions")
    return parse_with_resume(parser, arguments, SCRIPT, defaults)


def draws(args: argparse.Namespace) -> bool:
    """Whether the scenes are drawn: no data are named."""
    return args.data_root is None and args.annotations is None and args.shards is None


# fmt: off
def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which images, captions and regions").add_argument
    add("--annotations", metavar="PATH", help="file, folder or list of files; without it where --data-root has them")
    add("--image-root", metavar="PATH", help="folder that the paths in the annotations start from")
    add("--format", choices=tuple(LAYOUTS), default="finehard", help="of the annotations; coco: captions_*.json, with "
        "the boxes of the instances_*.json beside it")
    add("--shards", nargs="+", metavar="PATTERN", help="shards of fgclip.pack, such as data-{000000..000999}.tar")
    add("--shuffle-buffer", type=positive_int, default=10_000, metavar="N", help="samples of shards move by less "
        "than N places")
    add("--max-damaged", type=non_negative_int, default=100, metavar="N", help="damaged samples of shards, of all "
        "processes, that are left out before the run ends")
    add("--val-annotations", metavar="PATH", help="validate on these; without them on a share of the training records")
    add("--val-image-root", metavar="PATH", help="folder of their images; without it --image-root")
    add("--val-share", type=fraction, default=0.02, metavar="X", help="share of the records that is held out")
    add("--val-images", type=positive_int, default=1000, metavar="N", help="at most so many images to validate on")
    add("--max-regions", type=positive_int, default=4, metavar="N", help="regions of an image, the first usable ones; "
        "drawn scenes: any of them, 1 where there is a bank")
    add("--vocab", metavar="PATH", help="merges of the tokenizer: bpe_simple_vocab_16e6.txt.gz, merges.txt, "
        "tokenizer.json, or bytes for none; without it beside the weights, then in an installed CLIP package")
    add("--synthetic-train", type=positive_int, default=6000, metavar="N", help="drawn training scenes")
    add("--synthetic-val", type=positive_int, default=150, metavar="N", help="drawn validation scenes")
    add("--placement", choices=PLACEMENTS, default="grid", help="drawn objects: one a quarter, or anywhere (harder)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model: with --init-from the weights say all but the image size").add_argument
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the square that images are resized to; "
        "with --init-from that of the weights, and of another size their positions are interpolated")
    add("--patch-size", type=positive_int, metavar="PIXELS", help="side of a patch")
    for tower, name in (("vision", "the image tower"), ("text", "the text tower")):
        add(f"--{tower}-width", type=positive_int, metavar="N", help=f"width of {name}, a quarter of its MLPs'")
        add(f"--{tower}-layers", type=positive_int, metavar="N", help="its blocks")
        add(f"--{tower}-heads", type=positive_int, metavar="N", help="its attention heads")
    add("--embed-dim", type=positive_int, metavar="N", help="width of the features of both towers")
    add("--context-length", type=positive_int, metavar="TOKENS", help="of short texts; long ones: 4 N - 60")
    add("--activation", choices=tuple(ACTIVATIONS), help="of the MLPs; with --init-from where no config tells")
    add("--heads", type=positive_int, nargs=2, metavar=("VISION", "TEXT"), help="of --init-from, where no config tells")
    add("--roi-projection", action="store_true", help="give regions a projection of their own")
    add("--trust-torchscript", action="store_true", help="read OpenAI's archives, which can hold code")
    add("--logit-scale-init", type=non_negative_float, default=MAX_LOGIT_SCALE, metavar="X",
        help="logarithm of the three logit scales at the start; published weights bring their own")
    add("--reset-logit-scales", action="store_true", help="set the scales of --init-from or --resume to it")
    add = parser.add_argument_group("which parts of the towers learn").add_argument
    add("--freeze", nargs="*", default=[], metavar="TOWER[:N]", help="what does not learn: vision or text with its "
        "projection, or vision:9 and text:6, the first blocks and the embeddings below them")
    add("--lora-rank", type=non_negative_int, default=0, metavar="N", help="learn low-rank adapters of the blocks and "
        "the logit scales alone; 0: none. With --init-from --lr is then 1e-4")
    add("--lora-alpha", type=positive_float, default=16.0, metavar="X", help="factor on an adapter, over its rank")
    add("--lora-dropout", type=below_one, default=0.05, metavar="X", help="share of an adapter's inputs set to 0")
    add("--lora-targets", nargs="+", choices=TARGETS, default=["q_proj", "v_proj"], help="layers of a block")
    add("--base", metavar="PATH", help="best.pt and epoch-N.pt hold what differs from these weights, most often those "
        "of --init-from, alone; without it they are whole")


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("losses").add_argument
    add("--stage", choices=("global", "region"), default="region", help="captions alone, or regions and hard negatives")
    add("--long-weight", type=non_negative_float, default=1.0, metavar="X", help="images and long captions")
    add("--short-weight", type=non_negative_float, default=1.0, metavar="X", help="images and short captions")
    add("--region-weight", type=non_negative_float, default=0.1, metavar="X", help="regions and phrases")
    add("--hard-weight", type=non_negative_float, default=0.5, metavar="X", help="regions and altered phrases")
    add("--cached-negatives", action="store_true", help="--accumulate batches make exactly the step of one large "
        "batch, with all its negatives, for one more forward pass (GradCache)")
    add("--loss", choices=("softmax", "sigmoid"), default="softmax", help="of captions and regions; sigmoid: each "
        "pair by itself, with a bias that is learned (SigLIP)")
    add("--logit-bias-init", type=float, default=-10.0, metavar="X", help="of --loss sigmoid, for weights without one")
    add = parser.add_argument_group("memory bank: negatives from earlier steps").add_argument
    add("--bank-size", type=non_negative_int, default=0, metavar="N", help="regions, of all GPUs; 0 is FG-CLIP")
    add("--global-bank-size", type=non_negative_int, default=0, metavar="N", help="images, for each kind of caption")
    add("--bank-warmup-steps", type=non_negative_int, default=50, metavar="N",
        help="optimizer steps before the banks are used; they fill meanwhile")
    add("--bank-classes", type=int, choices=(1, 2), default=1, help="2: half of the places for images with label 1")
    add = parser.add_argument_group("validation, speed and memory").add_argument
    add("--best-by", choices=("region", "hard", "captions"), default="region",
        help="what chooses best.pt: R@1 of regions, accuracy among hard negatives, R@1 of captions")
    add("--validate-at", type=int_list, default="50,200,500", metavar="STEPS", help="and after these")
    add("--checkpoint-activations", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true", help="torch.compile the blocks of both towers")
# fmt: on


def open_data(args: argparse.Namespace, image_size: int):
    """Training and validation data, and a sentence about each."""
    drawn = dict(image_size=image_size, placement=args.placement)
    if draws(args):
        train = SyntheticRegions(args.synthetic_train, seed=args.seed, max_regions=args.max_regions, **drawn)
        validation = SyntheticRegions(args.synthetic_val, seed=VALIDATION_SEED + args.seed, **drawn)
        return train, validation, [
            f"training on {len(train)} scenes drawn from seed {args.seed}, placement {args.placement}, at most "
            f"{args.max_regions} regions each (neither --data-root nor --annotations was given)",
            f"validating on {len(validation)} scenes drawn from seed {validation.seed}",
        ]  # fmt: skip
    read, annotations_below, images_below = LAYOUTS[args.format]
    if args.shards is not None:
        annotations, image_root, records, dataset = args.shards[0], Path(), Shards(args.shards), ShardDataset
    elif args.data_root is None and args.image_root is None:
        raise InputError("--image-root is missing: expected the folder that the paths in --annotations start from")
    else:
        annotations = Path(args.annotations or Path(args.data_root) / annotations_below)
        image_root = Path(args.image_root or Path(args.data_root) / images_below)
        records, dataset = read(annotations), RegionDataset
    val_root = image_root
    if args.val_annotations is not None:
        held_out, val_root = evenly(read(args.val_annotations), args.val_images), args.val_image_root or image_root
        sentence = f"validating on {len(held_out)} images of {args.val_annotations}"
        both = set(image_ids(records, image_root).tolist()).intersection(image_ids(held_out, val_root).tolist())
        sentence += f"; {len(both)} of them are trained on too" if both else ""
    else:
        whole = len(records)
        records, held_out = hold_out(records, args.val_share, args.val_images)
        held_out = held_out if args.shards is None else sound(held_out)
        sentence = f"held out for validation: {len(held_out)} of the {whole} images (--val-annotations names others)"
    for name, images in ((annotations, records), (args.val_annotations, held_out)):
        if not len(images):
            raise InputError(f"{name} has no image with captions")
    sizes = dict(image_size=image_size, max_regions=args.max_regions, seed=args.seed)
    train, validation = dataset(records, image_root, **sizes), RegionDataset(held_out, val_root, **sizes)
    return train, validation, [f"training on {len(train)} images of {annotations}, below {image_root}", sentence]


def build_model(args: argparse.Namespace) -> tuple[FGCLIP, Tokenizer, list[str]]:
    """The model, with the weights of --init-from, its tokenizer, and what there is to say about them."""
    given = {name: getattr(args, name) for name in SIZES}
    resumed = find_resume(args.resume, args.output, SCRIPT)
    messages = []
    if resumed is not None:
        model, tokenizer = load_model(resumed, weights="raw")
    elif args.init_from is not None:
        named = [name for name, value in given.items() if value is not None and name not in OF_WEIGHTS]
        if named:
            raise InputError(f"--{named[0].replace('_', '-')} comes with the weights of --init-from: leave it out")
        model, tokenizer = load_model(args.init_from, args.vocab, **{name: getattr(args, name) for name in OF_WEIGHTS})
        messages = [f"weights of {model.load_report}"]
        if args.roi_projection and not model.config["roi_projection"]:
            model = model.with_roi_projection()
    else:
        tokenizer = Tokenizer(vocabulary() if args.vocab is None and draws(args) else args.vocab)
        vision = dict(image_size=args.image_size, patch_size=args.patch_size)
        text = dict(vocab_size=tokenizer.vocab_size, context_length=args.context_length)
        for name, tower in (("vision", vision), ("text", text)):
            tower |= {key: given[f"{name}_{key}"] for key in ("width", "layers", "heads")}
            tower |= dict(mlp_width=4 * tower["width"], activation=args.activation)
        try:
            model = FGCLIP(
                vision=vision, text=text, embed_dim=args.embed_dim, logit_scale=args.logit_scale_init,
                roi_projection=args.roi_projection,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:  # RuntimeError: there is not so much memory
            raise InputError(f"the model's flags do not fit together: {error}") from error
        messages = ["training from random weights"]
        if not draws(args):
            messages[0] += "; --init-from takes published CLIP and FG-CLIP weights, or a checkpoint of a run"
    if (args.loss == "sigmoid") != (model.config["logit_bias"] is not None):
        model = model.with_logit_bias(args.logit_bias_init if args.loss == "sigmoid" else None)
    check_image_size(model, args.image_size or model.vision_model.image_size)
    if args.image_size not in (None, model.vision_model.image_size):
        model = model.with_image_size(args.image_size)  # so that its checkpoints say what it was trained on
    if args.long_weight and model.text_model.long_context_length is None:
        raise InputError("--long-weight: the model has no long text path, its short one being too short; expected 0")
    return model, tokenizer, [*messages, f"tokenizer: {tokenizer.description}"]


def check_data(args: argparse.Namespace, statistics: DataStatistics) -> None:
    """Raises InputError where an enabled loss would be constant, by the records that were looked at."""
    where = f"none of {statistics.images} images looked at"
    if (args.region_weight or args.hard_weight) and not statistics.regions:
        raise InputError(f"{where} has a usable region: use --stage global, or another file of --annotations")
    if args.hard_weight and not statistics.regions_with_negatives:
        raise InputError(f"{where} has a region with hard negatives: --hard-weight 0 goes without them")
    if args.bank_classes == 2 and statistics.abnormal in (0, statistics.images):
        raise InputError(f"--bank-classes 2: {where} is labelled {0 if statistics.abnormal else 1}")


def validate_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other, have no effect, or leave a loss constant."""
    images = args.batch_size * distributed.world_size() * (args.accumulate if args.cached_negatives else 1)
    captions = args.long_weight or args.short_weight
    if args.stage == "global" and (args.region_weight or args.hard_weight or args.bank_size):
        raise InputError("--stage global has no regions: --region-weight, --hard-weight and --bank-size are for region")
    if not (captions or args.region_weight or args.hard_weight):
        raise InputError("no loss has a weight above 0, nothing would be learnt")
    if captions and images == 1 and not args.global_bank_size:
        others = "raise --batch-size, give --global-bank-size, or set --long-weight and --short-weight to 0"
        raise InputError(f"one image a step has no other caption to be told from: {others}")
    if args.region_weight and images * args.max_regions == 1 and not args.bank_size:
        raise InputError("one region a step has no other phrase to be told from: raise --batch-size or --bank-size")
    banks = dict(bank=(args.bank_size, args.region_weight), global_bank=(args.global_bank_size, captions))
    for name, (size, weight) in banks.items():
        flag = f"--{name.replace('_', '-')}-size"
        if size and not weight:
            raise InputError(f"{flag} {size}: the loss that the bank is for has no weight")
        if size % args.bank_classes:
            raise InputError(f"{flag} {size} does not divide among the {args.bank_classes} of --bank-classes")
    check_needed(
        args, image_root=("annotations", "data_root"),
        val_annotations=("annotations", "data_root", "shards"), val_image_root=("val_annotations",),
        trust_torchscript=("init_from", "resume"), heads=("init_from", "resume"),
        reset_logit_scales=("init_from", "resume"), base=("init_from", "resume"),
    )  # fmt: skip
    if args.shards is not None and (args.annotations or args.data_root or args.image_root):
        raise InputError("--shards bring annotations and pictures: leave out --annotations, --data-root, --image-root")
    if args.cached_negatives and args.accumulate == 1:
        raise InputError("--cached-negatives needs --accumulate of at least 2: one batch has all its negatives already")
    if args.logit_scale_init > MAX_LOGIT_SCALE:
        raise InputError(f"--logit-scale-init {args.logit_scale_init}: expected at most ln 100, {MAX_LOGIT_SCALE:.4f}")
    if args.best_by in ("region", "hard") and not (args.region_weight or args.hard_weight):
        raise InputError(f"--best-by {args.best_by} needs a loss of regions; --best-by captions does not")


def logit_scales(args: argparse.Namespace, models: list[FGCLIP], optimizer: torch.optim.Optimizer) -> list[str]:
    """Resets the scales of a loaded model and its average where that is asked; says which are far from the flag's."""
    if args.reset_logit_scales:
        for parameter in (p for model in models for p in model.log_scales().values()):
            parameter.data.fill_(args.logit_scale_init)
            optimizer.state.pop(parameter, None)
        return [f"all logit scales reset to {args.logit_scale_init:.4f}"]
    return [
        f"logit scale {name} is {scale.item():.4f}, far from --logit-scale-init {args.logit_scale_init:.4f}; "
        "--reset-logit-scales sets it to that"
        for name, scale in models[0].log_scales().items()
        if abs(scale.item() - args.logit_scale_init) > FAR
    ]


def check(messages: list[str], train_data, val_data, train_step, objective, loader, model, cached: bool) -> dict:
    """--check: what the data holds, one step, and whether a gradient reaches every part. Returns the step's batch."""
    print("\n".join(messages))
    for name, data in (("training", train_data), ("validation", val_data)):
        indices = evenly(range(len(data)), CHECKED)
        print(f"{name}, {len(indices)} of {len(data)} records read:")
        statistics = data_statistics(map(data.record, indices))
        print("  " + str(statistics).replace("\n", "\n  "))
    batch = next(iter(loader))
    batches = [[batch]] if cached else [batch]
    objective.begin(batches)
    print_step(train_step, batches, model)
    print("metrics: " + ", ".join(f"{name} {value:.4g}" for name, value in objective.metrics().items()))
    return batch


def count_damaged(run: Run, batches: list[dict], count: int, most: int) -> None:
    """Names the damaged samples of a step, `count` on all ranks. Raises InputError beyond so many in the whole run."""
    run.values["damaged"] += count
    lost = [sentence for batch in batches for sentence in batch["damaged"]]
    lost = [sentence for sentences in distributed.gather_objects(lost) for sentence in sentences]
    run.say(*(f"left out: {sentence}" for sentence in lost))
    if run.values["damaged"] > most:
        raise InputError(f"--max-damaged {most}: {run.values['damaged']:.0f} samples are damaged, the last: {lost[-1]}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = distributed.start(args.device)
    validate_args(args)
    torch.manual_seed(args.seed)
    bare, tokenizer, about_model = build_model(args)
    train_data, val_data, messages = open_data(args, bare.vision_model.image_size)
    statistics = data_statistics(map(train_data.record, evenly(range(len(train_data)), LOOKED_AT)))
    check_data(args, statistics)
    messages += [f"of {statistics.images} images looked at: {statistics.boxes}", *about_model]

    # The one place where losses are weighted; `TrainStep` applies it once.
    weights = {f"loss_{name}": getattr(args, f"{name}_weight") for name in LOSSES}
    enabled = [name.removeprefix("loss_") for name, weight in weights.items() if weight]
    freeze(bare, args.freeze)
    if args.lora_rank:
        add_lora(bare, args.lora_targets, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    freeze_unreached(bare, enabled)
    if not any(parameter.requires_grad and parameter.dim() for parameter in bare.parameters()):
        raise InputError(f"--freeze {' '.join(args.freeze)}: nothing but the logit scales would learn")
    bare.set_checkpointing(args.checkpoint_activations)
    train_unfrozen(bare.to(device))
    if args.compile:
        for block in (*bare.vision_model.encoder.layers[:-1], *bare.text_model.encoder.layers[:-1]):
            block.compile()
    average = ema(bare, args.ema_decay) if args.ema_decay else None
    models = [bare] if average is None else [bare, average.module]
    model = distributed.parallel(bare)

    text, regions = bare.text_model, bool(args.region_weight or args.hard_weight)
    collate = Collate(
        tokenizer, context_length=text.context_length, regions=regions, hard=bool(args.hard_weight),
        long_context_length=text.long_context_length if args.long_weight else None,
    )  # fmt: skip
    if args.shards is None:
        sampler = ResumableSampler(len(train_data), args.batch_size, seed=args.seed)
    else:
        shards = lengths_of(train_data.records)
        sampler = ShardSampler(shards, args.batch_size, buffer=args.shuffle_buffer, seed=args.seed)
    loader = make_loader(train_data, sampler, collate, workers=args.workers, device=device)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / args.accumulate)
    total_steps = args.epochs * steps_per_epoch
    if (args.bank_size or args.global_bank_size) and args.bank_warmup_steps >= total_steps:
        raise InputError(f"--bank-warmup-steps {args.bank_warmup_steps}: the run has only {total_steps} steps")
    tables = [f"position_embedding{kind}.weight" for kind in ("", "_res", "_ori")]  # scales are spared anyway
    optimizer, schedule = build_optimisation(args, bare, steps_per_epoch, no_decay=tables)

    sizes = dict(region=args.bank_size, long=args.global_bank_size, short=args.global_bank_size)
    banks = torch.nn.ModuleDict({
        name: PairBank(size, bare.visual_projection.out_features, classes=args.bank_classes, device=device)
        for name, size in sizes.items() if size and name in enabled
    })  # fmt: skip
    objective = FGCLIPLoss(model, names=enabled, banks=banks, device=device)
    train_step = TrainStep(
        model, optimizer, forward=lambda _, batch: (objective(batch), {}), weights=weights,
        describe=lambda batch: [source for part in parts_of(batch) for source in part["sources"]], device=device,
        schedule=schedule, average=average, amp=args.amp, clip_norm=args.clip_norm,
    )  # fmt: skip
    options = {name: getattr(args, name) for name in OF_WEIGHTS}
    shorten = args.base and partial(beside, base=load_base(args.base, **options), path=args.base)
    if args.check:
        batch = check(messages, train_data, val_data, train_step, objective, loader, bare, args.cached_negatives)
        if not args.compile:
            print("\n".join(reckoning(
                bare, batch, images=len(train_data), batches=args.accumulate, world_size=distributed.world_size(),
                amp=args.amp, optimizer=args.optimizer, average=average is not None,
                bank_bytes=sum(part.nbytes for part in banks.buffers()), cached=args.cached_negatives,
            )))  # fmt: skip
        return

    run = Run(
        args, SCRIPT, train_step, sampler, total_steps=total_steps, parts={"banks": banks},
        constants={"model_kwargs": bare.config, "merges": tokenizer.merges}, may_change=MAY_CHANGE,
        values=None if args.shards is None else {"damaged": 0}, shorten=shorten,
    )  # fmt: skip
    if args.resume or args.init_from:
        messages += logit_scales(args, models, optimizer)
    learning = sum(p.numel() for p in bare.parameters() if p.requires_grad)
    count = sum(p.numel() for p in bare.parameters())
    about = ", ".join(f"{name.removeprefix('loss_')} {weight:g}" for name, weight in weights.items())
    run.say(*messages, f"{learning:,} of {count:,} parameters learn; loss weights: {about}")
    with run:
        for epoch in run.epochs():
            for batches in run.batches(loader):
                together = [batches] if args.cached_negatives else batches  # one batch of them all
                objective.begin(together, use_banks=train_step.steps >= args.bank_warmup_steps)
                if args.shards is not None:
                    objective.add("damaged", sum(len(batch["damaged"]) for batch in batches), 0)
                result = train_step(together)
                for each in models:
                    each.clamp_logit_scales()
                metrics = objective.metrics()
                if metrics.get("damaged"):
                    count_damaged(run, batches, metrics["damaged"], args.max_damaged)
                metrics |= {f"logit_scale_{name}": scale.item() for name, scale in bare.log_scales().items()}
                metrics |= {name: p.item() for name, p in bare.named_parameters() if name.startswith("logit_bias")}
                shown = {name: metrics[name] for name in PRINTED if name in metrics}
                run.log_step(
                    result, images=sum(len(batch["sources"]) for batch in batches) * distributed.world_size(),
                    metrics=shown, hidden={name: value for name, value in metrics.items() if name not in shown},
                )  # fmt: skip
            if run.validation_due():
                embedder = Embedder(
                    models[-1], tokenizer, device=device, batch_size=args.batch_size, workers=args.workers,
                    amp=args.amp, between=run.leave_if_asked,
                )  # fmt: skip
                models[-1].eval()
                metrics = validation_metrics(embedder, val_data, regions=regions, long=bool(args.long_weight))
                train_unfrozen(bare)
                run.log_validation(metrics, validation_text(metrics))
                if epoch > 0:
                    run.keep_best(best_metric(metrics, args.best_by), args.best_by)


if __name__ == "__main__":
    with one_sentence():
        main()
