"""
Train one class-incremental task, all its steps in one run (paper, Sec. 3.3 and 4).

    python train.py                                                     # shapes 15-1: CPU, minutes
    torchrun train.py --task 15-1 --dataset voc                         # the paper's setting
    torchrun --nproc_per_node=8 train.py --task 100-10 --dataset ade --data-root data

Step 0 trains on the first classes. Every later step t inverts the network of step t - 1 into fake
images of old classes (seginversion.py), then trains on half-real half-fake batches (distill.py).
The same command again goes on where it stopped. A run folder holds

    settings.json  log.jsonl  step-<t>.pth  step-<t>.json  fakes-step-<t>/  fakes-step-<t>.png
    predictions.png  results.json  report.html
"""
import argparse
import json
import math
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

# first, as it sees to Ctrl-C while the others are imported
from run import (ANOTHER_FOLDER, InputError, LiveLine, Parser, Run, autocast, commit,
                 default_workers, derive_seed, plain_errors, quiet_worker, setup, sha256,
                 write_atomically, write_json)

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import data
import protocol
import report
from eval import evaluate, iou, save_predictions, summarize, table, test_view
from fakes import digest, parse_r, read_fakes, replay, save_fakes, synthesize
from methods import METHODS
from model import BACKBONES, DeepLabV3, load_model, read_checkpoint, save_model
from seginversion import stages

# The parser's defaults are the paper's numbers (Sec. 4.2; MiB's where it says "as in [5]",
# DeepInversion's weights where it follows that). These are what a data set changes. On small
# images SegInversion is better our way (results/README.md): 1/f noise and other weights.
DATASET_DEFAULTS = {
    "voc": {"task": "15-1"},
    "ade": {"task": "100-50", "epochs": 60},
    "folder": {"fake_steps": 190, "fake_sizes": "1/3,2/3,1", "reuse_fakes": True, "spectrum": 1.0,
               "tv": 0.3, "bn": 10.0},
    "shapes": {                                             # sizes for a laptop's CPU
        "task": "15-1", "backbone": "tiny", "pretrained": "none", "crop": 64, "workers": 1,
        "epochs0": 14, "epochs": 12, "lr0": 0.1, "lr": 0.03, "num_fakes": 64, "fake_classes": 1,
        "fake_steps": 95, "fake_sizes": "1/2,1", "reuse_fakes": True, "spectrum": 1.0, "tv": 2.0,
        "bn": 3.0},
}

# --small: a few hundred pictures on a CPU or one GPU, minutes a step
SMALL = {"backbone": "mobilenet_v2", "crop": 96, "batch_size": 16, "min_iters": report.ENOUGH,
         "lr0": 0.02, "lr": 0.003, "num_fakes": 64, "fake_classes": 1}


# --------------------------------------------------------------------------------------- flags

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser():
    p = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    a = p.add_argument_group("task and data (Sec. 4.1)").add_argument
    a("--dataset", choices=list(DATASET_DEFAULTS), default="shapes",
      help="folder: your own images in VOC's layout")
    a("--data-root", default="data", help="where the data set is")
    a("--task", help="A-B: A classes first, then B a step; or offline: all classes in one")
    a("--setting", choices=["disjoint", "overlapped"], default="disjoint",
      help="overlapped: earlier steps see images of later classes, too (Table 1 has both)")
    a("--order", help="ids or names of all classes, with commas, or a file of them: the order in "
      "which they are learned, if not the natural one")
    a("--split-dir", help="folder of MiB's train-<step>.npy lists, to compare with its ADE numbers")
    a("--void", choices=["background", "ignore"], default="background",
      help="void (255) in training: background as MiB does, or ignored as PLOP and SSUL do")

    a = p.add_argument_group("run").add_argument
    a("--version", action="store_true", help="print the commit and torch's version, no more")
    a("--out", help="run folder, if not runs/<dataset>-<task>-<setting>[-<method>]")
    a("--step0", metavar="CHECKPOINT",
      help="another run's step-0.pth to build upon: methods and ablations share it. Later steps: "
      "copy step-<t>.pth, step-<t>.json and fakes-step-<t> into a new --out")
    a("--seed", type=int, default=42, help="of weights, crops, fakes and orders")
    a("--small", action="store_true", help="defaults for a few hundred pictures on a CPU or one "
      "GPU: " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALL.items())
      + "; shapes, which are small, keep their own of these")
    a("--workers", type=int, help="loader processes per rank; more if the log's data_wait is not 0")
    a("--amp", action=argparse.BooleanOptionalAction, help="mixed precision; default: on CUDA")
    a("--max-iters", type=int, help="smoke run: caps the iterations of each step and inversion")

    a = p.add_argument_group("network and training (Sec. 4.2)").add_argument
    a("--backbone", choices=list(BACKBONES), default="resnet101", help="smaller: fewer or no GPUs")
    a("--pretrained", default="imagenet",
      help="imagenet (download), none, or a file: torchvision's or Mapillary's iABN")
    a("--crop", type=int, default=512, help="height and width of training, test and fake images")
    a("--batch-size", type=int, default=24, help="over all GPUs together, whatever their number")
    a("--epochs", type=int, default=30, help="per step; an epoch is one pass over the real images")
    a("--epochs0", type=int, help="step 0, if it needs another number")
    a("--min-iters", type=int, default=1, help="iterations that each step has at least: a small "
      "set's epochs are short")
    a("--lr0", type=float, default=1e-2, help="learning rate of step 0")
    a("--lr", type=float, default=1e-3, help="of later steps; lower it if old classes collapse")

    a = p.add_argument_group("method (Sec. 3.3; off the defaults: an ablation)").add_argument
    a("--method", choices=list(METHODS), default="hrhf", help="a row of Tables 1 and 7")
    a("--lam", type=float, help="weight of the method's term against forgetting, if not its own "
      "(HRHF's is 1, Eq. 5; 0: Table 5's W/O KD)")
    a("--init", choices=["background", "random"],
      help="start of new classifiers, if not the method's (HRHF's and MiB's: background); random "
      "if a step has several new classes and learns them badly")
    a("--fake", choices=["seginversion", "noise", "none"],
      help="if not the method's. Table 2: none is its Baseline, noise its +Noise")
    a("--real-fake", default="1:1", help="proportion in a mini-batch (Table 6)")

    a = p.add_argument_group("SegInversion (Sec. 3.2)").add_argument
    a("--r", default="random",
      help="scale of Eq. 1: a number, avg, max (Tables 3 and 4), random for every image and class "
      "(Sec. 3.2) or random-image for every image (Sec. 4.4)")
    a("--num-fakes", type=int, help="per step, in whole batches; default: as many as it has real "
      "images, at most 1024. With --reuse-fakes of step 1, and later ones have as many a class")
    a("--fake-batch", type=int, default=16, help="in one pass of the network; lower it if memory "
      "is short: 16 are matched by their common BatchNorm statistics all the same")
    a("--fake-classes", type=int, default=3, help="most classes in one fake (Figure 3: 1 and 3)")
    a("--fake-steps", type=int, default=1000, help="optimisation steps of an inversion")
    a("--fake-sizes", default="1", help="from coarse to fine, in pixels (128,256,512) or shares of "
      "--crop (1/4,1/2,1); the steps are shared out evenly over them")
    a("--reuse-fakes", action=argparse.BooleanOptionalAction, default=False,
      help="a step makes fakes of the classes of the step before it alone, and takes the others "
      "from the earlier steps. Ours, for folder and shapes")
    a("--fake-lr", type=float, default=0.25, help="lower it if small fakes come out saturated")
    a("--tv", type=float, default=0.355, help="weight of the total variation; raise it if fakes "
      "are noisy. DeepInversion's for voc and ade; ours for folder: 0.3")
    a("--bn", type=float, default=1.16, help="weight of the BatchNorm statistics; raise it if "
      "fakes look like no image. DeepInversion's for voc and ade; ours for folder: 10")
    a("--spectrum", type=float, default=0.0, help="0, for voc and ade: plain Adam from white "
      "noise. Ours, for folder and shapes: 1, 1/f noise and gradients")
    return p


LIMITS = {"batch_size": (2, 10 ** 6),
          **dict.fromkeys("epochs epochs0 fake_batch fake_classes fake_steps num_fakes "
                          "max_iters min_iters".split(), (1, 10 ** 6)),
          **dict.fromkeys("lam tv bn".split(), (0, 1e12)), "crop": (16, 10 ** 4),
          **dict.fromkeys("lr lr0".split(), (1e-12, 1e30)), "fake_lr": (1e-12, 1e12),
          "workers": (0, 1000),
          "spectrum": (0, 4), "seed": (0, 2 ** 63 - 1)}     # spectrum: photographs are near 1


def parse(argv=None):
    p, first = parser(), Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=list(DATASET_DEFAULTS), default="shapes")
    first.add_argument("--small", action="store_true")
    known = first.parse_known_args(argv)[0]
    p.set_defaults(**(SMALL if known.small else {}) | DATASET_DEFAULTS[known.dataset])
    args = p.parse_args(argv)
    if args.version:
        print(f"commit {commit()}, torch {torch.__version__}")
        p.exit()
    del args.small, args.version                # the flags that it stands for say what a run is
    if args.task is None:
        raise InputError("--task: a folder needs one, such as 4-1")
    if empty := next((name for name, value in vars(args).items() if value == ""), None):
        raise InputError(f"--{empty.replace('_', '-')}: empty")         # a shell variable, unset
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be a number from {least} "
                             f"to {most}")
    parse_r(args.r)
    method = METHODS[args.method]
    args.lam = method.lam if args.lam is None else args.lam
    args.init = None if args.init == method.init else args.init
    args.fake = args.fake or ("seginversion" if method.fakes else "none")
    args.epochs0 = args.epochs0 or args.epochs
    args.amp = torch.cuda.is_available() if args.amp is None else args.amp
    args.workers = default_workers() if args.workers is None else args.workers
    method_name = "" if args.method == p.get_default("method") else f"-{args.method}"
    args.out = args.out or f"runs/{args.dataset}-{args.task}-{args.setting}{method_name}"
    args.fake_sizes = parse_sizes(args.fake_sizes, args.crop)
    batch_parts(args, 1)
    return args


def parse_sizes(text, crop):
    """--fake-sizes: growing sizes that end with --crop; shares of it are rounded to 16 pixels."""
    try:
        given = [Fraction(size) for size in text.split(",")]
        sizes = given if given[-1] > 1 else sorted(
            {crop if share == 1 else max(16, 16 * round(share * crop / 16)) for share in given})
        growing = given == sorted(given) and sizes == sorted(set(sizes))
        if min(given) <= 0 or not growing or sizes[0] < 16 or sizes[-1] != crop:
            raise ValueError
        return [int(str(size)) for size in sizes]           # ValueError for 100.5
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--fake-sizes {text}: expected growing sizes, from 16 on, which end with "
                         f"--crop, {crop}, or shares of it that end with 1: 1/2,1") from None


def off_default(args):
    """The flags by which a run is not the row of the paper's tables that it is named after."""
    row = ["--dataset", args.dataset, "--task", args.task, "--method", args.method]
    usual = parse(row)
    usual.fake_sizes = parse([*row, "--crop", str(args.crop)]).fake_sizes
    if args.pretrained != "none":                           # a file may hold the paper's weights
        usual.pretrained = args.pretrained
    harmless = "setting data_root out step0 seed workers amp".split()
    off = {name: value for name, value in vars(args).items()
           if name not in harmless and value != getattr(usual, name)}
    return spelled(off)


def spelled(settings):
    """Settings as flags."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, list) else value
    return " ".join(f"--{'no-' * (value is False)}{name.replace('_', '-')}"
                    + f" {text(value)}" * (not isinstance(value, bool))
                    for name, value in settings.items())


def batch_parts(args, step):
    """How many real and fake images a mini-batch of this step holds."""
    if step == 0 or args.fake == "none":
        return args.batch_size, 0
    try:
        real, fake = (int(part) for part in args.real_fake.split(":"))
        if min(real, fake) < 0:
            raise ValueError
        real = round(args.batch_size * real / (real + fake))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--real-fake {args.real_fake}: expected two numbers, such as 1:1"
                         ) from None
    if not 1 <= real < args.batch_size:
        raise InputError(f"--real-fake {args.real_fake}: leaves no real or no fake image "
                         f"in a batch of {args.batch_size}")
    return real, args.batch_size - real


def check_batch_size(args, processes):
    if args.batch_size % processes or args.batch_size < 2 * processes:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {processes} "
                         "processes, with at least two images for each (BatchNorm after global "
                         "pooling has one value per image)")


def step_length(args, step, num_images):
    """Iterations of an epoch and of the whole step."""
    per_epoch = max(1, num_images // batch_parts(args, step)[0])
    iterations = max((args.epochs0 if step == 0 else args.epochs) * per_epoch, args.min_iters)
    return per_epoch, min(iterations, args.max_iters or iterations)


def number_of_fakes(args, step, counts, steps):
    """How many fakes are made for a step. counts: training images of each step; steps: classes"""
    if not batch_parts(args, step)[1] or not (counts[step] or args.reuse_fakes):
        return 0
    if args.reuse_fakes and step > 1:           # as many a class as there are of the first classes
        first = number_of_fakes(args, 1, counts, steps)
        return math.ceil(first * len(steps[step - 1]) / len(steps[0]))
    number = args.num_fakes or max(1, min(counts[step], 1024))
    return math.ceil(number / args.fake_batch) * args.fake_batch


def work_of(args, task):
    """{(step, phase): forward passes of an image}: a backward pass counts as two, one to the pixels
    alone as one. The time left is guessed from it."""
    work, counts, options = {}, [*map(len, task.images)], inversion(args)
    size = sum((size / args.crop) ** 2 for size in stages(options["sizes"], options["steps"]))
    for step, count in enumerate(counts):
        passes = 3 + bool(step and METHODS[args.method].uses_teacher)
        fakes = number_of_fakes(args, step, counts, task.steps)
        work[step, "seginversion"] = 2 * size * fakes * (args.fake == "seginversion")
        work[step, "training"] = passes * step_length(args, step, count)[1] * args.batch_size
        work[step, "scoring"] = len(task.test_labels)
    return work


# ------------------------------------------------------------------------------------ the task

class Task(NamedTuple):
    """A data set dealt into learning steps."""
    train_set: object
    test_set: object
    train_labels: list          # class ids of every image
    test_labels: list
    groups: list                # class ids of the steps of A-B, in which scores are grouped
    steps: list                 # class ids that each training step adds: the groups, or all (Joint)
    images: list                # of each step: indices of its training images

    def names(self, step):
        """The classes known after a step, in the order of the network's channels."""
        return [self.train_set.classes[c] for c in [0, *sum(self.steps[:step + 1], [])]]

    def network(self, step, args):
        """What a checkpoint of a step must say of itself: it may be a copy of another run's.

        Methods may share a step 0 (check_method says which), but no later step.
        """
        method = {"method": args.method} if step else {}
        return {**method, "backbone": args.backbone, "classes": self.names(step), "crop": args.crop,
                "setting": args.setting, "void": args.void, "step": step,
                "classes_per_step": [1 + len(self.steps[0]), *map(len, self.steps[1:step + 1])]}


def open_task(args, world):
    """The Task; what is wrong with the data is said here, before anything is trained."""
    train_set, test_set = (data.load(args.dataset, args.data_root, s) for s in ("train", "val"))
    if isinstance(args.order, str):
        order = protocol.parse_order(args.order, train_set.classes)
        args.order = None if order == sorted(order) else order
    groups = protocol.task_steps(args.task, len(train_set.classes) - 1, args.order)
    labels = (train_set.labels(), test_set.labels()) if world.rank == 0 else None
    train_labels, test_labels = world.from_rank_0(labels)
    tested = set().union(*test_labels)
    if world.rank == 0 and (untested := [train_set.classes[c] for c in sum(groups, [])
                                         if c not in tested]):
        print(f"note: no test image shows {', '.join(untested)}; it has no score", file=sys.stderr)
    joint = METHODS[args.method].joint
    images = protocol.training_indices(
        train_labels, groups, args.setting, ade=args.dataset == "ade", split_dir=args.split_dir,
        joint=joint)
    empty = [step for step, indices in enumerate(images) if not indices]
    if empty and (empty[0] == 0 or not args.max_iters):     # a smoke run may have few images
        raise InputError(f"step {empty[0]} of task {args.task} ({args.setting}) has no training "
                         f"images in {args.data_root}")
    return Task(train_set, test_set, train_labels, test_labels, groups,
                [sum(groups, [])] if joint else groups, images)


# --------------------------------------------------------------------------- one learning step

def learn(step, task, args, run, world):
    """Invert the old network (Sec. 3.2), then train a grown copy of it (Sec. 3.3)."""
    method, images = METHODS[args.method], task.images[step]
    shown = set().union(*(task.train_labels[i] for i in images))
    if unseen := [task.train_set.classes[c] for c in task.steps[step] if c not in shown]:
        run.log(step=step, warning=f"no training image shows {', '.join(unseen)}")
    torch.manual_seed(derive_seed(args.seed, step, 1))      # new weights come from this alone
    teacher, state, fakes = None, None, []
    if step == 0:
        if world.rank:                                      # rank 0 downloads the weights first
            world.barrier()
        student = DeepLabV3(args.backbone, [1 + len(task.steps[0])],
                            None if args.pretrained == "none" else args.pretrained)
        if not world.rank:
            world.barrier()
    else:
        expected = task.network(step - 1, args)
        teacher, about = load_model(run.checkpoint(step - 1), world.device, expected)
        teacher.requires_grad_(False)
        state = about["objective"]
        check_method(run.checkpoint(step - 1), about, args)
        fakes = old_images(teacher, step, task, args, run, world)
        student, _ = load_model(run.checkpoint(step - 1))
        student.add_classes(len(task.steps[step]), args.init or method.init)
    student.to(world.device)
    objective = method.objective_of(student, teacher, args.lam, state)
    view = data.View(task.train_set, images,
                     protocol.label_map(task.steps, step, "train", args.void),
                     data.train_transform(args.crop), fakes)
    if images:
        train_step(student, objective, view, step, args, run, world)
    if world.rank == 0:
        save_model(student, run.checkpoint(step), **task.network(step, args) | {
                       "method": args.method},
                   inversion=inversion(args), seconds=run.seconds,
                   objective=objective.state_dict())
        run.last.unlink(missing_ok=True)
    world.barrier()


def inversion(args):
    """The options of seginversion.invert."""
    steps = min(args.fake_steps, args.max_iters or args.fake_steps)
    return {"sizes": args.fake_sizes, "steps": steps, "lr": args.fake_lr,
            "tv": args.tv, "bn": args.bn, "spectrum": args.spectrum}


def old_images(teacher, step, task, args, run, world):
    """Paths of the images that stand for the old classes in this step's mini-batches."""
    counts = [*map(len, task.images)]
    *before, number = (number_of_fakes(args, t, counts, task.steps) for t in range(step + 1))
    folder, seed = run.fakes(step), derive_seed(args.seed, step, 2)
    if not number:
        return []
    if args.fake == "real":                                 # as many as fakes would be there
        number += sum(before) if args.reuse_fakes else 0
        seen = sorted(set().union(*task.images[:step]))
        return replay(task.train_set, seen, folder, number, size=args.crop, seed=seed, world=world)
    options = inversion(args)
    if args.fake == "noise":                                # where an inversion starts: Table 2
        options |= {"steps": 0, "spectrum": 0.0, "sizes": [args.crop]}
    earlier, classes = [], None
    if args.reuse_fakes and step > 1:
        for t in range(1, step):
            inverted, _ = load_model(run.checkpoint(t - 1))
            try:
                there = read_fakes(run.fakes(t), model=digest(inverted), r=args.r,
                                   most=args.fake_classes, **options)
            except InputError as error:
                raise InputError(f"{error}; copy it from where step-{t}.pth is from, remove all "
                                 f"from step-{t}.pth on, or choose another --out, with "
                                 "--no-reuse-fakes") from None
            earlier += [path for path, _ in there]
        known = len(task.names(step - 1))
        classes = list(range(known - len(task.steps[step - 1]), known))
    with run.timed("seginversion"):
        paths = synthesize(
            teacher, folder, number, part=args.fake_batch, r=args.r, seed=seed,
            batch_size=math.ceil(number / math.ceil(number / max(16, args.fake_batch))),
            most=args.fake_classes, classes=classes, earlier=earlier, world=world, **options,
            report=lambda event: run.log(step=step, phase="seginversion", **event))
        if world.rank == 0:
            save_fakes(teacher, paths, folder.with_suffix(".png"))
    return earlier + paths


def distributed(student, world):
    """The network as the ranks train it together; on the CPU BatchNorm stays each process's own."""
    if world.size == 1:
        return student
    cuda = world.device.type == "cuda"
    if cuda:                                                # SyncBatchNorm has no CPU form
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    return nn.parallel.DistributedDataParallel(
        student, [world.device] if cuda else None, gradient_as_bucket_view=True)


def go_on(run, step, iterations, parts):
    """Load what an interrupted step saved last into `parts`; the iterations it had done."""
    if not run.last.exists():
        return 0
    way_out = f"remove it, and step {step} starts over"
    state = read_checkpoint(run.last, way_out)
    try:
        if state["step"] != step:
            return 0
        if type(state["iteration"]) is not int or not 0 < state["iteration"] <= iterations:
            raise ValueError
        if state["settings"] != run.settings:
            raise LookupError
        for name, part in parts.items():
            part.load_state_dict(state[name])
        run.seconds.update(state["seconds"])
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
        raise InputError(f"{run.last}: of another run, network or method; {way_out}") from None
    run.log(step=step, resumed_at=state["iteration"])
    return state["iteration"]


class Progress:
    """Log lines with the means of the named terms since the last; here alone (and in float16's
    scaler) the loop waits for the device, and a loss that is not finite ends the run."""

    def __init__(self, run, step, start, iterations, batch_size, world):
        self.run, self.step, self.start, self.iterations = run, step, start, iterations
        self.batch_size, self.world = batch_size, world
        self.window, self.waited = [], 0.0
        self.began = self.since = self.idle = time.monotonic()

    def batches(self, loader):
        """The loader's batches; adds up how long the loop waits for them."""
        for batch in loader:
            self.waited += time.monotonic() - self.idle
            yield batch
            self.idle = time.monotonic()

    def add(self, terms):
        self.names = list(terms)
        self.window.append(torch.stack(list(terms.values())))

    def log(self, iteration, lr):
        values = self.world.sum(torch.stack(self.window))   # (iterations since then, terms)
        values = (values / self.world.size).cpu()
        if not values.isfinite().all():
            row = (~values.isfinite()).any(1).nonzero()[0].item()
            raise FloatingPointError(
                f"step {self.step}, iteration {iteration - len(values) + 1 + row} of "
                f"{self.iterations}: a loss is not finite: "
                f"{dict(zip(self.names, values[row].tolist()))}. "
                f"Try a lower learning rate. {ANOTHER_FOLDER}")
        now, means = time.monotonic(), dict(zip(self.names, values.mean(0).tolist()))
        seconds, left = now - self.since, self.iterations - iteration
        self.run.log(step=self.step, iteration=iteration, of=self.iterations,
                     loss=sum(means.values()), **means, lr=lr, data_wait=self.waited / seconds,
                     eta=(now - self.began) / (iteration - self.start) * left,
                     **{"images/s": len(values) * self.batch_size / seconds})
        self.window, self.waited, self.since = [], 0.0, now


def train_step(student, objective, view, step, args, run, world):
    """Train one step, from what it saved last on: each epoch, but not every few iterations."""
    device, (real, fake) = world.device, batch_parts(args, step)
    per_epoch, iterations = step_length(args, step, len(view.indices))
    optimizer = torch.optim.SGD(student.parameters(), lr=args.lr0 if step == 0 else args.lr,
                                momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, iterations, power=0.9)
    with autocast(device, args.amp):                    # only float16 needs its gradients scaled
        half = args.amp and torch.get_autocast_dtype(device.type) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    parts = {"model": student, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
             "objective": objective}
    start = go_on(run, step, iterations, parts)
    before = run.seconds.get("training", 0.0)
    wrapped = distributed(student, world).train()
    loader = DataLoader(
        view, num_workers=args.workers, pin_memory=device.type == "cuda",
        worker_init_fn=quiet_worker, batch_sampler=data.train_batches(
            len(view.indices), len(view.fakes), real, fake, iterations,
            derive_seed(args.seed, step, 0), start, world.rank, world.size))
    progress = Progress(run, step, start, iterations, args.batch_size, world)
    every = max(per_epoch, min(20, iterations // 30))       # a small set's epochs are seconds
    for iteration, (images, labels) in enumerate(progress.batches(loader), start + 1):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, args.amp):
            loss, terms = objective.loss(wrapped, images, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        terms |= objective.after_backward(student)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        progress.add(terms)
        saved = iteration % every == 0 or iteration == iterations
        if iteration % 20 == 0 or saved:
            progress.log(iteration, scheduler.get_last_lr()[0])
            run.seconds["training"] = before + time.monotonic() - progress.began
        if saved and world.rank == 0:
            state = {"step": step, "iteration": iteration, "seconds": run.seconds,
                     "settings": run.settings,
                     **{name: part.state_dict() for name, part in parts.items()}}
            write_atomically(run.last, lambda p: torch.save(state, p))
    if not all(bool(v.isfinite().all()) for v in student.state_dict().values()):
        raise FloatingPointError(f"step {step}: a weight is not finite after the last iteration. "
                                 f"Try a lower learning rate. {ANOTHER_FOLDER}")


# ------------------------------------------------------------------------------------- the run

def score(step, task, args, run, world):
    """Test what is on the disk after a step; its record is written last."""
    model, about = load_model(run.checkpoint(step), world.device, task.network(step, args))
    check_method(run.checkpoint(step), about, args)
    run.seconds = about["seconds"]
    view = test_view(task.test_set, task.test_labels, task.steps, step, args.crop, args.dataset)
    with run.timed("evaluation"):
        confusion = evaluate(model, view, world, args.workers, args.amp,
                             report=lambda event: run.show({"step": step, **event}))
    if world.rank == 0:
        if step == len(task.steps) - 1:
            save_predictions(model, view, run.folder / "predictions.png", world.device)
        run.write_record(step, task.network(step, args), confusion.tolist(), run.seconds)
        run.log(step=step, **summarize(confusion, task.groups)["background excluded"],
                seconds=run.seconds)
        if step < len(task.steps) - 1:                      # the last one comes with results.json
            write_report(run)


def write_report(run):
    """report.html; a run does not end because of what is odd in files that only the report reads.
    """
    try:
        report.write([run.folder], run.folder / "report.html")
    except Exception as error:
        print(f"note: {run.folder / 'report.html'} is not written: {error!r}", file=sys.stderr)


def write_results(task, args, run, world):
    """results.json, and the table on the screen.

    Its seconds are those of the whole training of a step, and of the last launch's part of a
    synthesis.
    """
    records, last = [], len(task.steps) - 1
    for step in range(len(task.steps)):
        record = run.read_record(step, task.network(step, args))
        if not record:
            raise InputError(f"{run.checkpoint(step)} or its .json has changed while the run was "
                             "on; the same command scores it again")
        confusion = torch.tensor(record["confusion"])
        per_class = dict(zip(["background", *task.names(last)[1:]], iou(confusion).tolist()))
        records.append({"iou": per_class, **summarize(confusion, task.groups), **record})
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "torchvision": torchvision.__version__}
    final, path = summarize(confusion, task.groups), run.folder / "results.json"
    flags = off_default(args)
    write_json(path, {"settings": vars(args), "flags": flags, "processes": world.size,
                      "device": str(world.device), "versions": versions, "final": final,
                      "steps": records})
    write_report(run)
    print(f"\n{args.dataset} {args.task} {args.setting}, {args.method}, after step {last} "
          f"({path}):\n{table(final, vars(args), flags)}\n"
          f"See {run.folder / 'report.html'}")


def check_method(path, about, args):
    """Refuse to build a method upon a step whose loss was another one, or that gathered nothing."""
    theirs = METHODS.get(about["method"])
    foreign = METHODS[args.method].own_step0 or theirs is None or theirs.own_step0
    gathers = METHODS[args.method].importance and not about["objective"]
    if foreign and about["method"] != args.method or gathers:
        raise InputError(f"{path} was trained with --method {about['method']}, and {args.method} "
                         f"needs a step of its own; train that step with --method {args.method}")


def check_files(task, args, run):
    """What is wrong with --pretrained and --step0 is said before the run folder is written."""
    if args.pretrained not in ("imagenet", "none") and not Path(args.pretrained).is_file():
        raise InputError(f"--pretrained {args.pretrained}: no such file")
    if args.step0 and not run.checkpoint(0).exists():
        _, about = load_model(args.step0, expected=task.network(0, args),
                              way_out="train step 0 anew, without --step0")
        check_method(args.step0, about, args)


def main(argv=None, real_replay=False):
    """Run a whole task. real_replay: real old images for fakes, which is outside the protocol."""
    args, world = parse(argv), setup()
    args.fake = "real" if real_replay else args.fake
    check_batch_size(args, world.size)
    task, run = open_task(args, world), Run(args.out, world)
    check_files(task, args, run)
    if world.rank == 0:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "workers")}
        seen = [list(task.train_set.classes), task.train_set.digest, task.test_set.digest,
                task.images]
        run.settings = run.claim({**settings, "data": sha256(json.dumps(seen))})
    run.settings = world.from_rank_0(run.settings)
    if world.rank == 0 and sys.stdout and sys.stdout.isatty():
        run.live = LiveLine(work_of(args, task))
    run.log(command=" ".join(sys.argv), processes=world.size, device=str(world.device),
            torch=torch.__version__, flags=off_default(args))
    for step in range(len(task.steps)):
        scored = world.rank == 0 and bool(run.read_record(step, task.network(step, args)))
        if world.from_rank_0(scored):
            continue
        run.seconds = {}
        if step == 0 and args.step0 and not world.from_rank_0(run.checkpoint(0).exists()):
            if world.rank == 0:
                write_atomically(run.checkpoint(0), lambda p: shutil.copyfile(args.step0, p))
            world.barrier()
        if not world.from_rank_0(run.checkpoint(step).exists()):
            learn(step, task, args, run, world)
        score(step, task, args, run, world)
    if world.rank == 0:
        write_results(task, args, run, world)


if __name__ == "__main__":
    with plain_errors("train.py"):
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
