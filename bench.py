"""
Speed and memory as ratios of two sides, and a plan for a run at the paper's scale.

    python bench.py > results/bench.md                       # all of it: about half an hour on two cores
    python bench.py losses scale                             # some of it
    python bench.py --plan --task 15-1 --dataset voc --gpus 8

Every ratio is that of the seconds of A and B, measured in turn, A B A B ..., in one process: the median
of the pairs and their lowest and highest. Any flag of train.py may follow --plan.
"""
import argparse
import contextlib
import copy
import functools
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import distill
import train
from baselines import METHODS
from chunked import chunked, upsample
from data import InputError
from eval import evaluate
from model import DeepLabV3
from saa import scale_aware_aggregation
from seginversion import classification_loss, invert, synthesize

REPEATS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def alternate(sides, repeats=REPEATS):
    """Seconds of every side, {name: [one per repeat]}, the sides run in turn after one run each to warm up."""
    for run in sides.values():
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def row(what, a, b, target=""):
    """A line of the table: seconds of A over seconds of B, pair by pair."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"| {what} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {target} |"


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors alive inside, at their most (`peak`), counted from zero at the start.

    Works on the meta device as well, where nothing is computed. What a kernel allocates for itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        there = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in there | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, storage, nbytes):
        self.known.discard(storage)
        self.now -= nbytes


# ------------------------------------------------------------------------------------------- 1. losses

def loss_case(form, B, C=151, size=512, device=DEVICE):
    """HRHF's loss and its gradient to logits at stride 16: a function to call, and those logits."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(B, n, size // 16, size // 16, generator=generator).to(device) for n in (C, C - 1))
    labels = torch.zeros(B, size, size, dtype=torch.uint8, device=device)
    labels[:, :size // 3] = C - 1
    s.requires_grad_()

    def plain():
        s.grad = None
        sum(distill.hrhf_loss(upsample(s, labels), upsample(t, labels), labels).values()).backward()

    def in_bands():
        s.grad = None
        chunked(distill.hrhf_loss, s, t, labels, of_labelled=["seg"])[0].backward()
    return {"plain": plain, "in bands": in_bands}[form], s


def measured_peak(form, B):
    """Bytes that a loss adds to the process (on a GPU: to what torch has allocated) at its most."""
    run, _ = loss_case(form, B)
    small, _ = loss_case(form, 1, C=4, size=64)
    small()                                                 # what the first call of all loads
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    import resource                                         # not on Windows
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    before = peak()
    run()
    return peak() - before


def counted_peak(form, B):
    run, _ = loss_case(form, B, device="meta")
    with PeakMemory() as memory:
        run()
    return memory.peak


def losses():
    yield f"| **HRHF's loss on stride-16 logits, 151 classes, 512 x 512** ({DEVICE}) | | | |"
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    image = counted_peak("plain", 1)
    largest = max(B for B in (4, 8, 16) if B == 4 or B * image < 0.8 * free)
    sizes = lambda plain, bands: f"plain ({plain / 1e9:.2f} GB) / in bands ({bands / 1e9:.2f} GB) | {plain / bands:.0f}"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:     # a process per number
        for B in (largest // 4, largest // 2, largest):
            plain, bands = (fresh.apply(measured_peak, (form, B)) for form in ("plain", "in bands"))
            yield f"| peak memory, measured, batch {B}: {sizes(plain, bands)} | | |"
    for B in (largest, 24):
        plain, bands = counted_peak("plain", B), counted_peak("in bands", B)
        yield (f"| peak memory, tensors counted, batch {B}, bands as on a GPU: {sizes(plain, bands)} | "
               f"| {'>= 10' if B == 24 else ''} |")
    for B, C in ((4, 21), (4, 151)):
        (plain, s), (bands, s_bands) = loss_case("plain", B, C), loss_case("in bands", B, C)
        seconds = alternate({"plain": plain, "in bands": bands})
        yield row(f"time, batch {B}, {C} classes: in bands / plain", seconds["in bands"], seconds["plain"], "<= 1")
    difference = (s.grad - s_bands.grad).abs().max() / s.grad.abs().max()
    yield f"| largest difference of the two gradients / largest gradient | {difference:.0e} | | <= 1e-5 |"


# ------------------------------------------------------------------------------------- 2. SegInversion

def published_inversion(model, targets, r, size, steps):
    """The optimisation step as DeepInversion's paper and its published form have it, from its formulas.

    Batch statistics by autograd through a mean and the variance of a permuted copy; the losses are ours.
    """
    x = torch.randn(len(targets), 3, size, size, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.9))
    targets = (targets / targets.sum(1, keepdim=True)).to(DEVICE)
    distances = []

    def compare(layer, inputs, output):
        mean = inputs[0].mean([0, 2, 3])
        var = inputs[0].permute(1, 0, 2, 3).contiguous().view(len(mean), -1).var(1, unbiased=False)
        distances.append((layer.running_var - var).norm() + (layer.running_mean - mean).norm())
    hooks = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i in range(steps):
        distances.clear()
        view = torch.roll(x, (3, -5), dims=(2, 3))
        view = view.flip(3) if i % 2 else view
        scores = scale_aware_aggregation(model(view), r)
        tv = sum((a - b).norm() for a, b in (
            (view[..., 1:], view[..., :-1]), (view[:, :, 1:], view[:, :, :-1]),
            (view[:, :, 1:, 1:], view[:, :, :-1, :-1]), (view[:, :, 1:, :-1], view[:, :, :-1, 1:])))
        loss = classification_loss(scores, targets).mean() + 1e-4 * tv + 1e-5 * view.norm() \
            + 0.01 * (10 * distances[0] + sum(distances[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()


def inversion():
    for backbone, B, size, steps in (("mobilenet_v2", 16, 128, 6), ("resnet50", 16, 128, 2)):
        yield f"| **A step of SegInversion, {backbone}, {B} x {size} x {size}** ({DEVICE}) | | | |"
        torch.manual_seed(0)
        model = DeepLabV3(backbone, [21]).to(DEVICE).eval().requires_grad_(False)
        plain_layout = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        targets = torch.zeros(B, 21)
        targets[:, [0, 3]] = 1
        r = torch.full((B, 21), 5.0)

        def bare(model):
            x = torch.randn(B, 3, size, size, device=DEVICE, requires_grad=True)
            for _ in range(steps):
                x.grad = None
                model(x).sum().backward()
        ours = functools.partial(invert, model, targets, r, size=size, steps=steps)
        seconds = alternate({
            "bare": lambda: bare(model), "ours": ours,
            "published": lambda: published_inversion(model, targets, r, size, steps),
            "bare, plain layout": lambda: bare(plain_layout),
            "published, plain layout": lambda: published_inversion(plain_layout, targets, r, size, steps),
            "compiled": lambda: ours(compile=True)})
        yield row("ours / bare (forward + backward to the input, frozen weights, channels-last)",
                  seconds["ours"], seconds["bare"], "<= 1.25")
        yield row("ours with `--compile` / bare", seconds["compiled"], seconds["bare"])
        yield row("ours with `--compile` / ours", seconds["compiled"], seconds["ours"])
        yield row("published form / ours, both channels-last", seconds["published"], seconds["ours"], ">= 1.4")
        yield row("published form in torch's usual layout / ours",
                  seconds["published, plain layout"], seconds["ours"], ">= 1.4")
        yield row("bare in torch's usual layout / bare channels-last", seconds["bare, plain layout"], seconds["bare"])


# ------------------------------------------------------------------------------------ 3. a training step

def training(B=2, size=512):
    yield f"| **A training step, resnet101, {B} x {size} x {size}, 17 classes** ({DEVICE}) | | | |"
    torch.manual_seed(0)
    teacher = DeepLabV3("resnet101", [16]).to(DEVICE).eval().requires_grad_(False)
    student = DeepLabV3("resnet101", [16, 1]).to(DEVICE)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(B, 3, size, size, device=DEVICE)
    labels = torch.zeros(B, size, size, dtype=torch.uint8, device=DEVICE)
    labels[:, :size // 3] = 16

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def bare():
        step(lambda: student(images).sum())
        with torch.inference_mode():
            teacher(images)

    def ours():
        step(lambda: distill.hrhf(student, teacher, (images, labels))[0])
    seconds = alternate({"bare": bare, "ours": ours})
    yield row("HRHF's step / (bare student step + bare teacher forward)", seconds["ours"], seconds["bare"], "<= 1.10")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_folder(folder, 200)
        dataset = data.load("folder", folder, "train")
        args = train.parse("--dataset folder --task 1-1 --backbone mobilenet_v2 --pretrained none --crop 256 "
                           f"--batch-size 16 --max-iters 80 --workers 2 --data-root {folder} --out {folder}".split())
        table = data.label_map([[1]], 0, "train")
        view = data.View(dataset, range(len(dataset)), table, data.train_transform(args.crop))
        student, lines = DeepLabV3("mobilenet_v2", [2]).to(DEVICE), []
        train.train_step(student, None, METHODS["hrhf"].loss, None, view, (16, 0), 0, args, folder,
                         lambda **event: lines.append(event), {}, 0, 1, torch.device(DEVICE))
    waits = [line["data_wait"] for line in lines[1:]]       # the first line waits for the workers to start
    yield (f"| data wait / training step, mobilenet_v2, 16 x 256 x 256 out of 500 x 375 JPEGs, 2 workers "
           f"| {statistics.median(waits):.3f} | {min(waits):.3f} to {max(waits):.3f} | < 0.05 |")


def make_folder(folder, number, distinct=50):
    """A data set in VOC's layout, 500 x 375: `distinct` different pairs, Shapes' enlarged, under `number` names."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    shapes = data.Shapes("val")
    for i in range(number):
        image, mask = folder / "JPEGImages" / f"{i:05d}.jpg", folder / "SegmentationClass" / f"{i:05d}.png"
        if i < distinct:
            picture, ids = shapes.read(i)
            picture.resize((500, 375)).save(image, quality=90)
            ids = ids.resize((500, 375), Image.Resampling.NEAREST)
            ids.putpalette(data.palette().tobytes())
            ids.save(mask)
        else:
            os.link(folder / "JPEGImages" / f"{i % distinct:05d}.jpg", image)
            os.link(folder / "SegmentationClass" / f"{i % distinct:05d}.png", mask)
    (folder / "ImageSets/Segmentation/train.txt").write_text("".join(f"{i:05d}\n" for i in range(number)))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in shapes.classes))


# --------------------------------------------------------------------------------------------- 4. scale

def rank_main(process, world, job, folders, ready, queue):
    """One process with one thread; `world` of them share a job, and a job has a folder. Its seconds go to the queue."""
    rank, folder = process % world, folders[process // world]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    queue.put({"synthesis": rank_synthesis, "training": rank_training}[job](rank, world, folder, ready))
    if world > 1:
        dist.destroy_process_group()


def rank_synthesis(rank, world, folder, ready):
    model = DeepLabV3("mobilenet_v2", [21]).eval()
    options = {"size": 96, "batch_size": 8, "rank": rank, "world": world}
    synthesize(model, folder / "warm", 16, steps=1, **options)
    ready.wait()
    began = time.perf_counter()
    synthesize(model, folder / "timed", 64, steps=8, **options)
    return time.perf_counter() - began


def rank_training(rank, world, folder, ready):
    dataset = data.Shapes("val")
    teacher, student = (DeepLabV3("mobilenet_v2", classes) for classes in ([16], [16, 1]))
    teacher.eval().requires_grad_(False)
    table = data.label_map([[*range(1, 16)], [16]], 1, "train")
    view = data.View(dataset, range(len(dataset)), table, data.train_transform(256))
    for iterations in (1, 6):                               # the first to warm up
        args = train.parse(f"--crop 256 --batch-size 16 --workers 0 --no-amp --max-iters {iterations} --out {folder}".split())
        seconds = {}
        train.train_step(student, teacher, METHODS["hrhf"].loss, None, view, (16, 0), 1, args, folder,
                         lambda **event: None, seconds, rank, world, torch.device("cpu"))
        ready.wait()
        (folder / "last.pth").unlink(missing_ok=True)
    return seconds["training"]


def scale():
    yield "| **Images/s of two processes with a thread each over one, cpu** | | | |"
    spawn = multiprocessing.get_context("spawn")

    def timed(job, jobs, world):
        """Seconds of `jobs` jobs at once, each shared by `world` processes."""
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(j) for j in range(jobs)]
            for path in folders:
                path.mkdir()
            queue, ready = spawn.SimpleQueue(), spawn.Barrier(jobs * world)
            torch.multiprocessing.spawn(rank_main, (world, job, folders, ready, queue), nprocs=jobs * world)
            return max(queue.get() for _ in range(jobs * world))
    for job, what, target, share in (
            ("synthesis", "SegInversion, mobilenet_v2, 8 batches of 8 x 96 x 96", ">= 1.9", ">= 0.95"),
            ("training", "training, mobilenet_v2, mini-batch 16 x 256 x 256", ">= 1.7", ">= 0.85")):
        rounds = [(timed(job, 1, 1), timed(job, 1, 2), timed(job, 2, 1)) for _ in range(REPEATS)]
        one, shared, two = zip(*rounds)
        yield row(f"{what}: two ranks / one", one, shared, target)
        yield row("the machine's limit: two jobs that know nothing of each other / one", [2 * t for t in one], two)
        yield row("two ranks / that limit", two, [2 * t for t in shared], share)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_folder(folder, 10582)
        dataset = data.load("folder", folder, "train")
        scan, loop, cached = [], [], []
        yield "| **Labels of 10,582 images of 500 x 375** | | | |"

        def keep_time(seconds, run):
            began = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):         # "scanning masks: ..."
                run()
            seconds.append(time.perf_counter() - began)
        for _ in range(REPEATS):
            dataset.cache.unlink(missing_ok=True)
            keep_time(scan, dataset.labels)
            keep_time(cached, dataset.labels)
            keep_time(loop, lambda: [np.unique(np.array(Image.open(mask))).tolist() for mask in dataset.masks])
        yield row("images/s, ours / a plain loop with np.unique", loop, scan)
        yield row(f"a second start (at most {max(cached):.2f} s) / the scan", cached, scan, "< 1 s")


# ---------------------------------------------------------------------------------------------- 5. plan

def images_of_steps(args):
    """Classes and training images of each step, test images, and whether they were counted or had been recorded."""
    joint = METHODS[args.method].offline
    try:
        train_set, test_set = (data.load(args.dataset, args.data_root, split) for split in ("train", "val"))
    except InputError:
        recorded = json.loads((Path(__file__).parent / "results/image-counts.json").read_text()).get(args.dataset, {})
        counts = recorded.get(f"{'offline' if joint else args.task} {args.setting}")
        if counts is None or args.split_dir:
            raise
        groups = data.task_steps(args.task, recorded["classes"])
        return [sum(groups, [])] if joint else groups, counts, recorded["test"], "as recorded in results/image-counts.json"
    groups = data.task_steps(args.task, len(train_set.classes) - 1)
    steps = [sum(groups, [])] if joint else groups
    images = train.training_indices(args, steps, groups, train_set.labels())
    return steps, [len(i) for i in images], len(test_set), f"counted in {args.data_root}"


def convolution_backward(dy, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, **_):
    """FLOPs of each gradient wanted, from shapes: those of the forward pass. torch's own count takes groups for dense."""
    return 2 * math.prod(dy) * math.prod(weight[1:]) * (wanted[0] + wanted[1])


def cost(run):
    """FLOPs of a run on the meta device, by torch's counter, and bytes of its tensors at their most."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}) as flops:
        run()
    with PeakMemory() as memory:
        run()
    return flops.get_total_flops(), memory.peak


def plan(args, gpus, tflops):
    """A Markdown table of a whole run: FLOPs, memory and hours of every phase."""
    train.check_batch_size(args, gpus)
    steps, counts, test_images, source = images_of_steps(args)
    classes = [1 + len(steps[0]), *map(len, steps[1:])]
    size, local = args.crop, args.batch_size // gpus
    method = functools.partial(METHODS[args.method].loss, lam=args.lam)
    with torch.device("meta"):
        images, labels = torch.empty(local, 3, size, size), torch.empty(local, size, size, dtype=torch.uint8)
        tested = torch.empty(inspect.signature(evaluate).parameters["batch_size"].default, 3, size, size)
    yield (f"{args.dataset} {args.task} {args.setting}, {args.method}, {args.backbone}, crop {size}, "
           f"mini-batch {args.batch_size}: {gpus} GPUs at {tflops:g} TFLOP/s sustained on each; images {source}\n")
    yield "| step | phase | images | iterations of a GPU | PFLOP | GB a GPU | hours |\n|---|---|---|---|---|---|---|"
    total_flops = total_hours = 0

    def phase(step, name, count, batches, rounds, flops, peak, held):
        """A line: `batches` of `flops` each, which take the GPUs `rounds` of one batch a GPU."""
        nonlocal total_flops, total_hours
        hours = rounds * flops / (tflops * 1e12) / 3600
        total_flops, total_hours = total_flops + batches * flops, total_hours + hours
        return (f"| {step} | {name} | {count} | {rounds} | {batches * flops / 1e15:.4g} | {(peak + held) / 1e9:.3g} "
                f"| {hours:.2f} |")

    for step, count in enumerate(counts):
        with torch.device("meta"):
            teacher = DeepLabV3(args.backbone, classes[:step]).eval().requires_grad_(False) if step else None
            student = DeepLabV3(args.backbone, classes[:step + 1])
        held = lambda *things: sum(t.nbytes for thing in things for t in tree_leaves(thing) if isinstance(t, torch.Tensor))
        weights = [m.state_dict() for m in (student, teacher) if m]
        _, iterations, fakes = train.step_length(args, step, count)
        if fakes and args.fake == "seginversion":
            targets = torch.zeros(args.fake_batch, sum(classes[:step]))
            targets[:, 0] = 1
            flops, peak = cost(lambda: invert(teacher, targets, 1.0, size=size, steps=1))
            batches = fakes // args.fake_batch
            each = (1 + args.retry_fakes) * min(args.fake_steps, args.max_iters or args.fake_steps)
            rounds = math.ceil(batches / gpus)
            yield phase(step, "SegInversion" + ", all twice" * args.retry_fakes, fakes, batches * each, rounds * each, flops, peak, held(weights[1]))

        optimizer = torch.optim.SGD(student.parameters(), momentum=0.9, nesterov=True, weight_decay=1e-4)

        def one_iteration():
            method(student, teacher, (images, labels))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        student.train()
        flops, peak = cost(one_iteration)                   # the memory of its second run, with momentum there
        there = held(weights, optimizer.state_dict(), images, labels)
        yield phase(step, "training", count, gpus * iterations, iterations, flops, peak, there)

        def one_batch():
            with torch.inference_mode():
                upsample(student(tested), tested).argmax(1)
        student.eval()
        flops, peak = cost(one_batch)
        batches = math.ceil(test_images / len(tested))
        yield phase(step, "evaluation", test_images, batches, math.ceil(batches / gpus), flops, peak, held(weights[0], tested))
    yield f"| all | | | | {total_flops / 1e15:.4g} | | {total_hours:.2f} |\n"
    yield ("FLOPs: torch's counter (convolutions and products of matrices, a multiplication and an addition are two). "
           "GB: float32 tensors alive at once, without what kernels, DDP, nccl and the importances of EWC, PI and RW take; "
           "mixed precision needs less. Every step is tested on all test images here; a run leaves out those without a class it knows.")


# ---------------------------------------------------------------------------------------------- the table

SECTIONS = {"losses": losses, "inversion": inversion, "training": training, "scale": scale}


@functools.cache
def commit():
    """The code's commit; results may have changed since. "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    changes = git("diff", "--name-only", "HEAD", "--", "*.py").stdout.strip()
    return (git("describe", "--always").stdout.strip() or "unknown") + (" and changes" if changes else "")


def machine():
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads unless said otherwise; "
            f"torch {torch.__version__}, Python {platform.python_version()}; commit {commit()}; "
            f"{REPEATS} repeats, A B A B")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="the cost of a run of train.py, whose flags follow")
    parser.add_argument("--gpus", type=int, default=1, help="--plan: how many")
    parser.add_argument("--tflops", type=float, default=50.0,
                        help="--plan: what one sustains; yours: a phase's PFLOP over its seconds in results.json and GPUs")
    args, rest = parser.parse_known_args(argv)
    args.sections, args.train = (None, train.parse(rest)) if args.plan else (rest or list(SECTIONS), None)
    if not args.plan and not set(rest) <= SECTIONS.keys():
        raise InputError(f"{' '.join(rest)}: expected some of {', '.join(SECTIONS)}, or --plan and flags of train.py")
    if args.gpus < 1 or not 0 < args.tflops < math.inf:
        raise InputError(f"--gpus {args.gpus} --tflops {args.tflops}: both must be above 0")
    return args


def main(argv=None):
    args = parse(argv)
    if args.plan:
        for line in plan(args.train, args.gpus, args.tflops):
            print(line, flush=True)
        return
    print(f"{machine()}\n\n| A / B: seconds, or what the row says | median | lowest to highest | aim |", flush=True)
    print("|---|---|---|---|", flush=True)
    for section in args.sections:
        for line in SECTIONS[section]():
            print(line, flush=True)


if __name__ == "__main__":
    with data.plain_errors("bench.py"):
        main()
