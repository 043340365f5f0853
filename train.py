"""
Train one class-incremental task, all its steps in one run (paper, Sec. 3.3 and 4).

    python train.py                                                          # shapes 15-1: CPU, minutes
    torchrun train.py --task 15-1 --dataset voc                              # the paper's setting
    torchrun --nproc_per_node=8 train.py --task 100-10 --dataset ade --data-root data

Step 0 trains on the first classes. Every later step t inverts the network of step t - 1 into fake
images of all old classes (seginversion.py), then trains on half-real half-fake batches (distill.py).
The same command again goes on where it stopped. A run folder holds

    settings.json  log.jsonl  step-<t>.pth  step-<t>.json  fakes-step-<t>/  fakes-step-<t>.png
    predictions.png  results.json
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import data
from baselines import METHODS
from data import InputError, derive_seed, write_atomically
from eval import PAPER, autocast, evaluate, iou, save_predictions, summarize, table, test_view
from model import BACKBONES, UNREADABLE, DeepLabV3, load_model, save_model
from seginversion import parse_r, save_fakes, synthesize

# The paper's numbers (Sec. 4.2; MiB's where it says "as in [5]") are the parser's defaults; these are
# what a data set changes. `shapes` is not in the paper: its numbers fit a laptop's CPU.
DATASET_DEFAULTS = {
    "voc": {"task": "15-1"},
    "ade": {"task": "100-50", "epochs": 60},
    "folder": {},
    "shapes": {"task": "15-1", "backbone": "tiny", "pretrained": "none", "crop": 64, "epochs0": 14, "epochs": 12,
               "lr0": 0.1, "lr": 0.03, "num_fakes": 64, "fake_classes": 1, "fake_steps": 100, "tv": 2.0, "bn": 3.0,
               "workers": 1},
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every flag."""


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    a = p.add_argument
    a("--dataset", choices=list(DATASET_DEFAULTS), default="shapes", help="folder: your own images in VOC's layout")
    a("--data-root", default="data", help="where the data set is")
    a("--task", help="A-B: A classes first, then B a step; or offline (the paper's Joint)")
    a("--setting", choices=["disjoint", "overlapped"], default="disjoint",
      help="overlapped lets images of later classes into earlier steps (paper: both; its ablations: disjoint)")
    a("--split-dir", help="folder of MiB's train-<step>.npy lists, to compare with its ADE numbers")
    a("--void", choices=["background", "ignore"], default="background",
      help="void (255) in training: background as MiB does, or ignored as PLOP and SSUL do")
    a("--step0", metavar="CHECKPOINT", help="another run's step-0.pth to build upon: methods and ablations share it")
    a("--out", help="run folder, if not runs/<dataset>-<task>-<setting>[-<method>]")
    a("--backbone", choices=list(BACKBONES), default="resnet101", help="smaller ones for fewer or no GPUs")
    a("--pretrained", default="imagenet",
      help="imagenet (download), none, or a file: torchvision's or Mapillary's iABN")
    a("--crop", type=int, default=512, help="height and width of training, test and fake images")
    a("--batch-size", type=int, default=24, help="over all GPUs together, whatever their number")
    a("--epochs", type=int, default=30, help="per step; an epoch is one pass over the real images")
    a("--epochs0", type=int, help="step 0, if it needs another number")
    a("--lr0", type=float, default=1e-2, help="step 0")
    a("--lr", type=float, default=1e-3, help="later steps; lower it first if old classes collapse")
    a("--method", choices=list(METHODS), default="hrhf", help="a row of Tables 1 and 7")
    a("--lam", type=float, help="weight of the method's term against forgetting, if not its own (HRHF's is 1, Eq. 5; "
      "0: Table 5's W/O KD)")
    a("--init", choices=["background", "random"], help="of new classifiers, if not the method's (HRHF's: background)")
    a("--fake", choices=["seginversion", "noise", "none"],
      help="if not the method's. Table 2: none is its Baseline, noise its +Noise")
    a("--r", default="random", help="scale of Eq. 1: a number, avg, max (Tables 3 and 4), or random for every "
      "image and class (Sec. 3.2) or random-image for every image (Sec. 4.4)")
    a("--real-fake", default="1:1", help="proportion in a mini-batch (Table 6)")
    a("--num-fakes", type=int, help="per step, if not as many as it has real images (at most 1024)")
    a("--keep-fakes", action="store_true", help="ours, not the paper's: train on the fakes of earlier steps as well")
    a("--retry-fakes", action="store_true", help="ours: invert once more where the old network does not find a class it was "
      "asked for; at most twice the time")
    a("--fake-batch", type=int, default=16, help="images inverted together; lower it if memory is short")
    a("--fake-classes", type=int, default=3, help="most foreground classes in one fake (paper's Figure 3: 1 and 3)")
    a("--fake-steps", type=int, default=1000, help="optimisation steps of an inversion")
    a("--fake-lr", type=float, default=0.25, help="lower it if small fakes come out saturated")
    a("--tv", type=float, default=0.3, help="weight of the total variation; raise it if fakes are noisy")
    a("--bn", type=float, default=10.0, help="weight of the BatchNorm statistics; raise it if fakes look like no image")
    a("--spectrum", type=float, default=1.0, help="ours: 1 / f^SPECTRUM noise and gradients in SegInversion; "
      "0: plain Adam from white noise")
    a("--max-iters", type=int, help="smoke run: caps the iterations of every training step and inversion")
    a("--compile", action="store_true", help="torch.compile for SegInversion: costs a minute or two at first")
    a("--amp", action=argparse.BooleanOptionalAction, help="mixed precision, if not just on CUDA")
    a("--workers", type=int, help="loader processes per rank; raise it if data_wait in the log is not near 0")
    a("--seed", type=int, default=42, help="of everything random")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--dataset", choices=list(DATASET_DEFAULTS), default="shapes")
    p.set_defaults(**DATASET_DEFAULTS[first.parse_known_args(argv)[0].dataset])
    args = p.parse_args(argv)
    if args.task is None:
        raise InputError("--task: a folder needs one, such as 4-1")
    for least, names in ((1, "batch_size epochs epochs0 fake_batch fake_classes fake_steps num_fakes max_iters"),
                         (16, "crop"), (0, "lam tv bn spectrum workers seed"), (1e-12, "lr lr0 fake_lr")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be a finite number, at least {least}")
    parse_r(args.r)
    method = METHODS[args.method]
    args.lam = method.lam if args.lam is None else args.lam
    args.init = args.init or method.init
    args.fake = args.fake or ("seginversion" if method.fakes else "none")
    if args.keep_fakes and args.fake == "none":
        raise InputError("--keep-fakes: there are no fakes to keep without SegInversion")
    if args.retry_fakes and args.fake != "seginversion":
        raise InputError("--retry-fakes: there is nothing to invert again without SegInversion")
    if args.spectrum > 4:
        raise InputError(f"--spectrum {args.spectrum}: at most 4; photographs are near 1")
    args.epochs0 = args.epochs0 or args.epochs
    args.amp = torch.cuda.is_available() if args.amp is None else args.amp
    method_name = "" if args.method == p.get_default("method") else f"-{args.method}"
    args.out = args.out or f"runs/{args.dataset}-{args.task}-{args.setting}{method_name}"
    if args.workers is None:
        args.workers = data.default_workers()
    return args


def batch_parts(args, step):
    """How many real and fake images a mini-batch of this step holds."""
    if step == 0 or args.fake == "none":
        return args.batch_size, 0
    try:
        real, fake = (int(part) for part in args.real_fake.split(":"))
        real = round(args.batch_size * real / (real + fake))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--real-fake {args.real_fake}: expected two numbers, such as 1:1") from None
    if not 1 <= real < args.batch_size:
        raise InputError(f"--real-fake {args.real_fake}: leaves no real or no fake image "
                         f"in a batch of {args.batch_size}")
    return real, args.batch_size - real


def check_batch_size(args, world):
    if args.batch_size % world or args.batch_size < 2 * world:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes, with at least "
                         "two images for each (BatchNorm after global pooling has one value per image)")


def step_length(args, step, num_images):
    """Iterations of an epoch and of the whole step, and the number of fakes that SegInversion makes for it."""
    real, fake = batch_parts(args, step)
    per_epoch = max(1, num_images // real)
    iterations = (args.epochs0 if step == 0 else args.epochs) * per_epoch
    fakes = (args.num_fakes or min(num_images, 1024)) if fake and num_images else 0
    return (per_epoch, min(iterations, args.max_iters or iterations),
            math.ceil(fakes / args.fake_batch) * args.fake_batch)


def setup():
    """rank, world size, device, from torchrun's environment; a world of one runs the same code."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:                                           # ranks wait for each other's last batch of fakes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return rank, world, device


def from_rank_0(value, world):
    """The value rank 0 has, on every rank."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def claim(run, args, data_set):
    """Make the run folder this command's, or refuse: mixing settings would go unnoticed in the results.

    Settings may change until something was trained. `data_set` (classes and the labels of all images)
    stands in for --data-root, which may move.
    """
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "compile")}
    settings["data"] = hashlib.sha256(json.dumps(data_set).encode()).hexdigest()[:16]
    path = run / "settings.json"
    if [*run.glob("step-*.pth"), *run.glob("last.pth")] and path.exists():
        there = data.read_json(path, {"dataset": str})
        # a flag that came later than the run was off there
        differing = [f"--{k.replace('_', '-')} is {there.get(k, False)} there and {settings[k]} here"
                     for k in settings if k not in ("data", "data_root") and there.get(k, False) != settings[k]]
        if there.get("data") != settings["data"]:
            differing.append("its classes, images or labels have changed")
        if differing:
            raise InputError(f"{run} holds a run with other settings: {'; '.join(differing)}. {ANOTHER_FOLDER}")
    run.mkdir(parents=True, exist_ok=True)
    for litter in run.rglob(".*.tmp"):                      # of a process that was killed while it wrote
        litter.unlink()
    write_atomically(path, lambda p: p.write_text(json.dumps(settings, indent=1)))


def training_indices(args, steps, groups, labels):
    """The training images of every step; what is wrong with them is said before anything is trained."""
    if args.split_dir:
        indices = [data.read_split(args.split_dir, step, len(labels)) for step in range(len(groups))]
        if len(steps) == 1:                                 # joint: all lists together
            indices = [sorted(set().union(*indices))]
    elif args.dataset == "ade" and args.setting == "disjoint":
        indices = [data.partition_indices(labels, steps, step) for step in range(len(steps))]
    else:
        indices = [data.split_indices(labels, steps, step, args.setting) for step in range(len(steps))]
    empty = [step for step, images in enumerate(indices) if not images]
    if empty and (empty[0] == 0 or not args.max_iters):     # a smoke run may be on a handful of images
        raise InputError(f"step {empty[0]} of task {args.task} ({args.setting}) has no training images "
                         f"in {args.data_root}")
    return indices


def share_step0(args, classes, checkpoint):
    """Copy --step0 to a run's own step-0.pth, if it is a step 0 of this task and network."""
    model, about = load_model(args.step0)
    there, here = ((backbone, names, crop) for backbone, names, crop in (
        (model.backbone, about["classes"], about["crop"]), (args.backbone, classes, args.crop)))
    if there != here:
        what = next(what for what, a, b in zip(("backbone", "classes", "crop"), there, here) if a != b)
        raise InputError(f"--step0 {args.step0}: its {what} differs from this command's; "
                         "train step 0 anew, without --step0")
    write_atomically(checkpoint, lambda p: shutil.copyfile(args.step0, p))


def strict_json(value, digits=17):
    """JSON with null for nan and inf, which JSON does not have, and floats of so many digits."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None,
                                 parse_float=lambda text: float(f"{float(text):.{digits}g}")))


ANOTHER_FOLDER = ("Choose another --out (step-<t>.pth and step-<t>.json copied there are kept and built upon), "
                  "or remove that folder")


class Log:
    """One JSON line an event, the same to screen and log.jsonl; rank 0 only."""

    def __init__(self, path, rank):
        self.file = open(path, "a") if rank == 0 else None

    def __call__(self, **event):
        if self.file:
            line = strict_json(event, digits=4)
            print(line, flush=True)
            print(line, file=self.file, flush=True)


def train_step(student, teacher, method, importance, view, parts, step, args, run, log, seconds, rank, world, device):
    """Train one step, from the last whole epoch on if there is one; `seconds` is kept up to date.

    method:     (student, teacher, batch) -> loss, its named terms
    importance: None, or what adds lam * importance.penalty(student) to it
    """
    real, fake = parts
    per_epoch, iterations, _ = step_length(args, step, len(view.indices))
    optimizer = torch.optim.SGD(student.parameters(), lr=args.lr0 if step == 0 else args.lr,
                                momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, iterations, power=0.9)
    with autocast(device, args.amp):                        # only float16 needs its gradients scaled
        half = args.amp and torch.get_autocast_dtype(device.type) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)

    last, start = run / "last.pth", 0
    if last.exists():
        try:
            state = torch.load(last, map_location="cpu", weights_only=True)
        except UNREADABLE:
            raise InputError(f"{last}: damaged; remove it, and step {step} starts over") from None
        if state["step"] == step:
            student.load_state_dict(state["model"])
            for name, part in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
                part.load_state_dict(state[name])
            if importance:
                importance.load_state_dict(state["importance"])
            start = state["iteration"]
            seconds.update(state["seconds"])
            log(step=step, resumed_at=start)

    wrapped = student
    if world > 1:
        if device.type == "cuda":                           # SyncBatchNorm has no CPU form
            wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        wrapped = nn.parallel.DistributedDataParallel(
            wrapped, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    wrapped.train()
    loader = DataLoader(
        view, num_workers=args.workers, pin_memory=device.type == "cuda", batch_sampler=data.train_batches(
            len(view.indices), len(view.fakes), real, fake, iterations, derive_seed(args.seed, step, 0),
            start, rank, world))
    window, waited, before = [], 0.0, seconds.get("training", 0.0)
    began = since = arrived = time.monotonic()
    for iteration, (images, labels) in enumerate(loader, start + 1):
        waited += time.monotonic() - arrived
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, args.amp):
            loss, terms = method(wrapped, teacher, (images, labels))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if importance:                                      # its update looks at the task's gradients alone
            scaler.unscale_(optimizer)
            importance.update(student)
            if importance.omega:
                penalty = args.lam * importance.penalty(student)
                penalty.backward()
                terms["penalty"] = penalty.detach()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        window.append(torch.stack(list(terms.values())))

        epoch_ends = iteration % per_epoch == 0 or iteration == iterations
        if iteration % 20 == 0 or epoch_ends:               # here alone the loop waits for the device
            values = torch.stack(window)                    # (iterations since the last line, terms)
            if world > 1:
                dist.all_reduce(values)
            values = (values / world).cpu()
            if not values.isfinite().all():
                row = (~values.isfinite()).any(1).nonzero()[0].item()
                raise FloatingPointError(
                    f"step {step}, iteration {iteration - len(window) + 1 + row} of {iterations}: a loss is not "
                    f"finite: {dict(zip(terms, values[row].tolist()))}. Try a lower learning rate. {ANOTHER_FOLDER}")
            now = time.monotonic()
            means = dict(zip(terms, values.mean(0).tolist()))
            log(step=step, iteration=iteration, of=iterations, loss=sum(means.values()), **means,
                lr=scheduler.get_last_lr()[0], data_wait=waited / (now - since),
                eta=(now - began) / (iteration - start) * (iterations - iteration),
                **{"images/s": len(window) * args.batch_size / (now - since)})
            window, waited, since = [], 0.0, now
        seconds["training"] = before + time.monotonic() - began
        if epoch_ends and rank == 0:
            write_atomically(last, lambda p: torch.save({
                "step": step, "iteration": iteration, "seconds": seconds,
                "model": student.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(),
                "importance": importance and importance.state_dict()}, p))
        arrived = time.monotonic()
    if not all(bool(v.isfinite().all()) for v in student.state_dict().values()):
        raise FloatingPointError(f"step {step}: a weight is not finite after the last iteration. "
                                 f"Try a lower learning rate. {ANOTHER_FOLDER}")


def main(argv=None):
    args = parse(argv)
    rank, world, device = setup()
    check_batch_size(args, world)
    run = Path(args.out)
    train_set, test_set = (data.load(args.dataset, args.data_root, split) for split in ("train", "val"))
    steps = groups = data.task_steps(args.task, len(train_set.classes) - 1)
    if METHODS[args.method].offline:
        steps = [sum(groups, [])]                           # trained in one step, scored in the task's groups
    for step in range(len(steps)):
        batch_parts(args, step)
    train_labels, test_labels = from_rank_0(
        (train_set.labels(), test_set.labels()) if rank == 0 else None, world)
    if rank == 0:
        claim(run, args, [list(train_set.classes), train_labels, test_labels])
    indices = training_indices(args, steps, groups, train_labels)
    log = Log(run / "log.jsonl", rank)
    log(command=" ".join(sys.argv), processes=world, device=str(device), torch=torch.__version__)
    inversion = {"steps": min(args.fake_steps, args.max_iters or args.fake_steps), "lr": args.fake_lr,
                 "tv": args.tv, "bn": args.bn, "spectrum": args.spectrum}
    method = partial(METHODS[args.method].loss, lam=args.lam)

    for step in range(len(steps)):
        checkpoint, record = run / f"step-{step}.pth", run / f"step-{step}.json"
        if record.exists():
            continue
        seconds, fakes = {}, []
        if step == 0 and args.step0 and not checkpoint.exists():
            if rank == 0:
                share_step0(args, [train_set.classes[c] for c in [0, *steps[0]]], checkpoint)
            from_rank_0(None, world)
        if not checkpoint.exists():
            images = indices[step]
            if without := [c for c in steps[step] if not any(c in train_labels[i] for i in images)]:
                log(step=step, warning="no training image shows " + ", ".join(train_set.classes[c] for c in without))
            parts, (*_, number_of_fakes) = batch_parts(args, step), step_length(args, step, len(images))
            torch.manual_seed(derive_seed(args.seed, step, 1))          # weight initialisation
            if step == 0:
                teacher = None
                if world > 1 and rank:                      # rank 0 downloads, the others find it done
                    dist.barrier()
                student = DeepLabV3(args.backbone, [1 + len(steps[0])],
                                    None if args.pretrained == "none" else args.pretrained)
                if world > 1 and not rank:
                    dist.barrier()
            else:
                teacher, about = load_model(run / f"step-{step - 1}.pth", device)
                teacher.requires_grad_(False)
                if number_of_fakes:
                    earlier = []                            # labelled by the latest teacher, as its own
                    for t in range(1, step) if args.keep_fakes else ():
                        earlier += [path for path, _ in data.read_fakes(run / f"fakes-step-{t}")] if indices[t] else []
                    began = time.monotonic()
                    try:
                        fakes = synthesize(
                            teacher, run / f"fakes-step-{step}", number_of_fakes, size=args.crop,
                            batch_size=args.fake_batch, r=args.r, most=args.fake_classes, retry=args.retry_fakes,
                            seed=derive_seed(args.seed, step, 2), rank=rank, world=world, compile=args.compile,
                            report=lambda event: log(step=step, phase="seginversion", **event),
                            **{**inversion, **({"steps": 0, "spectrum": 0.0} if args.fake == "noise" else {})})
                    except torch._dynamo.exc.TorchDynamoException as error:
                        raise InputError(f"--compile: torch.compile failed ({' '.join(str(error).split())[:200]}); "
                                         "go on without it") from None
                    if rank == 0:
                        save_fakes(teacher, fakes, run / f"fakes-step-{step}.png")
                    seconds["seginversion"] = time.monotonic() - began
                    fakes += earlier
                student, _ = load_model(run / f"step-{step - 1}.pth")
                student.add_classes(len(steps[step]), args.init)
            student.to(device)
            importance = METHODS[args.method].importance
            if importance:
                if teacher and about["method"] != args.method:
                    raise InputError(f"{run}/step-{step - 1}.pth was trained with --method {about['method']}, which "
                                     f"did not gather what {args.method} needs; train that step with --method "
                                     f"{args.method}")
                importance = importance(student, teacher, teacher and about["importance"])
            view = data.View(train_set, images, data.label_map(steps, step, "train", args.void),
                             data.train_transform(args.crop), fakes)
            if images:
                train_step(student, teacher, method, importance, view, parts, step, args, run, log, seconds,
                           rank, world, device)
            if rank == 0:
                channels = [0] + [c for classes in steps[:step + 1] for c in classes]
                save_model(student, checkpoint, step=step, crop=args.crop, inversion=inversion, seconds=seconds,
                           method=args.method, importance=importance and importance.state_dict(),
                           classes=[train_set.classes[c] for c in channels])
                (run / "last.pth").unlink(missing_ok=True)
            if world > 1:
                dist.barrier()
        began = time.monotonic()
        model, about = load_model(checkpoint, device)       # every rank scores what is on the disk
        view = test_view(test_set, test_labels, steps, step, args.crop, args.dataset)
        confusion = evaluate(model, view, device, args.workers, rank, world, args.amp)
        seconds = {**about["seconds"], "evaluation": time.monotonic() - began}
        if rank == 0:
            if step == len(steps) - 1:
                save_predictions(model, view, run / "predictions.png", device)
            write_atomically(record, lambda p: p.write_text(strict_json(
                {"confusion": confusion.tolist(), "seconds": seconds})))
            log(step=step, **summarize(confusion, groups)["background excluded"], seconds=seconds)

    if rank == 0:
        write_results(run, args, steps, groups, train_set.classes, world, device)


def write_results(run, args, steps, groups, classes, world, device):
    """results.json, and the table on the screen.

    Its seconds are those of the whole training of a step, and of the last launch's part of a synthesis.
    """
    channels = ["background" if c == 0 else classes[c] for c in [0] + [c for part in steps for c in part]]
    records = []
    for step in range(len(steps)):
        record = data.read_json(run / f"step-{step}.json", {"confusion": list, "seconds": dict})
        confusion = torch.tensor(record["confusion"])
        records.append({"iou": dict(zip(channels, iou(confusion).tolist())), **summarize(confusion, groups), **record})
    results = {"settings": vars(args), "processes": world, "device": str(device),
               "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                            "torchvision": torchvision.__version__},
               "final": summarize(confusion, groups), "steps": records}
    write_atomically(run / "results.json", lambda p: p.write_text(strict_json(results)))
    print(f"\n{args.dataset} {args.task} {args.setting}, {args.method}, after step {len(steps) - 1} "
          f"({run / 'results.json'}):")
    print(table(results["final"], args.method, PAPER.get((args.dataset, args.task, args.setting), {}).get(args.method)))


if __name__ == "__main__":
    with data.plain_errors("train.py"):
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
