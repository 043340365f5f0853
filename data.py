"""
The data: data sets, views of them as the network sees them, and mini-batches.

    python data.py voc --data-root data         # download VOC 2012 + SBD, make SegmentationClassAug
    python data.py ade --data-root data         # download ADE20K (the 2016 scene-parsing release)
    python data.py check --data-root my-images --task 4-1    # what is wrong, what a run would see
    python data.py convert ... --out my-images  # from colours, labelme or COCO: see convert.py

Data sets: `shapes` (made here, no download), `voc`, `ade`, and `folder` (your own images in VOC's
layout with a classes.txt). Each is an object with `classes` (names, background first), `len()`,
`read(i)` -> (RGB image, id mask), both PIL, and `labels()` -> the class ids in every image.
"""
import argparse
import contextlib
import json
import os
import re
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# first, as it sees to Ctrl-C while the others are imported
from run import (InputError, Parser, check_file, cpus, derive_seed, plain_errors, printable,
                 read_json, sha256, write_atomically, write_json)

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.utils import save_image

from pictures import ENDINGS, image_size, palette, read_image, read_mask
from protocol import VOID

# ImageNet's, as torchvision's weights expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()

# ------------------------------------------------------------------------------- the data sets

class Pair(NamedTuple):
    """What a scan knows of an image and its mask."""
    size: tuple                 # W, H
    counts: np.ndarray          # (256,) pixels of each id
    digest: str                 # of both files


def scan_pair(image_path, mask_path, num_classes):
    """The Pair; a damaged picture, or one of another size, is found here, not days later."""
    mask, size = read_mask(mask_path, num_classes, verify=True), image_size(image_path)
    if size != mask.size:
        raise InputError(f"{mask_path}: the mask is {mask.size[0]} x {mask.size[1]} pixels, "
                         f"but its image {image_path} is {size[0]} x {size[1]}")
    counts = mask.histogram()
    unknown = [i for i, count in enumerate(counts) if count and num_classes < i < VOID]
    if unknown:
        raise InputError(f"{mask_path}: mask id {unknown[0]} is outside the classes 0 to "
                         f"{num_classes} (and 255)")
    return Pair(size, np.array(counts),
                sha256(Path(image_path).read_bytes() + Path(mask_path).read_bytes()))


def refuse(error):
    """What is done with something odd in a data set, unless all of it is to be told."""
    raise error


class Files:
    """Image and mask files. `cache` is where labels() remembers its scan.

    After labels(), `digest` stands for all files, their names and contents, in their order.
    """

    def __init__(self, images, masks, classes, cache):
        self.images, self.masks, self.classes, self.cache = images, masks, classes, Path(cache)
        if not images:
            raise InputError(f"{self.cache.parent}: no images found")

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return read_image(self.images[i]), read_mask(self.masks[i], len(self.classes) - 1)

    def labels(self):
        """Class ids in every image, in list order. Scanned once, then read from the cache.

        The cache's key holds every file's name, size and time: a changed mask, image or list
        makes a new scan.
        """
        key, found = self.key(), {}
        with contextlib.suppress(InputError):               # none yet, or damaged
            found = read_json(self.cache, {"key": str, "scan": list})
        known = found["scan"] if found.get("key") == key else self.keep(key, self.scan())
        labels, digests = zip(*known)
        if VOID in set().union(*labels) and not any(0 < c < VOID for ids in labels for c in ids):
            raise InputError(f"{self.masks[0]}: all masks hold 0 and 255 alone, and 255 is void "
                             "here; write the id of a class, 1 and up, where it is")
        self.digest = sha256(json.dumps([[p.stem for p in self.images], digests]))
        return list(labels)

    def keep(self, key, pairs):
        """Write what labels() needs of a scan into the cache: [[class ids, digest] of a pair]."""
        known = [[np.flatnonzero(pair.counts).tolist(), pair.digest] for pair in pairs]
        try:
            write_json(self.cache, {"key": key, "scan": known})
        except InputError:
            print(f"note: {self.cache.parent} is not writable, the scan of its masks is not kept",
                  file=sys.stderr)
        return known

    def key(self):
        stats = []
        for path in (path for pair in zip(self.images, self.masks, strict=True) for path in pair):
            check_file(path)
            s = os.stat(path)                               # ctime: `cp -p` keeps the other
            stats.append((str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        return sha256(json.dumps([stats, len(self.classes)]))

    def scan(self, odd=refuse):
        """The Pair of every image, None where odd(error) did not raise."""
        def scan(image, mask):
            try:
                return scan_pair(image, mask, len(self.classes) - 1)
            except InputError as error:
                return odd(error)
        found, shown = [], time.monotonic()
        start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")     # see run.LiveLine
        with ThreadPoolExecutor(cpus()) as pool:            # decoding lets go of the GIL
            for pair in pool.map(scan, self.images, self.masks):
                found.append(pair)
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    print(f"{start}scanning: {len(found)} of {len(self)}", end=end,
                          file=sys.stderr, flush=True)
        print(start, end="", file=sys.stderr, flush=True)
        return found


def voc_layout(root, classes, list_name, mask_folder, odd):
    """VOC's folders. A list has a name a line, or MiB's two columns of paths below the root,
    "/JPEGImages/x.jpg /SegmentationClassAug/x.png", apart by blanks or a tab."""
    path = root / "ImageSets" / "Segmentation" / f"{list_name}.txt"
    lines = read_lines(path)
    two_columns = [re.split(r"\s*\t\s*|\s+(?=/)|\s\s+", line) for line in lines]
    two_columns = [c if len(c) == 2 else line.split() for c, line in zip(two_columns, lines)]
    if all(len(c) == 2 and all("/" in p for p in c) for c in two_columns):
        pairs = [tuple(below(root, name, path) for name in columns) for columns in two_columns]
    else:
        folders = pictures(root / "JPEGImages", odd), pictures(root / mask_folder, odd)
        pairs = [tuple(picture_called(line, folder, path, odd) for folder in folders)
                 for line in lines]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        raise InputError(f"{path}: none of its pictures is there with its mask")
    if repeated := len(pairs) - len(set(pairs)):
        print(f"note: {path}: {repeated} lines are repeated; each is kept once", file=sys.stderr)
    images, masks = zip(*dict.fromkeys(pairs))
    return Files(list(images), list(masks), classes, root / f".labels-{list_name}.json")


def below(root, column, listing):
    """A path of a list, which may not lead out of the data set."""
    if ".." in Path(column).parts:
        raise InputError(f"{listing}: {column} leads out of {root}")
    return root / column.lstrip("/")


def pictures(folder, odd=refuse):
    """{name without ending: path} of the pictures in a folder; hidden files are passed over."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        raise InputError(f"{folder}: not found; see 'Data' in README.md for the layout") from None
    found = {}
    for path in paths:
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            name = unicodedata.normalize("NFC", path.stem)
            if name in found:
                odd(InputError(f"{folder}: {found[name].name} and {path.name} are both there; "
                               "which one is meant? Remove the other"))
            found[name] = path
    return found


def picture_called(line, folder, listing, odd):
    """The picture of a list's line, which may have an ending; `folder` is of pictures()."""
    name = unicodedata.normalize("NFC", line)
    stem = name.rpartition(".")[0] if name.lower().endswith(ENDINGS) else name
    if name in folder or stem in folder:
        return folder.get(name) or folder[stem]
    where = next(iter(folder.values())).parent if folder else "an empty folder"
    odd(InputError(f"{printable(line)}: is in {listing}, but no picture in {where}"))


def read_lines(path):
    """The lines of a text file that are not blank."""
    if not path.exists():
        raise InputError(f"{path}: not found; see 'Data' in README.md for the layout")
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path}: empty")
    return lines


def load(name, root, split, odd=refuse):
    """The data set `name` at --data-root, split "train" or "val".

    Raises InputError if it is not there. odd(error) is told of a listed picture that is not, which
    is left out if that does not raise.
    """
    root = Path(root)
    if name not in ("shapes", "voc", "ade", "folder"):
        raise InputError(f"unknown data set {name!r}: choose shapes, voc, ade or folder")
    if name == "shapes":
        return Shapes(split)
    if not root.is_dir():
        way_out = f"; `python data.py {name} --data-root {root}` makes it"
        raise InputError(f"--data-root {root}: no such folder" + way_out * (name != "folder"))
    if name == "voc":
        lists = {"train": ("train_aug", "SegmentationClassAug"),
                 "val": ("val", "SegmentationClass")}
        return voc_layout(root / "VOCdevkit" / "VOC2012", VOC_CLASSES, *lists[split], odd)
    if name == "folder":
        classes = [printable(name) for name in read_lines(root / "classes.txt")]
        names = {"background", *classes[1:]} - {""}         # what results call them
        if not 2 <= len(names) == len(classes) <= VOID:
            raise InputError(
                f"{root / 'classes.txt'}: expected 2 to {VOID} different names, background first, "
                f"got {len(classes)} lines with {len(names)} names")
        return voc_layout(root, classes, split, "SegmentationClass", odd)
    return ade(root / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split])


def ade(root, folder):
    images = list(pictures(root / "images" / folder).values())
    masks = [root / "annotations" / folder / f"{p.stem}.png" for p in images]
    names, info = [f"class {i}" for i in range(1, 151)], root / "objectInfo150.txt"
    if info.is_file():                      # a header line, then Idx Ratio Train Val Name
        for i, line in enumerate(info.read_text("utf-8", "replace").splitlines()[1:151]):
            name = printable(line.split("\t")[-1].split(",")[0].strip())
            names[i] = name if name and name not in names[:i] else f"{name} {i + 1}".strip()
    return Files(images, masks, ["other", *names], root / f".labels-{folder}.json")


class Shapes:
    """The embedded data set: 20 classes, 5 shapes x 4 colours, 64 x 64 pixels, nothing to download.

    One object (sometimes two or three) of random size, place, turn and tint on a textured
    background. Everything is drawn from numpy's frozen RandomState stream with + - * / alone, so
    an index gives the same pixels on every machine. Old and new classes share their shapes and
    their colours; only the pair tells them apart.
    """

    COLOURS = {"red": (200, 50, 50), "green": (50, 175, 60), "blue": (60, 80, 210),
               "yellow": (210, 190, 50)}
    SHAPES = {                                          # u, v: object coordinates, in [-1, 1]
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
        S = 64
        y, x = np.mgrid[:S, :S] + 0.5
        # Background: a coarse 5 x 5 grid of greyish colours, blended linearly, with pixel noise.
        grid = random.uniform(60, 190) + random.uniform(-50, 50, (5, 5, 1)) \
            + random.uniform(-25, 25, (5, 5, 3))
        ty, tx = y / S * 4, x / S * 4
        iy, ix = ty.astype(int), tx.astype(int)
        fy, fx = (ty - iy)[..., None], (tx - ix)[..., None]
        image = ((grid[iy, ix] * (1 - fy) + grid[iy + 1, ix] * fy) * (1 - fx)
                 + (grid[iy, ix + 1] * (1 - fy) + grid[iy + 1, ix + 1] * fy) * fx)
        mask = np.zeros((S, S), np.uint8)
        for _ in range(random.choice(3, p=[0.8, 0.15, 0.05]) + 1):
            k = random.randint(20)
            radius = random.uniform(0.16, 0.42) * S
            cy, cx = random.uniform(0.2, 0.8) * S, random.uniform(0.2, 0.8) * S
            t = random.uniform(-1, 1)                   # a turn by 2 atan(t), without sin and cos
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
        self.digest = "drawn"                           # the same everywhere
        return [np.unique(mask).tolist() for _, mask in self.items]


# ------------------------------------------------------------------------- from image to batch

def train_transform(crop):
    """MiB's: random-resized crop (0.5 to 2 of the area; what does not fit is drawn again), flip."""
    return v2.Compose([v2.RandomResizedCrop(crop, scale=(0.5, 2.0)), v2.RandomHorizontalFlip(),
                       *normalise()])


def test_transform(crop):
    """MiB's: short side to `crop`, then the central crop. Scores are on these pixels."""
    return v2.Compose([v2.Resize(crop), v2.CenterCrop(crop), *normalise()])


def normalise():
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]     # masks: left alone


def normalised(pixels):
    """uint8 RGB (B, 3, H, W) -> the network's space, float32."""
    return v2.Compose(normalise())(pixels)


def denormalise(images):
    """(B, 3, H, W) in the network's space -> uint8 RGB."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


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
            if mask.shape != image.size[::-1]:
                raise InputError(f"{self.dataset.masks[self.indices[position]]}: changed while the "
                                 "run was on")
        else:
            image = read_image(self.fakes[position - len(self.indices)])
            mask = torch.zeros(image.size[::-1], dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)       # torch.manual_seed is for all devices
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def shuffled_passes(n, seed):
    """0 .. n-1 in random order, for ever: every index comes equally often."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def train_batches(num_real, num_fake, real, fake, iterations, seed, start=0, rank=0, world=1):
    """The mini-batches of a step for one rank, as lists of (position, seed) for View.

    real, fake: how many of each a mini-batch holds over all ranks; rank takes [rank::world] of it.
    The same (seed, iteration) gives the same mini-batch however often the run was resumed.
    """
    generator = torch.Generator().manual_seed(seed)
    reals = shuffled_passes(num_real, derive_seed(seed, 1))
    fakes = shuffled_passes(num_fake, derive_seed(seed, 2))
    for iteration in range(iterations):
        positions = [next(reals) for _ in range(real)]
        positions += [num_real + next(fakes) for _ in range(fake)]
        seeds = torch.randint(2 ** 31, (len(positions),), generator=generator).tolist()
        if iteration >= start:
            yield list(zip(positions, seeds))[rank::world]


# ------------------------------------------------------------------------------------ pictures

def colour(mask):
    """ids (..., H, W) -> RGB (..., 3, H, W) uint8, void (255) in VOC's cream white."""
    return torch.from_numpy(palette())[mask.long()].movedim(-1, -3)


def save_grid(pictures, columns, path):
    """Write equally large uint8 pictures (3, H, W) as one PNG, `columns` a row."""
    write_atomically(path, lambda p: save_image(torch.stack(pictures) / 255, p, format="png",
                                                nrow=columns, pad_value=1))


# ------------------------------------------------------------------------------------ download

def prepare_voc(root):
    """Download VOC 2012 and SBD; write SegmentationClassAug and train_aug.txt (10,582 images)."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise InputError("SBD's masks are .mat files: `pip install scipy` first, for this "
                         "conversion alone") from None
    root = Path(root)
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "sbd"
    lists, target = voc / "ImageSets" / "Segmentation", voc / "SegmentationClassAug"
    if not (lists / "val.txt").is_file():
        datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
    parts = [datasets.SBDataset(sbd, part, "segmentation", download=not (sbd / "val.txt").is_file())
             for part in ("train", "val")]
    for path in [lists / "train.txt", lists / "val.txt", *(m for p in parts for m in p.masks)]:
        check_file(path)
    train, val = ((lists / f"{split}.txt").read_text().split() for split in ("train", "val"))
    target.mkdir(exist_ok=True)
    names = set(train)
    for name in train:                                  # VOC's own mask wins over SBD's
        check_file(path := voc / "SegmentationClass" / f"{name}.png")
        pixels = path.read_bytes()
        write_atomically(target / f"{name}.png", lambda p: p.write_bytes(pixels))
    for part, i, path in [(part, i, path) for part in parts for i, path in enumerate(part.masks)]:
        name = Path(path).stem
        if name in names or name in val:
            continue
        names.add(name)
        mask = part[i][1]
        mask.putpalette(palette().tobytes())
        write_atomically(target / f"{name}.png", lambda p: mask.save(p, "PNG"))
    listing = "".join(f"{name}\n" for name in sorted(names))
    write_atomically(lists / "train_aug.txt", lambda p: p.write_text(listing))
    print(f"{len(names)} training images (expected 10582) and {len(val)} for testing in {voc}")


def prepare_ade(root):
    """Download and unpack ADEChallengeData2016 (0.97 GB)."""
    datasets.utils.download_and_extract_archive(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", str(root),
        md5="7328b3957e407ddae1d3cbf487f149ef")
    print(f"{len(load('ade', root, 'train'))} training images (expected 20210) in {root}")


# ------------------------------------------------------------------------------------ commands

def parse(argv=None):
    """The command's flags; of `check`, those of train.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in ("voc", "ade"):
        commands.add_parser(name, help="download it").add_argument(
            "--data-root", default="data", help="where to put it; the same for train.py")
    commands.add_parser("check", add_help=False, help="what is wrong, what a run would see")
    convert = commands.add_parser(
        "convert", help="masks as people have them", description="Masks in colours, labelme's or "
        "COCO's files, into the layout of --dataset folder; commands stand in convert.py.")
    a = convert.add_argument
    a("source", help="folder of coloured masks or labelme's files, or COCO's .json")
    a("--out", required=True, help="new folder in the layout of --dataset folder")
    a("--images", help="folder of the photographs; of labelme's, if they are not beside the files")
    a("--names", help="coloured masks: a file of lines `name red green blue`, background first")
    args, rest = parser.parse_known_args(argv)
    if "" in vars(args).values():
        raise InputError("an argument is empty: a shell variable that is not set?")
    if args.command == "check":
        import check                                        # which imports this module
        args.train = check.parse(rest)
    elif rest:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.command == "check":
        from check import check                             # which imports this module
        return check(args.train)
    if args.command == "convert":
        from convert import convert                         # which imports this module
        return convert(args.source, args.out, args.images, args.names)
    try:
        {"voc": prepare_voc, "ade": prepare_ade}[args.command](args.data_root)
    except InputError:
        raise
    except Exception as error:                  # torchvision's and scipy's, for a broken archive
        raise InputError(f"could not prepare {args.command} in {args.data_root}: {error}") from None


if __name__ == "__main__":
    with plain_errors("data.py"):
        main()
