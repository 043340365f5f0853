"""
A folder of fakes: what SegInversion is asked for, and its images on the disk (paper, Sec. 3.2).

    python fakes.py --checkpoint runs/voc-15-1-disjoint/step-0.pth --classes horse,person

writes the paper's Figure 3: the same noise, inverted once for every --r (0.5, 5 and 10), with the
network's own segmentation underneath. A folder of fakes holds

    00000.png, ...      the images
    manifest.jsonl      a line per image: file, its digest, classes (background first), r of each as
                        text, the seed of its batch, found: the share of pixels that the network
                        gives to each class asked for, at its own stride; and the line's own digest
    plan.json           the settings, and a digest of the network
"""
import functools
import json
import math
import time
from pathlib import Path

# first, as it sees to Ctrl-C while the others are imported
from run import (InputError, Parser, World, derive_seed, nearest, plain_errors, read_json, setup,
                 sha256, write_atomically, write_json)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import data
from data import normalised, read_image
from model import load_model, upsample
from seginversion import invert, statistics_of

R_CHOICES = (0.5, 1, 5, 10, 20)                         # Sec. 4.4, "random"
FOUND = 0.01                                            # of an image's pixels; fewer are no object


# ------------------------------------------------------------------ what is asked of each image

def balanced_targets(num_images, classes, seed, most=3):
    """Classes to show in each image: 1 to `most` distinct ones of `classes`, ids, sorted.

    Dealt from shuffled decks, so that over the whole set no class is asked for more than once more
    often than another.
    """
    generator = torch.Generator().manual_seed(seed)
    deck, targets = [], []
    for _ in range(num_images):
        count = 1 + int(torch.randint(min(most, len(classes)), (), generator=generator))
        chosen = []
        while len(chosen) < count:
            if not deck:
                deck = [classes[i] for i in torch.randperm(len(classes), generator=generator)]
            chosen.append(deck.pop(next(i for i, c in enumerate(deck) if c not in chosen)))
        targets.append(sorted(chosen))
    return targets


def parse_r(text):
    """--r: "avg" (0), "max" (inf), a number >= 0, or None for one that is drawn."""
    named = {"random": None, "random-image": None, "avg": 0.0, "max": math.inf}
    try:
        r = named[text] if text in named else float(text)
    except ValueError:
        r = -1.0
    if r is not None and not (0 <= r < 1e30 or r == math.inf):
        raise InputError(f"--r {text}: expected random, random-image, avg, max or a number >= 0")
    return r


def draw_r(text, B, C, seed):
    """Eq. 1's scales (B, C) as --r has them.

    "random" draws one out of R_CHOICES for every image and class (Sec. 3.2), "random-image" one for
    every image (Sec. 4.4 speaks of "each random input").
    """
    r = parse_r(text)
    if r is not None:
        return torch.full((B, C), r)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(R_CHOICES), (B, 1 if text == "random-image" else C),
                          generator=generator)
    return torch.tensor(R_CHOICES)[drawn.expand(-1, C)]


def multi_hot(classes, C):
    """Lists of ids -> (B, C), 1 for each id and for the background."""
    targets = torch.zeros(len(classes), C)
    for row, ids in enumerate(classes):
        targets[row, [0, *ids]] = 1
    return targets


# ---------------------------------------------------------------------------- filling the folder

def synthesize(model, folder, num_images, *, sizes, batch_size=16, r="random", seed=0, most=3,
               classes=None, earlier=(), world=World(), report=None, **options):
    """Fill a folder with num_images fakes of the classes a model knows.

    Batch b belongs to rank b % world.size and, for given settings, depends on (seed, b) alone.
    Called again it goes on at the first missing batch; with other settings or another model it
    refuses with InputError. A loss that is not finite is a FloatingPointError.

    sizes:   of invert(); the last is that of the images
    most:    most foreground classes in one image
    classes: ids to show, if not all but the background; then
    earlier: paths of fakes of the other classes, whose BatchNorm statistics stand beside these
    report:  called as report(dict) with the progress of this rank, in its own batches
    options: part, steps, lr, tv, l2, bn, spectrum of invert()
    Returns the paths of the images, in order, on every rank.
    """
    folder, C = Path(folder), sum(model.classes_per_step)
    plan = {"num_images": num_images, "sizes": sizes, "batch_size": batch_size, "r": r,
            "seed": seed, "most": most, "model": digest(model), **options,
            "classes": classes, "earlier": [sha256(path.read_bytes()) for path in earlier]}
    claim(folder, world, plan)
    paths = [folder / f"{i:05d}.png" for i in range(num_images)]
    asked = balanced_targets(num_images, classes or range(1, C), derive_seed(seed, 0), most)
    part = lambda b: folder / f"batch-{b:05d}.jsonl"
    batches = range(math.ceil(num_images / batch_size))
    whole = read_manifest(folder / "manifest.jsonl")
    others = functools.cache(lambda: statistics_beside(model, earlier, sizes, len(batches)))
    for b in batches[world.rank::world.size]:
        images = slice(b * batch_size, (b + 1) * batch_size)
        there = whole | read_manifest(part(b))
        if all(intact(path, there) for path in paths[images]):
            continue
        began, batch_seed = time.monotonic(), derive_seed(seed, 1, b)
        scales = draw_r(r, len(asked[images]), C, batch_seed)
        try:
            terms, found = make_batch(model, paths[images], asked[images], scales,
                                      sizes=sizes, seed=batch_seed, others=others(), **options)
        except FloatingPointError as error:
            raise FloatingPointError(f"synthesis of batch {b} in {folder}: {error}") from None
        text = manifest_lines(paths[images], asked[images], scales, batch_seed, found)
        write_atomically(part(b), lambda p: p.write_text(text))
        if report:
            seconds, left = time.monotonic() - began, len(batches[b + world.size::world.size])
            report({"batch": b // world.size, "of": b // world.size + 1 + left, **terms,
                    "eta": seconds * left,
                    "images/s": world.size * len(asked[images]) / seconds})
    world.barrier()
    if world.rank == 0:
        for b in batches:
            whole |= read_manifest(part(b))
        text = "".join(json.dumps(whole[path.name]) + "\n" for path in paths)
        write_atomically(folder / "manifest.jsonl", lambda p: p.write_text(text))
        for b in batches:
            part(b).unlink(missing_ok=True)
    world.barrier()
    return paths


def read_manifest(path):
    """{name of a fake: its line} of a manifest or a batch; {} if that is not there or damaged."""
    try:
        lines = path.read_text().splitlines() if path.is_file() else []
        return {line["file"]: line for line in map(json.loads, lines)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def intact(path, lines):
    """Whether a fake is as its line says: one that is not is made again, with its batch."""
    line = dict(lines.get(path.name, {}))
    whole = line.pop("line", None) == sha256(json.dumps(line))
    return whole and path.is_file() and sha256(path.read_bytes()) == line.get("sha256")


def claim(folder, world, plan):
    """Make the folder this plan's, or refuse with InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    path, plan = folder / "plan.json", json.loads(json.dumps(plan))     # as a file gives it back
    if path.exists():
        there = read_json(path, {"seed": int}, f"remove {folder}, and its fakes are made again")
        differing = [k for k in plan.keys() | there.keys() if plan.get(k) != there.get(k)]
        if differing:
            raise InputError(f"{folder} holds fakes made with other settings "
                             f"({', '.join(sorted(differing))}): remove it or choose another")
    world.barrier()
    if world.rank == 0:
        write_json(path, plan)


def digest(model):
    return sha256(b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values()))


def statistics_beside(model, earlier, sizes, num_batches):
    """BatchNorm statistics of earlier fakes, at every size; None without any. Of num_batches new
    batches each is to be matched with all of them, and counts for all new ones then."""
    if not earlier:
        return None
    pixels, device = torch.stack(list(map(read_pixels, earlier))), next(model.parameters()).device
    parts = lambda: (normalised(x).to(device) for x in pixels.split(16))
    of_size = {size: statistics_of(model, parts(), size) for size in sizes}
    return {size: (number / num_batches, s) for size, (number, s) in of_size.items()}


def make_batch(model, paths, asked, scales, *, seed, **options):
    """Invert a batch and write it; the last loss terms, and the share of each class (B, C)."""
    terms = {}
    x = invert(model, multi_hot(asked, scales.shape[1]), scales, seed=seed,
               on_step=lambda _, named: terms.update(named), **options)
    terms = {name: float(term) for name, term in terms.items()}
    if not all(map(math.isfinite, terms.values())) or not bool(x.isfinite().all()):
        raise FloatingPointError(f"a loss is not finite: {terms}")
    pixels = data.denormalise(x).cpu()
    for path, picture in zip(paths, pixels):
        picture = v2.functional.to_pil_image(picture)
        write_atomically(path, lambda p: picture.save(p, "PNG"))
    return terms, class_shares(model, normalised(pixels).to(x.device))


def manifest_lines(paths, asked, scales, seed, found):
    lines = []
    for row, path in enumerate(paths):
        classes = [0, *asked[row]]
        lines.append({"file": path.name, "sha256": sha256(path.read_bytes()),
                      "classes": classes, "seed": seed,
                      "r": [str(v) for v in scales[row, classes].tolist()],
                      "found": found[row, classes].tolist()})
        lines[-1]["line"] = sha256(json.dumps(lines[-1]))
    return "".join(json.dumps(line) + "\n" for line in lines)


def replay(dataset, indices, folder, num_images, *, size, seed, world=World()):
    """Outside the protocol: real images in the fakes' place, central crops, each equally often.

    indices: the old images of the data set, which no step may keep. Returns the paths.
    """
    order = data.shuffled_passes(len(indices), seed)
    crop = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    paths = [Path(folder) / f"{i:05d}.png" for i in range(num_images)]
    if world.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            picture = crop(dataset.read(indices[next(order)])[0])
            write_atomically(path, lambda p: picture.save(p, "PNG"))
    world.barrier()
    return paths


# ------------------------------------------------------------- reading, judging and drawing them

def read_fakes(folder, **made):
    """The path of every image of a finished set of fakes, and the old classes it was asked for.

    made: what plan.json must say of how they were made
    """
    lines = read_manifest(folder / "manifest.jsonl")
    try:
        fakes = [(folder / name, line["classes"][1:]) for name, line in lines.items()]
        plan = read_json(folder / "plan.json", {"num_images": int})
        whole = len(fakes) == plan["num_images"] and all(intact(path, lines) for path, _ in fakes)
    except (LookupError, TypeError, InputError):
        whole = False
    if not whole:
        raise InputError(f"{folder} holds no finished set of fakes (plan, manifest or an image is "
                         "missing or damaged)")
    if differing := [name for name, value in made.items() if plan.get(name) != value]:
        raise InputError(f"{folder} holds fakes of another network or with other settings "
                         f"({', '.join(differing)})")
    return fakes


def read_pixels(path):
    return v2.functional.pil_to_tensor(read_image(path))    # (3, H, W) uint8


@torch.inference_mode()
def class_shares(model, x):
    """The share of pixels that the model gives to each class, (B, C), of x (B, 3, H, W)."""
    logits = model.eval()(x)
    return F.one_hot(logits.argmax(1), logits.shape[1]).float().mean((1, 2)).cpu()


@torch.inference_mode()
def segment(model, x):
    """The model's segmentation of x (B, 3, H, W), as a list of coloured pictures."""
    return list(data.colour(upsample(model.eval()(x), x).argmax(1).cpu()))


def save_fakes(model, paths, path, columns=8, rows=2):
    """A grid of fakes, each with the model's own segmentation underneath."""
    device = next(model.parameters()).device
    shown = [read_pixels(p) for p in paths[:columns * rows]]
    pictures = []
    for i in range(0, len(shown), columns):
        row = shown[i:i + columns]
        blank = [torch.full_like(row[0], 255)] * (columns - len(row))
        pictures += row + blank + segment(model, normalised(torch.stack(row)).to(device)) + blank
    data.save_grid(pictures, columns, path)


@torch.inference_mode()
def judge_fakes(folder, teacher, dataset, judge=None):
    """How good the fakes in a folder are: {name of an old class: a dict of numbers}.

    folder:  of synthesize(); teacher: (model, its class names), the network that was inverted
    dataset: the real training images, for the size of the objects
    judge:   (model, class names) of a network that had no part in it, trained on real data
    images   fakes that were asked to show the class
    found    share of those in which the teacher gives it more than 1 % of the pixels (full size)
    sure     the teacher's mean probability of the class on the pixels it gives it
    size     share of pixels the class has where it was found, and in the real images that show it
    judge    the same share as found, by the judge; and its IoU with the teacher's map over all
             fakes asked (0 if neither finds it)
    """
    names, device, counts = teacher[1], next(teacher[0].parameters()).device, {}
    for path, classes in read_fakes(folder, model=digest(teacher[0])):
        x = normalised(read_pixels(path))[None].to(device)
        p = upsample(teacher[0](x), x).softmax(1)[0]                            # (C_old, H, W)
        theirs = upsample(judge[0](x), x).argmax(1)[0] if judge else None
        for c in classes:
            mine = p.argmax(0) == c
            other = theirs == judge[1].index(names[c]) if judge else None
            counts.setdefault(names[c], []).append(count_fake(p[c], mine, other))
    labels, scores = dataset.labels(), {}
    for name, rows in counts.items():
        s = {key: sum(row[key] for row in rows) for key in rows[0]}
        c, found = dataset.classes.index(name), max(1, s["found"])
        real = [np.mean(np.array(dataset.read(i)[1]) == c)
                for i in range(len(labels)) if c in labels[i]]
        scores[name] = {"images": len(rows), "found": s["found"] / len(rows),
                        "sure": s["sure"] / found, "size": s["size"] / found,
                        "real size": float(np.mean(real)) if real else math.nan}
        if judge:
            scores[name] |= {"judge found": s["judge found"] / len(rows),
                             "judge IoU": s["both"] / max(1, s["either"])}
    return scores


def count_fake(probability, mine, other):
    """One class of one fake: probability (H, W), the teacher's map and, if any, the judge's."""
    share = mine.float().mean().item()
    counts = {"found": share > FOUND, "sure": 0, "size": 0}
    if share > FOUND:
        counts |= {"sure": probability[mine].mean().item(), "size": share}
    if other is not None:
        counts |= {"judge found": other.float().mean().item() > FOUND,
                   "both": (mine & other).sum().item(), "either": (mine | other).sum().item()}
    return counts


# ------------------------------------------------------------------------------------- Figure 3

def parse(argv=None):
    parser = Parser(description="Figure 3: the same noise inverted at several r.")
    a = parser.add_argument
    a("--checkpoint", required=True, help="step-<k>.pth of a run, whose settings are used")
    a("--classes", nargs="+", required=True,
      help="names, with commas: horse,person (background is added). Several such sets: the images "
           "take them in turn")
    a("--r", default="0.5,5,10", help="one column of the picture each; also avg and max")
    a("--images", type=int, default=16, help="inverted together; the first four are drawn")
    a("--seed", type=int, default=0, help="another one for other noise")
    a("--out", default="figure3.png")
    return parser.parse_args(argv)


def check(args, names):
    """The sets of class ids asked for; what is wrong with the flags, as InputError."""
    asked = [group.split(",") for group in args.classes]
    unknown = [c for group in asked for c in group if c not in names[1:]]
    if unknown:
        raise InputError(f"--classes {' '.join(args.classes)}: {unknown[0] or 'an empty name'} is "
                         f"unknown to this checkpoint, which knows {', '.join(names[1:])}"
                         + nearest(unknown[0], names[1:]))
    if args.images < len(asked):
        raise InputError(f"--images {args.images}: fewer than the {len(asked)} sets of --classes")
    if not 0 <= args.seed < 2 ** 63:
        raise InputError(f"--seed {args.seed}: must be at least 0 and below 2**63")
    if not args.out.lower().endswith(".png") or not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: name a .png in a folder that is there")
    if drawn := next((text for text in args.r.split(",") if parse_r(text) is None), None):
        raise InputError(f"--r {drawn}: name the scales to compare instead, such as 0.5,5,10")
    return [[names.index(c) for c in group] for group in asked]


def main(argv=None):
    args = parse(argv)
    model, about = load_model(args.checkpoint, setup().device)
    names = about["classes"]
    sets = check(args, names)
    targets = multi_hot([sets[i % len(sets)] for i in range(args.images)], len(names))
    columns, texts, of_r = [], args.r.split(","), {}
    for text in texts:
        x = invert(model, targets, parse_r(text), seed=args.seed, **about["inversion"])
        if not bool(x.isfinite().all()):
            raise FloatingPointError(f"r = {text}: a pixel is not finite; use another checkpoint")
        found = class_shares(model, x)
        of_r[text] = {name: round(found[targets[:, c] > 0, c].mean().item(), 3)
                      for c, name in enumerate(names) if targets[:, c].any()}
        print(f"r = {text}: share of pixels, in the images that ask for the class", of_r[text])
        pairs = zip(data.denormalise(x[:4]).cpu(), segment(model, x[:4]))
        columns.append([picture for pair in pairs for picture in pair])
    data.save_grid([picture for row in zip(*columns) for picture in row], len(columns), args.out)
    grid = Image.open(args.out)
    picture = Image.new("RGB", (grid.width, grid.height + 14), "white")
    picture.paste(grid, (0, 14))
    for i, text in enumerate(texts):
        place = (4 + i * grid.width // len(texts), 1)
        ImageDraw.Draw(picture).text(place, f"r = {text}", "black")
    write_atomically(args.out, lambda p: picture.save(p, "PNG"))
    print(f"wrote {args.out}")
    return of_r


if __name__ == "__main__":
    with plain_errors("fakes.py"):
        main()
