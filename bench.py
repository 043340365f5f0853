"""
Speed and memory as ratios of two sides, and a plan for a run at the paper's scale.

    python bench.py > results/bench.md          # all of it: half an hour on two cores; Linux, 10 GB
    python bench.py losses scale                # some of it
    python bench.py cuda                        # what can be measured on one GPU, and its phases
    python bench.py --plan --task 15-1 --dataset voc --gpus 8

Every ratio is that of the seconds of A and B, measured in turn, A B A B ..., in one process: the
median of the pairs and their lowest and highest. Any flag of train.py may follow --plan.
"""
import argparse
import contextlib
import copy
import gc
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

# first, as it sees to Ctrl-C while the others are imported
from run import InputError, Parser, World, commit, plain_errors

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import protocol
import seginversion
import train
from distill import hrhf_loss
from eval import evaluate
from fakes import multi_hot, synthesize
from fast import captured, in_bands
from methods import METHODS
from model import DeepLabV3, upsample
from seginversion import invert, stages

REPEATS = 5
TFLOPS = 50.0           # what one GPU is taken to sustain
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPAWN = multiprocessing.get_context("spawn")


# ------------------------------------------------------------------------------ time and memory

def seconds_of(work):
    began = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(sides):
    """Seconds of every side, {name: [one per repeat]}, in turn, after one run each to warm up."""
    rounds = [{name: seconds_of(work) for name, work in sides.items()} for _ in range(1 + REPEATS)]
    return {name: [seconds[name] for seconds in rounds[1:]] for name in sides}


def row(what, a, b, aim=""):
    """A line of the table: seconds of A over seconds of B, pair by pair."""
    r = [x / y for x, y in zip(a, b, strict=True)]
    return f"| {what} | {statistics.median(r):.2f} | {min(r):.2f} to {max(r):.2f} | {aim} |"


def tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors alive inside, at their most (`peak`), counted from zero at the start.

    Works on the meta device, too. What a kernel allocates for itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        there = {t.untyped_storage()._cdata for t in tensors(args, kwargs)}
        for storage in [t.untyped_storage() for t in tensors(out)]:
            if storage._cdata not in there | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, storage, nbytes):
        self.known.discard(storage)
        self.now -= nbytes


# --------------------------------------------------------------------------------------- losses

def loss_case(form, B, C=151, size=512, device=DEVICE):
    """HRHF's loss, "plain" or "in bands", as a call; the logits whose gradient it fills."""
    shape, generator = (size // 16, size // 16), torch.Generator().manual_seed(0)
    s, t = (torch.randn(B, n, *shape, generator=generator).to(device) for n in (C, C - 1))
    labels = torch.zeros(B, size, size, dtype=torch.uint8, device=device)
    labels[:, :size // 3] = C - 1

    def work():
        s.grad = None
        if form == "plain":
            l = sum(hrhf_loss(upsample(s, labels), upsample(t, labels), labels).values())
        else:
            l, _ = in_bands(hrhf_loss, s, t, labels, ["seg"])
        l.backward()
    return work, s.requires_grad_()


def peak(form, B, device):
    """Bytes a loss adds at its most: to the process, to what torch has on a GPU, or in tensors."""
    work, _ = loss_case(form, B, device=device)
    if device == "meta":
        return cost(work)[1]
    loss_case(form, 1, C=4, size=64)[0]()                   # what the first call of all loads
    now = torch.cuda.max_memory_allocated
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:                               # not getrusage: its peak is inherited from the parent's
        status = Path("/proc/self/status")
        now = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    before = now()
    work()
    return now() - before


def losses(measured=(2, 4, 8), counted=(8, 24), timed=4):
    yield f"| **HRHF's loss on stride-16 logits, 151 classes, 512 x 512** ({DEVICE}) | | | |"
    cases = [(f"measured, batch {B}", B, DEVICE) for B in measured]
    cases += [(f"tensors counted, batch {B}, bands as on a GPU", B, "meta") for B in counted]
    with SPAWN.Pool(1, maxtasksperchild=1) as fresh:        # a process for each number
        for how, *case in cases:
            plain, bands = (fresh.apply(peak, (form, *case)) for form in ("plain", "in bands"))
            yield (f"| peak memory, {how}: plain ({plain / 1e9:.2f} GB) / in bands "
                   f"({bands / 1e9:.2f} GB) | {plain / bands:.0f} | | {'>= 10' * (24 in case)} |")
    for C in (21, 151):
        (plain, s), (bands, s_bands) = (loss_case(f, timed, C) for f in ("plain", "in bands"))
        t = alternate({"plain": plain, "bands": bands})
        yield row(f"time, batch {timed}, {C} classes: in bands / plain", t["bands"], t["plain"],
                  "<= 1")
    difference = (s.grad - s_bands.grad).abs().max() / s.grad.abs().max()
    yield ("| largest difference of the two gradients / largest gradient "
           f"| {difference:.0e} | | <= 1e-5 |")


# --------------------------------------------------------------------------------- SegInversion

class PublishedMatching(seginversion.BatchNormMatching):
    """As DeepInversion published it: through autograd, the variance of a permuted copy."""

    def __enter__(self):
        self.hooks = [layer.register_forward_hook(self.compare) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def compare(self, layer, inputs, output):
        mean = inputs[0].mean([0, 2, 3])
        var = inputs[0].permute(1, 0, 2, 3).contiguous().view(len(mean), -1).var(1, unbiased=False)
        layer.distance = (layer.running_var - var).norm() + (layer.running_mean - mean).norm()

    def forward(self, x):
        return self.model(x), torch.zeros(())

    def loss(self, *_):
        first, *others = [vars(layer).pop("distance") for layer in self.layers]
        return (self.first * first + sum(others)) / (self.first + len(others))


def published(*args, **options):
    with mock.patch.multiple(seginversion, BatchNormMatching=PublishedMatching,
                             captured=lambda network, x: network):
        invert(*args, **options)


def bare(model, targets, r, sizes, steps):
    x = torch.randn(len(targets), 3, *2 * sizes, device=DEVICE, requires_grad=True)
    network = captured(lambda x: model(x), x)
    for _ in range(steps):
        x.grad = None
        network(x).sum().backward()


def inversion(cases=(("mobilenet_v2", 16, 128, 6), ("resnet50", 16, 128, 2))):
    invert_ours = partial(invert, spectrum=1.0)             # the dearer of our two forms
    for backbone, B, size, steps in cases:
        steps *= 10 if DEVICE == "cuda" else 1              # a CUDA graph is made for many passes
        yield f"| **A step of SegInversion, {backbone}, {B} x {size} x {size}** ({DEVICE}) | | | |"
        torch.manual_seed(0)
        model = DeepLabV3(backbone, [21]).to(DEVICE).eval().requires_grad_(False)
        usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        asked = multi_hot([[3]] * B, 21), torch.full((B, 21), 5.0)
        t = alternate({(form, net): partial(form, net, *asked, sizes=[size], steps=steps)
                       for form, net in ((bare, model), (invert_ours, model), (published, model),
                                         (bare, usual), (published, usual))})
        ours, least = t[invert_ours, model], t[bare, model]
        yield row("ours / bare (forward + backward to the input, frozen weights, channels-last)",
                  ours, least, "<= 1.25")
        yield row("published form / ours, both channels-last", t[published, model], ours, ">= 1.4")
        yield row("published form in torch's usual layout / ours", t[published, usual], ours,
                  ">= 1.4")
        yield row("bare in torch's usual layout / bare channels-last", t[bare, usual], least)


def equal_fakes(backbone="mobilenet_v2", B=16, size=128, large="resnet101", tenth=10):
    """Fakes as folder makes them, and as voc does, the paper's way: on a CPU a tenth of it is run.
    """
    yield (f"| **{B} fakes of {size} x {size}, {backbone}: folder's way / the paper's** ({DEVICE}) "
           "| | | |")
    torch.manual_seed(0)
    tenth = 1 if DEVICE == "cuda" else tenth                # there a capture would count ten times
    model = DeepLabV3(backbone, [21]).to(DEVICE).eval().requires_grad_(False)
    of = lambda dataset: train.inversion(train.parse(
        f"--dataset {dataset} --task 1-1 --crop {size}".split()))
    ways = {"ours": of("folder"), "paper": of("voc")}
    ways["paper"]["steps"] //= tenth
    ways = {name: partial(invert, model, multi_hot([[3]] * B, 21), 5.0, **options)
            for name, options in ways.items()}
    ours, paper = map(flops_of, ways.values())
    yield (f"| FLOPs ({ours / 1e12:.3g} / {tenth * paper / 1e12:.3g} T) | "
           f"{ours / paper / tenth:.3f} | | <= 0.1 |")
    t = alternate(ways)
    yield row("seconds", t["ours"], [tenth * seconds for seconds in t["paper"]], "<= 0.1")
    model, targets = DeepLabV3(large, [21]).to("meta").eval(), multi_hot([[]] * 16, 21)
    parts, whole = (cost(partial(invert, model, targets, 1.0, sizes=[512], steps=2, part=part))[1]
                    for part in (4, 16))
    yield (f"| peak memory of 16 x 512 x 512, {large}, tensors counted: --fake-batch 4 "
           f"({parts / 1e9:.1f} GB) / 16 ({whole / 1e9:.1f} GB) | {parts / whole:.2f} | | |")


# ------------------------------------------------------------------------------------- training

def networks(backbone, classes, device):
    """Student and teacher of the step after which the outputs are `classes`, of every step."""
    with torch.device(device):
        old = DeepLabV3(backbone, classes[:-1]) if classes[1:] else None
        return DeepLabV3(backbone, classes), old and old.eval().requires_grad_(False)


def training_iteration(loss, student, B, size, device):
    """An iteration on random images, as a call; what it keeps. loss: an Objective's"""
    images = torch.randn(B, 3, size, size, device=device)
    labels = torch.zeros(B, size, size, dtype=torch.uint8, device=device)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True,
                                weight_decay=1e-4)

    def iteration():
        loss(student, images, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return iteration, [images, labels, optimizer.state]


def training(backbone="resnet101", B=2, size=512, iterations=80):
    yield f"| **A training step, {backbone}, {B} x {size} x {size}, 17 classes** ({DEVICE}) | | | |"
    torch.manual_seed(0)
    student, teacher = networks(backbone, [16, 1], DEVICE)

    def bare(student, images, labels):
        with torch.inference_mode():
            teacher(images)
        return student(images).sum(), {}
    ours = METHODS["hrhf"].objective_of(student, teacher, lam=1.0).loss
    t = alternate({loss: training_iteration(loss, student, B, size, DEVICE)[0]
                   for loss in (bare, ours)})
    yield row("HRHF's step / (bare student step + bare teacher forward)", t[ours], t[bare],
              "<= 1.10")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        make_folder(Path(folder), 200)
        train.main(f"--dataset folder --data-root {folder} --task offline --backbone mobilenet_v2 "
                   "--pretrained none --crop 256 --batch-size 16 --workers 2 "
                   f"--max-iters {iterations} --out {folder}/run".split())
        lines = [json.loads(line) for line in open(f"{folder}/run/log.jsonl")]
    waits = [line["data_wait"] for line in lines if "data_wait" in line][1:]    # 0: workers start
    yield ("| data wait / training step, mobilenet_v2, 16 x 256 x 256 out of 500 x 375 JPEGs, "
           f"2 workers | {statistics.median(waits):.3f} | {min(waits):.3f} to {max(waits):.3f} "
           "| < 0.05 |")


def make_folder(folder, number, distinct=50):
    """A data set in VOC's layout, 500 x 375: some of Shapes, enlarged, under `number` names."""
    shapes = data.Shapes("val")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    paths = lambda i: (folder / f"JPEGImages/{i}.jpg", folder / f"SegmentationClass/{i}.png")
    for i in range(min(distinct, number)):
        image, mask = (picture.resize((500, 375), how) for picture, how in zip(
            shapes.read(i), (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))
        mask.putpalette(data.palette().tobytes())
        image.save(paths(i)[0], quality=90)
        mask.save(paths(i)[1])
    for i in range(distinct, number):
        for source, target in zip(paths(i % distinct), paths(i)):
            os.link(source, target)
    for split, length in (("train", number), ("val", 8)):
        names = "".join(f"{i}\n" for i in range(length))
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text(names)
    (folder / "classes.txt").write_text("\n".join(shapes.classes))


# --------------------------------------------------------------------------- two processes, scan

def rank_main(process, size, folder, ready, queue):
    """A process of one thread; `size` share a job. Seconds of its SegInversion and training."""
    world, folder = World(process % size, size), folder / str(process // size)
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=world.rank,
                            world_size=size)
    student, teacher = networks("mobilenet_v2", [20, 1], "cpu")
    iteration, _ = training_iteration(METHODS["hrhf"].objective_of(student, teacher, lam=1.0).loss,
                                      train.distributed(student, world), 16 // size, 256, "cpu")
    for images, steps, iterations in ((16, 1, 1), (64, 8, 6)):      # the first to warm up
        ready.wait()
        inverted = seconds_of(lambda: synthesize(teacher, folder / str(images), images, sizes=[96],
                                                 batch_size=8, steps=steps, world=world))
        ready.wait()
        trained = seconds_of(lambda: [iteration() for _ in range(iterations)])
    queue.put((inverted, trained))
    dist.destroy_process_group()


def seconds_together(jobs, size):
    """Seconds of `jobs` jobs at once, each shared by `size` processes: (SegInversion, training)."""
    with tempfile.TemporaryDirectory() as folder:
        queue, ready = SPAWN.SimpleQueue(), SPAWN.Barrier(jobs * size)
        multiprocessing.spawn(rank_main, (size, Path(folder), ready, queue), jobs * size)
        return [max(seconds) for seconds in zip(*[queue.get() for _ in range(jobs * size)])]


def scale():
    yield "| **Images/s of two processes with a thread each over one, cpu** | | | |"
    rounds = [[seconds_together(*jobs) for jobs in ((1, 1), (1, 2), (2, 1))]
              for _ in range(REPEATS)]
    for k, (what, aim, aim_of_limit) in enumerate((
            ("SegInversion, mobilenet_v2, 8 batches of 8 x 96 x 96", ">= 1.9", ">= 0.95"),
            ("training, mobilenet_v2, mini-batch 16 x 256 x 256", ">= 1.7", ">= 0.85"))):
        one, shared, two = zip(*[[seconds[k] for seconds in sides] for sides in rounds])
        yield row(f"{what}: two ranks / one", one, shared, aim)
        yield row("the machine's limit: two jobs that know nothing of each other / one",
                  [2 * t for t in one], two)
        yield row("two ranks / that limit", two, [2 * t for t in shared], aim_of_limit)


def scan(number=10582):
    yield f"| **Labels of {number:,} images of 500 x 375** | | | |"
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), number)
        dataset = data.load("folder", folder, "train")

        def first_start():
            dataset.cache.unlink(missing_ok=True)
            dataset.labels()
        t = alternate({"scan": first_start, "cached": dataset.labels, "loop": lambda: [
            np.unique(np.array(Image.open(mask))).tolist() for mask in dataset.masks]})
    yield row("images/s, ours / a plain loop with np.unique", t["loop"], t["scan"])
    yield row(f"a second start (at most {max(t['cached']):.2f} s) / the scan", t["cached"],
              t["scan"], "< 1 s")


# ----------------------------------------------------------------------------------------- plan

def images_of_steps(args):
    """Classes and training images of each step, number of test images, and where that is from."""
    try:
        for split in ("train", "val"):
            data.load(args.dataset, args.data_root, split)
    except InputError:                                      # not there; recorded for voc and ade
        source = "results/image-counts.json"
        known = json.loads((Path(__file__).parent / source).read_text()).get(args.dataset, {})
        task = "offline" if METHODS[args.method].joint else args.task
        counts = known.get(f"{task} {args.setting}")
        if counts is None or args.split_dir or args.order:
            raise
        steps = protocol.task_steps(task, known["classes"])
        return steps, counts, known["test"], f"as recorded in {source}"
    task = train.open_task(args, World())
    return task.steps, [*map(len, task.images)], len(task.test_set), f"counted in {args.data_root}"


def flops_of(work):
    """FLOPs of a call, by torch's counter."""
    # A convolution's gradients cost what its forward pass does each, by shapes; torch's own formula
    # takes groups for dense.
    backward = lambda dy, x, weight, *options, **_: (
        2 * math.prod(dy) * math.prod(weight[1:]) * sum(options[-1][:2]))
    mapping = {torch.ops.aten.convolution_backward: backward}
    plain = mock.patch.object(seginversion, "captured", lambda network, x: network)
    with plain, FlopCounterMode(display=False, custom_mapping=mapping) as flops:    # sees no graph
        work()
    return flops.get_total_flops()


def cost(work):
    """FLOPs of a call, and bytes of its tensors at their most."""
    flops = flops_of(work)
    with PeakMemory() as memory:
        work()
    return flops, memory.peak


def phases(args, classes, count, fakes, test_images, gpus, device="meta", steps=1):
    """The phases of a step: name, images, passes of the network on all GPUs together and on the
    busiest one; such a pass as a call, and what is there beside it.

    classes: outputs of every step so far; count, fakes: images of each kind; steps: passes in a
    call of SegInversion
    """
    _, iterations = train.step_length(args, len(classes) - 1, count)
    student, teacher = networks(args.backbone, classes, device)
    weights = [net.state_dict() for net in (student, teacher) if net]
    if fakes and args.fake == "seginversion":
        options, together = train.inversion(args), max(16, args.fake_batch)
        B, order = min(args.fake_batch, fakes), stages(options["sizes"], options["steps"])
        # a GPU makes whole batches of fakes, each in parts of B
        busiest = math.ceil(fakes / together / gpus) * math.ceil(min(fakes, together) / B)
        for size in options["sizes"]:
            work = partial(invert, teacher, multi_hot([[]] * B, sum(classes[:-1])), 1.0,
                           **options | {"steps": steps, "sizes": [size]})
            yield (f"SegInversion at {size}", fakes, fakes / B * order.count(size),
                   busiest * order.count(size), work, weights[1])
    objective = METHODS[args.method].objective_of(student, teacher, args.lam)
    loss, local = objective.loss, args.batch_size // gpus
    iteration, kept = training_iteration(loss, student, local, args.crop, device)
    yield "training", count, gpus * iterations, iterations, iteration, [weights, kept]
    B = inspect.signature(evaluate).parameters["batch_size"].default
    x = torch.empty(B, 3, args.crop, args.crop, device=device)
    test = torch.inference_mode()(lambda: upsample(student.eval()(x), x).argmax(1))
    batches = math.ceil(test_images / B)
    yield "evaluation", test_images, batches, math.ceil(batches / gpus), test, [weights[0], x]


def inversion_flops(args, classes, counts, steps):
    """FLOPs of all SegInversion of a run."""
    flops = 0
    for step, count in enumerate(counts):
        fakes = train.number_of_fakes(args, step, counts, steps)
        for name, _, passes, _, work, _ in phases(args, classes[:step + 1], count, fakes, 1, 1):
            if not name.startswith("SegInversion"):
                break
            flops += passes * flops_of(work)
    return flops


def cheaper(args):
    """The same run with SegInversion as folder has it; the flags for that."""
    ours = dict(train.DATASET_DEFAULTS["folder"])
    flags = train.spelled(ours)
    ours["fake_sizes"] = train.parse_sizes(ours["fake_sizes"], args.crop)
    return argparse.Namespace(**vars(args) | ours), flags


def plan(args, gpus, tflops):
    """A Markdown table of a whole run: FLOPs, memory and hours of every phase."""
    train.check_batch_size(args, gpus)
    steps, counts, test_images, source = images_of_steps(args)
    classes = [1 + len(steps[0]), *map(len, steps[1:])]
    yield (f"{args.dataset} {args.task} {args.setting}, {args.method}, {args.backbone}, crop "
           f"{args.crop}, mini-batch {args.batch_size}: {gpus} GPUs at {tflops:g} TFLOP/s "
           f"sustained on each; images {source}\n")
    yield ("| step | phase | images | iterations of a GPU | PFLOP | GB a GPU | hours |\n"
           "|---|---|---|---|---|---|---|")
    all_flops = all_hours = 0
    for step, count in enumerate(counts):
        fakes = train.number_of_fakes(args, step, counts, steps)
        for name, images, passes, busiest, work, there in phases(
                args, classes[:step + 1], count, fakes, test_images, gpus):
            flops, nbytes = cost(work)          # the memory of a second run, with momentum there
            nbytes += sum(t.nbytes for t in tensors(there))
            hours = busiest * flops / (tflops * 1e12) / 3600
            flops *= passes
            all_flops, all_hours = all_flops + flops, all_hours + hours
            yield (f"| {step} | {name} | {images} | {busiest} | {flops / 1e15:.4g} "
                   f"| {nbytes / 1e9:.3g} | {hours:.2f} |")
    yield f"| all | | | | {all_flops / 1e15:.4g} | | {all_hours:.2f} |\n"
    ours, flags = cheaper(args)
    theirs, less = (inversion_flops(a, classes, counts, steps) for a in (args, ours))
    if less < theirs:
        yield (f"SegInversion: {theirs / 1e15:.4g} PFLOP; with `{flags}` {less / 1e15:.4g}, "
               f"and the run {(all_flops - theirs + less) / 1e15:.4g}.\n")
    yield ("FLOPs: torch's counter (convolutions and products of matrices, a multiplication and an "
           "addition are two). GB: float32 tensors alive at once, without what kernels, DDP, nccl "
           "and the importances of EWC, PI and RW take; mixed precision needs less. Every step is "
           "tested on all test images here; a run leaves out those without a class it knows.")


# ---------------------------------------------------------------------------------------- a GPU

def memory_added(work):
    """Bytes that torch asks the GPU for in a call, at most, beside what it had."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    work()
    return torch.cuda.max_memory_reserved() - before


def on_gpu(command="--dataset voc --task 15-1 --pretrained none", gpus=4):
    """The phases of step 1 at the paper's size on this GPU, as one of `gpus`."""
    args, classes, counts = train.parse(command.split()), [16, 1], [0, 500]
    fakes = train.number_of_fakes(args, 1, counts, [range(15), range(1)])
    steps = 100 if DEVICE == "cuda" else 1                  # 4 more make a CUDA graph
    of = lambda device, steps: phases(args, classes, counts[1], fakes, 1449, gpus, device, steps)
    yield f"| **Step 1 of `{command}` on one of {gpus} GPUs** ({DEVICE}) | | | |"
    for (name, *_, work, there), (*_, planned, kept) in zip(of(DEVICE, steps), of("meta", 1)):
        flops, nbytes = cost(planned)
        flops *= steps if "SegInversion" in name else 1
        half = torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False)(work)
        t = alternate({"float32": work, "bfloat16": half})
        sustained = [flops / seconds / 1e12 for seconds in t["float32"]]
        yield row(f"{name}: TFLOP/s sustained in float32 (bench.py --plan --tflops)", sustained,
                  [1] * REPEATS)
        yield row(f"{name}: hours / the plan's at {TFLOPS:g} TFLOP/s", [TFLOPS] * REPEATS,
                  sustained)
        yield row(f"{name}: bfloat16 / float32", t["bfloat16"], t["float32"], "< 1")
        if DEVICE == "cuda":
            own = sum(x.nbytes for x in tensors(kept))
            yield (f"| {name}: peak memory / the plan's {(nbytes + own) / 1e9:.1f} GB | "
                   f"{(memory_added(work) + own) / (nbytes + own):.2f} | | <= 1.1 |")
    plain, compiled = (networks(args.backbone, classes, DEVICE)[0] for _ in range(2))
    compiled.compile()
    t = alternate({net: training_iteration(METHODS["ft"].objective_of(net, None, 0.0).loss, net,
                                           args.batch_size // gpus, args.crop, DEVICE)[0]
                   for net in (plain, compiled)})
    yield row("a training step without a teacher: torch.compile / plain", t[compiled], t[plain])


# ------------------------------------------------------------------------------------ the table

SECTIONS = {f.__name__: f for f in (losses, inversion, equal_fakes, training, scale, scan)}
SECTIONS["cuda"] = lambda: itertools.chain(losses(), inversion(), equal_fakes(), training(),
                                           on_gpu())


def machine():
    """What the numbers were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = cpu[1] if cpu else platform.machine()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else name
    return (f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads unless said "
            f"otherwise; torch {torch.__version__}, Python {platform.python_version()}; commit "
            f"{commit()}; {REPEATS} repeats, A B A B")


def measure(sections):
    yield f"{machine()}\n"
    yield "| A / B: seconds, or what the row says | median | lowest to highest | aim |"
    yield "|---|---|---|---|"
    for section in sections:
        yield from SECTIONS[section]()


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--plan", action="store_true", help="the cost of a run of train.py, whose flags follow")
    a("--gpus", type=int, default=1, help="--plan: how many")
    a("--tflops", type=float, default=TFLOPS, help="--plan: what one sustains; yours: a phase's "
      "PFLOP over its seconds in results.json and GPUs")
    args, rest = parser.parse_known_args(argv)
    args.sections = rest or [name for name in SECTIONS if name != "cuda"]
    args.train = train.parse(rest) if args.plan else None
    if not args.plan and not set(rest) <= SECTIONS.keys():
        raise InputError(f"{' '.join(rest)}: expected some of {', '.join(SECTIONS)}, or --plan and "
                         "flags of train.py")
    if "cuda" in rest and DEVICE == "cpu":
        raise InputError("bench.py cuda: no GPU here")
    if args.gpus < 1 or not 0 < args.tflops < math.inf:
        raise InputError(f"--gpus {args.gpus} --tflops {args.tflops}: both must be above 0")
    return args


def main(argv=None):
    args = parse(argv)
    lines = plan(args.train, args.gpus, args.tflops) if args.plan else measure(args.sections)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    with plain_errors("bench.py"):
        main()
