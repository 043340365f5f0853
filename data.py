"""
The data of class-incremental segmentation: which images a learning step sees, and which labels.

    python data.py voc --data-root data         # download VOC 2012 + SBD, make SegmentationClassAug
    python data.py ade --data-root data         # download ADE20K (the 2016 scene-parsing release)

A task "15-1" learns 15 classes in step 0 and then one per step. In every step only the classes of
that step are labelled: to the network, old and future classes are background (id 0). The rules are
MiB's (Cermelli et al., 2020), whose protocol the paper follows (Sec. 4.1).

Data sets: `shapes` (made here, no download), `voc`, `ade`, and `folder` (your own images in VOC's
layout with a classes.txt). Each is an object with `classes` (names, background first), `len()`,
`read(i)` -> (RGB image, id mask), both PIL, and `labels()` -> the class ids in every image.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

VOID = 255                                                  # VOC's "do not care" id
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, as torchvision's weights expect

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
               "horse motorbike person pottedplant sheep sofa train tvmonitor").split()


UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)      # PIL says SyntaxError for a broken PNG


class InputError(ValueError):
    """Bad input. One sentence for the user; the scripts print it and exit with code 2."""


@contextlib.contextmanager
def plain_errors(program):
    """Bad input, and a loss that is no number, end a script with one sentence and exit code 2."""
    try:
        yield
    except (InputError, FloatingPointError) as error:
        # An error in a loader's worker arrives with the worker's traceback in front.
        sentence = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


def read_json(path, expected):
    """A JSON object with at least the keys of `expected` (name -> type), or InputError naming the file."""
    try:
        value = json.loads(Path(path).read_text())
        if all(isinstance(value[key], kind) for key, kind in expected.items()):
            return value
    except FileNotFoundError:
        raise InputError(f"{path}: not there; train.py writes it") from None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: damaged; remove it and what it belongs to, then run train.py again")


def default_workers():
    """Loader processes for each of the processes that torchrun starts on this machine."""
    return min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def derive_seed(*numbers):
    """One seed out of several numbers, e.g. (seed, step, batch); the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def write_atomically(path, write):
    """Call write(temporary_path), then rename: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------ the protocol's rules

def task_steps(task, num_classes):
    """"15-1", 20 -> [[1..15], [16], [17], [18], [19], [20]]; "offline" -> all classes in one step.

    num_classes does not count the background, which belongs to every step and is in no list.
    Raises InputError for a malformed task, or one that leaves no class for a second step.
    """
    if task == "offline":
        return [list(range(1, num_classes + 1))]
    try:
        first, increment = (int(part) for part in task.split("-"))
    except ValueError:
        raise InputError(f"--task {task}: expected A-B, such as 15-1, or offline") from None
    if first < 1 or increment < 1 or first >= num_classes:
        raise InputError(f"--task {task}: the data set has {num_classes} classes, so A-B needs "
                         f"1 <= A < {num_classes} and B >= 1")
    starts = range(first + 1, num_classes + 1, increment)
    return [list(range(1, first + 1))] + [list(range(s, min(s + increment, num_classes + 1))) for s in starts]


def split_indices(image_labels, steps, step, setting):
    """Sorted indices of the images that a learning step sees.

    image_labels: for every image the class ids in its full mask (0 and 255 may be among them)
    setting:      "overlapped": images with a class of this step, whatever else they show.
                  "disjoint": of those, the images that show no class of a later step.
    """
    if setting not in ("overlapped", "disjoint"):
        raise InputError(f"unknown setting {setting!r}: choose overlapped or disjoint")
    current = set(steps[step])
    allowed = {0, VOID}.union(*steps[:step + 1])
    return [i for i, labels in enumerate(image_labels)
            if current.intersection(labels) and (setting == "overlapped" or allowed.issuperset(labels))]


def partition_indices(image_labels, steps, step):
    """ADE's disjoint lists: every image goes to exactly one step, future classes are allowed in it.

    MiB's own lists cannot be made again (their seed is lost: pass them with --split-dir), so this is
    its greedy rule, without randomness. In image order, each class c of an image bids
        120 * (1 - added_c / N_c) + sum_c' N_c' / N_c
    (N_c images show c, added_c of them are already in c's step) and the step of the highest bid wins.
    """
    step_of = {c: t for t, classes in enumerate(steps) for c in classes}
    N = dict.fromkeys(step_of, 0)
    for labels in image_labels:
        for c in step_of.keys() & set(labels):
            N[c] += 1
    total, added, chosen = sum(N.values()), dict.fromkeys(step_of, 0), []
    for i, labels in enumerate(image_labels):
        present = sorted(step_of.keys() & set(labels))
        if not present:
            continue
        winner = step_of[max(present, key=lambda c: 120 * (1 - added[c] / N[c]) + total / N[c])]
        for c in present:
            added[c] += step_of[c] == winner
        if winner == step:
            chosen.append(i)
    return chosen


def read_split(split_dir, step, num_images):
    """MiB's train-<step>.npy: indices into the data set's list of training images."""
    path = Path(split_dir) / f"train-{step}.npy"
    try:
        indices = np.load(path)
        if not np.issubdtype(indices.dtype, np.integer):
            raise TypeError("not integers")
        indices = sorted(set(indices.tolist()))
    except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise InputError(f"--split-dir: cannot read {path} ({error})") from None
    if not indices or indices[0] < 0 or indices[-1] >= num_images:
        raise InputError(f"--split-dir: {path} must hold indices from 0 to {num_images - 1}, "
                         "the number of training images found under --data-root less one")
    return indices


def label_map(steps, step, split, void="background", score_background=True):
    """The 256-entry uint8 table from a mask's id to the network's target: `table[mask]`.

    Channels follow the order of learning: 0 background, then the classes of step 0, of step 1, ...

                      train          val            test
    this step's       channel        channel        channel
    earlier steps'    0              255            channel
    later steps'      0              255            255
    0                 0              0 *            0 *
    255               0 **           255            255

    *  255 with score_background=False: ADE's id 0 is "other", trained but never scored.
    ** as MiB: it becomes background, which the teacher then relabels. void="ignore" keeps 255.
    """
    channel = {c: k for k, c in enumerate((c for classes in steps for c in classes), start=1)}
    table = torch.full((256,), 0 if split == "train" else VOID, dtype=torch.uint8)
    for t, classes in enumerate(steps[:step + 1]):
        for c in classes:
            if t == step or split == "test":
                table[c] = channel[c]
    if split == "train":
        table[VOID] = VOID if void == "ignore" else 0
    elif score_background:
        table[0] = 0
    return table


# ------------------------------------------------------------------------------------- the data sets

def scan_file(image_path, mask_path, num_classes):
    """Sorted class ids in one mask, after checking that mask and image belong together."""
    mask = read_mask(mask_path)
    try:
        size = Image.open(image_path).size                  # reads the header only
    except UNREADABLE as error:
        raise InputError(f"{image_path}: not a readable image ({error})") from None
    if size != mask.size:
        raise InputError(f"{mask_path}: the mask is {mask.size[0]} x {mask.size[1]} pixels, "
                         f"but its image {image_path} is {size[0]} x {size[1]}")
    ids = [i for i, count in enumerate(mask.histogram()) if count]
    unknown = [i for i in ids if num_classes < i < VOID]
    if unknown:
        raise InputError(f"{mask_path}: mask id {unknown[0]} is outside the classes 0 to {num_classes} (and 255)")
    return ids


def read_mask(path):
    try:
        mask = Image.open(path)
        mask.load()
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable mask ({error})") from None
    if mask.mode not in ("P", "L"):
        raise InputError(f"{path}: the mask has mode {mask.mode}, expected one 8-bit channel of class ids (P or L)")
    return mask


def read_image(path):
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{path}: the image has more than 8 bits a channel; convert it to 8-bit RGB")
        return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({error})") from None


class Files:
    """Image and mask files. `cache` is where labels() remembers its scan."""

    def __init__(self, images, masks, classes, cache):
        self.images, self.masks, self.classes, self.cache = images, masks, classes, Path(cache)
        if not images:
            raise InputError(f"{self.cache.parent}: no images found")

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return read_image(self.images[i]), read_mask(self.masks[i])

    def labels(self):
        """Class ids in every image, in list order. Scanned in parallel once, then read from the cache.

        The cache's key holds every file's name, size and time: a changed mask, image or list
        makes a new scan.
        """
        pairs = list(zip(self.images, self.masks, strict=True))
        try:
            stats = [(str(p), s.st_size, s.st_mtime_ns) for pair in pairs for p in pair for s in [os.stat(p)]]
        except OSError as error:
            raise InputError(f"{error.filename}: listed, but not there") from None
        key = hashlib.sha256(json.dumps([stats, len(self.classes)]).encode()).hexdigest()
        try:
            cached = json.loads(self.cache.read_text())
            if cached["key"] == key:
                return cached["labels"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        labels, shown = [], time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:    # decoding lets go of the interpreter lock
            for ids in pool.map(lambda pair: scan_file(*pair, len(self.classes) - 1), pairs):
                labels.append(ids)
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    print(f"scanning masks: {len(labels)} of {len(pairs)}", file=sys.stderr)
        try:
            write_atomically(self.cache, lambda p: p.write_text(json.dumps({"key": key, "labels": labels})))
        except OSError:
            print(f"note: {self.cache.parent} is not writable, the scan of its masks is not kept", file=sys.stderr)
        return labels


def voc_layout(root, classes, list_name, mask_folder):
    """VOC's folders: ids one a line, or MiB's two columns "/JPEGImages/x.jpg /SegmentationClassAug/x.png"."""
    lines = read_lines(root / "ImageSets" / "Segmentation" / f"{list_name}.txt")
    if all(re.fullmatch(r"\S*/\S* \S*/\S*", line) for line in lines):
        images, masks = zip(*[[root / column.lstrip("/") for column in line.split()] for line in lines])
    else:
        image_of, mask_of = pictures(root / "JPEGImages"), pictures(root / mask_folder)
        images = [image_of.get(line, root / "JPEGImages" / f"{line}.jpg") for line in lines]
        masks = [mask_of.get(line, root / mask_folder / f"{line}.png") for line in lines]
    return Files(list(images), list(masks), classes, root / f".labels-{list_name}.json")


def pictures(folder):
    """name without ending -> path, for the pictures in a folder."""
    try:
        return {p.stem: p for p in sorted(folder.iterdir())
                if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")}
    except OSError:
        raise InputError(f"{folder}: not found; see 'Data' in README.md for the layout") from None


def read_lines(path):
    """The lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError:
        raise InputError(f"{path}: not found; see 'Data' in README.md for the layout") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if not lines:
        raise InputError(f"{path}: empty")
    return lines


def load(name, root, split):
    """The data set `name` at --data-root, split "train" or "val". Raises InputError if it is not there."""
    root = Path(root)
    if name == "shapes":
        return Shapes(split)
    if not root.is_dir():
        raise InputError(f"--data-root {root}: no such folder; `python data.py {name} --data-root {root}` makes it"
                         if name in ("voc", "ade") else f"--data-root {root}: no such folder")
    if name == "voc":
        return voc_layout(root / "VOCdevkit" / "VOC2012", VOC_CLASSES,
                          *{"train": ("train_aug", "SegmentationClassAug"), "val": ("val", "SegmentationClass")}[split])
    if name == "folder":
        classes = read_lines(root / "classes.txt")
        if not 2 <= len(set(classes)) == len(classes) <= VOID:
            raise InputError(f"{root / 'classes.txt'}: expected 2 to {VOID} different names, background first, "
                             f"got {len(classes)} lines with {len(set(classes))} names")
        return voc_layout(root, classes, split, "SegmentationClass")
    root = root / "ADEChallengeData2016"
    folder = {"train": "training", "val": "validation"}[split]
    images = list(pictures(root / "images" / folder).values())
    try:                                                    # a header line, then Idx Ratio Train Val Name
        names = [line.split("\t")[-1].split(",")[0].strip()
                 for line in (root / "objectInfo150.txt").read_text().splitlines()[1:151]]
    except OSError:
        names = [f"class {i}" for i in range(1, 151)]
    return Files(images, [root / "annotations" / folder / f"{p.stem}.png" for p in images],
                 ["other", *names], root / f".labels-{folder}.json")


class Shapes:
    """The embedded data set: 20 classes, 5 shapes x 4 colours, 64 x 64 pixels, nothing to download.

    One object (sometimes two or three) of random size, place, turn and tint on a textured
    background. Everything is drawn from numpy's frozen RandomState stream with + - * / alone, so an
    index gives the same pixels on every machine. Old and new classes share their shapes and their
    colours; only the pair tells them apart.
    """

    SIDE = 64
    COLOURS = {"red": (200, 50, 50), "green": (50, 175, 60), "blue": (60, 80, 210), "yellow": (210, 190, 50)}
    SHAPES = {                                              # u, v: object coordinates, the object in [-1, 1]
        "disc": lambda u, v: u * u + v * v < 1,
        "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
        "triangle": lambda u, v: (v > -0.5) & (1.75 * abs(u) + v < 1),
        "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
        "ring": lambda u, v: (u * u + v * v < 1) & (u * u + v * v > 0.3),
    }

    def __init__(self, split):
        pairs = [(shape, (shape + k) % 4) for k in range(4) for shape in range(5)]
        self.pairs = [(list(self.SHAPES)[s], list(self.COLOURS)[c]) for s, c in pairs]
        self.classes = ["background"] + [f"{colour} {shape}" for shape, colour in self.pairs]
        first, count = {"train": (0, 2000), "val": (1_000_000, 400)}[split]
        self.items = [self.draw(first + i) for i in range(count)]

    def draw(self, index):
        random = np.random.RandomState(index)
        S = self.SIDE
        y, x = np.mgrid[:S, :S] + 0.5
        # Background: a coarse 5 x 5 grid of greyish colours, blended linearly, with pixel noise.
        grid = random.uniform(60, 190) + random.uniform(-50, 50, (5, 5, 1)) + random.uniform(-25, 25, (5, 5, 3))
        ty, tx = y / S * 4, x / S * 4
        iy, ix = ty.astype(int), tx.astype(int)
        fy, fx = (ty - iy)[..., None], (tx - ix)[..., None]
        image = ((grid[iy, ix] * (1 - fy) + grid[iy + 1, ix] * fy) * (1 - fx)
                 + (grid[iy, ix + 1] * (1 - fy) + grid[iy + 1, ix + 1] * fy) * fx)
        mask = np.zeros((S, S), np.uint8)
        for _ in range(random.choice(3, p=[0.8, 0.15, 0.05]) + 1):
            k = random.randint(20)
            radius, cy, cx = random.uniform(0.16, 0.42) * S, random.uniform(0.2, 0.8) * S, random.uniform(0.2, 0.8) * S
            t = random.uniform(-1, 1)                       # a turn by 2 atan(t), without sin and cos
            cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
            u = ((x - cx) * cos + (y - cy) * sin) / radius
            v = ((y - cy) * cos - (x - cx) * sin) / radius
            shape, colour = self.pairs[k]
            inside = self.SHAPES[shape](u, v)
            shade = random.uniform(-35, 35, 3) + random.uniform(-25, 25) * u[..., None]
            image = np.where(inside[..., None], np.array(self.COLOURS[colour]) + shade, image)
            mask[inside] = k + 1
        image = np.clip(image + random.uniform(-12, 12, image.shape), 0, 255).astype(np.uint8)
        return Image.fromarray(image), Image.fromarray(mask)

    def __len__(self):
        return len(self.items)

    def read(self, i):
        return self.items[i]

    def labels(self):
        return [np.unique(mask).tolist() for _, mask in self.items]


# ------------------------------------------------------------------------------- from image to batch

def train_transform(crop):
    """MiB's: random-resized crop (0.5 to 2 of the area; what does not fit is drawn again), flip."""
    return v2.Compose([v2.RandomResizedCrop(crop, scale=(0.5, 2.0)), v2.RandomHorizontalFlip(), *normalise()])


def test_transform(crop):
    """MiB's: short side to `crop`, then the central crop. Scores are on these pixels."""
    return v2.Compose([v2.Resize(crop), v2.CenterCrop(crop), *normalise()])


def normalise():
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]


def denormalise(images):
    """(B, 3, H, W) network space -> uint8 RGB."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def palette():
    """VOC's colour map, (256, 3) uint8: bit j of the id's three bit planes is bit 7 - j of R, G, B."""
    ids = np.arange(256)
    bits = sum(((ids[:, None] >> (3 * j + np.arange(3))) & 1) << (7 - j) for j in range(3))
    return bits.astype(np.uint8)


class View(torch.utils.data.Dataset):
    """Images of a data set through a transform, their masks through a label_map.

    Items are (image (3, H, W) float32, target (H, W) uint8). `indices` chooses the images; `fakes`,
    paths of synthesised images, follow them with target 0 everywhere. An item is asked for as
    (position, seed): its random crop depends on that seed alone, not on workers, ranks or a resume.
    """

    def __init__(self, dataset, indices, table, transform, fakes=()):
        self.dataset, self.indices, self.table = dataset, indices, table
        self.transform, self.fakes = transform, fakes

    def __getitem__(self, key):
        position, seed = key
        if position < len(self.indices):
            image, mask = self.dataset.read(self.indices[position])
            mask = self.table[torch.from_numpy(np.array(mask)).long()]
        else:
            image = read_image(self.fakes[position - len(self.indices)])
            mask = torch.zeros(image.size[::-1], dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def read_fakes(folder):
    """The path of every image of a finished set of fakes, and the old classes that it was asked to show."""
    try:
        fakes = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        asked = [(folder / fake["file"], fake["classes"][1:]) for fake in fakes]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        asked = []
    if not asked or not all(path.exists() for path, _ in asked):
        raise InputError(f"{folder} holds no finished set of fakes (manifest.jsonl or an image is missing or damaged)")
    return asked


def shuffled_passes(n, generator):
    """0 .. n-1 in random order, for ever: every index comes equally often."""
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def train_batches(num_real, num_fake, real, fake, iterations, seed, start=0, rank=0, world=1):
    """The mini-batches of a step for one rank, as lists of (position, seed) for View.

    real, fake: how many of each a mini-batch holds over all ranks; rank takes [rank::world] of it.
    The same (seed, iteration) gives the same mini-batch however often the run was resumed.
    """
    generator = torch.Generator().manual_seed(seed)
    reals = shuffled_passes(num_real, torch.Generator().manual_seed(derive_seed(seed, 1)))
    fakes = shuffled_passes(num_fake, torch.Generator().manual_seed(derive_seed(seed, 2)))
    for iteration in range(iterations):
        positions = [next(reals) for _ in range(real)] + [num_real + next(fakes) for _ in range(fake)]
        seeds = torch.randint(2 ** 31, (len(positions),), generator=generator).tolist()
        if iteration >= start:
            yield list(zip(positions, seeds))[rank::world]


# ------------------------------------------------------------------------------------------ download

def prepare_voc(root):
    """Download VOC 2012 and SBD; write SegmentationClassAug and train_aug.txt (10,582 images)."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise InputError("SBD's masks are .mat files: `pip install scipy` first, for this conversion alone") from None
    root = Path(root)
    voc = root / "VOCdevkit" / "VOC2012"
    if not (voc / "ImageSets" / "Segmentation" / "val.txt").is_file():
        datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
    sbd = root / "sbd"
    parts = [datasets.SBDataset(sbd, part, "segmentation", download=not (sbd / "val.txt").is_file())
             for part in ("train", "val")]
    read_list = lambda name: (voc / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
    train, val = read_list("train"), set(read_list("val"))
    target = voc / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    names = set(train)
    for name in train:                                      # VOC's own mask wins over SBD's
        write_atomically(target / f"{name}.png",
                         lambda p: p.write_bytes((voc / "SegmentationClass" / f"{name}.png").read_bytes()))
    for part in parts:
        for i, path in enumerate(part.masks):
            name = Path(path).stem
            if name in val or name in names:
                continue
            names.add(name)
            mask = part[i][1]
            mask.putpalette(palette().tobytes())
            write_atomically(target / f"{name}.png", lambda p: mask.save(p, "PNG"))
    write_atomically(voc / "ImageSets" / "Segmentation" / "train_aug.txt",
                     lambda p: p.write_text("".join(f"{name}\n" for name in sorted(names))))
    print(f"{len(names)} training images (expected 10582) and {len(val)} for testing in {voc}")


def prepare_ade(root):
    """Download and unpack ADEChallengeData2016 (0.97 GB)."""
    datasets.utils.download_and_extract_archive(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", str(root),
        md5="7328b3957e407ddae1d3cbf487f149ef")
    print(f"{len(load('ade', root, 'train'))} training images (expected 20210) in {root}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Download and prepare a data set.")
    parser.add_argument("dataset", choices=["voc", "ade"])
    parser.add_argument("--data-root", default="data", help="where to put it; pass the same folder to train.py")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    with plain_errors("data.py"):
        try:
            {"voc": prepare_voc, "ade": prepare_ade}[args.dataset](args.data_root)
        except (OSError, RuntimeError) as error:                # torchvision says RuntimeError for a broken archive
            raise InputError(f"could not prepare {args.dataset} in {args.data_root}: {error}") from None
