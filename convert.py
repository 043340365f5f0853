"""
Masks as people have them, into the layout of `--dataset folder`. Originals stay as they are.

    python data.py convert masks/ --images photos/ --names colours.txt --out my-images
    python data.py convert annotations/ --out my-images      # labelme: a JSON beside each image
    python data.py convert instances.json --images photos/ --out my-images      # COCO's

colours.txt holds a line `name red green blue` for each class, background first; `void` is 255.
Every fifth image, by name, tests (val.txt). What cannot be read, and every colour that is not
known, is listed, and nothing is written then.
"""
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import pictures, read_lines
from pictures import ENDINGS, palette, read_image
from protocol import VOID
from run import InputError, check_file, printable, write_atomically


# ------------------------------------------------------------------------- what a source holds

def coloured_masks(folder, images, names):
    """Masks in colours -> (classes, [(image path, function that makes its ids)])."""
    if images is None or names is None:
        raise InputError("coloured masks need --images, a folder, and --names, a file of colours")
    classes, colours = read_colours(names)
    masks, photos = pictures(folder), pictures(Path(images))
    missing = sorted(set(masks) ^ set(photos))
    if missing:
        raise InputError(f"{len(missing)} pictures are in one of {folder} and {images} alone: "
                         f"{', '.join(missing[:5])}")
    return classes, [(photos[name], lambda size, path=path: ids_of_colours(path, colours))
                     for name, path in masks.items()]


def read_colours(path):
    """A file of lines `name red green blue` -> (names, {(red, green, blue): id})."""
    names, colours = [], {}
    for number, line in enumerate(read_lines(Path(path)), 1):
        name, *rgb = line.replace(",", " ").rsplit(maxsplit=3)
        if len(rgb) != 3 or not all(v.isdecimal() and int(v) < 256 for v in rgb):
            raise InputError(f"{path}, line {number}: expected `name red green blue`, 0 to 255")
        colour = tuple(map(int, rgb))
        if colour in colours or name.strip() in names:
            raise InputError(f"{path}, line {number}: {name.strip()} {colour} is there twice")
        colours[colour] = VOID if name.strip() == "void" else len(names)
        names += [name.strip()] * (name.strip() != "void")
    return names, colours


def ids_of_colours(path, colours):
    """(H, W) uint8 ids of a mask in colours; InputError that lists the colours that are unknown."""
    pixels = np.asarray(read_image(path)).astype(np.int64) @ [65536, 256, 1]       # (H, W)
    ids = np.full(pixels.shape, VOID, np.uint8)
    known = {(r << 16) + (g << 8) + b: k for (r, g, b), k in colours.items()}
    there, counts = np.unique(pixels, return_counts=True)
    unknown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255}) in {n} pixels"
               for c, n in zip(there.tolist(), counts.tolist()) if c not in known]
    if unknown:
        raise InputError(f"{path}: {len(unknown)} unknown colours: {'; '.join(unknown[:5])}")
    for colour in there.tolist():
        ids[pixels == colour] = known[colour]
    return ids


def labelme(folder):
    """labelme's JSON files -> the same; classes are the labels of all, in order of their names."""
    files, labels = sorted(Path(folder).glob("*.json")), set()
    pairs = []
    for path in files:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            shapes = [(str(shape["label"]).strip(), shape.get("shape_type", "polygon"),
                       shape["points"]) for shape in record["shapes"]]
            image = path.parent / record["imagePath"].replace("\\", "/")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not labelme's ({error!r})") from None
        odd = {kind for _, kind, _ in shapes} - {"polygon", "rectangle", "circle"}
        if odd:
            raise InputError(f"{path}: shapes of kind {', '.join(sorted(odd))} have no area")
        check_file(image)
        labels |= {label for label, *_ in shapes}
        pairs.append((image, shapes))
    classes = ["background", *sorted(labels - {"background", "_background_", "__ignore__"})]
    of_label = {**{name: k for k, name in enumerate(classes)}, "_background_": 0,
                "__ignore__": VOID}
    return classes, [(image, lambda size, shapes=shapes: drawn(
        size, [(of_label[label], outline(kind, points)) for label, kind, points in shapes]))
        for image, shapes in pairs]


def outline(kind, points):
    """A labelme shape as a list of (x, y)."""
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if kind == "circle":
        (x, y), (u, v) = points
        turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        r = np.hypot(u - x, v - y)
        return list(zip(x + r * np.cos(turn), y + r * np.sin(turn)))
    return [tuple(point) for point in points]


def drawn(size, shapes):
    """(H, W) ids of polygons, later ones over earlier ones."""
    mask = Image.new("L", size)
    for k, points in shapes:
        if len(points) > 2:
            ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in points], fill=k)
    return np.array(mask)


def coco(path, images):
    """COCO's instances -> the same; small objects are drawn over large ones."""
    if images is None:
        raise InputError(f"{path}: COCO's needs --images, the folder of its pictures")
    check_file(path)
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        categories = {c["id"]: str(c["name"]).strip() for c in record["categories"]}
        classes = ["background", *categories.values()]
        of_category = {k: 1 + i for i, k in enumerate(categories)}
        of_image = {}
        for a in record["annotations"]:
            of_image.setdefault(a["image_id"], []).append(
                (of_category[a["category_id"]], a["segmentation"], a.get("area", 0)))
        pairs = [(Path(images) / image["file_name"], of_image.get(image["id"], []))
                 for image in record["images"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not COCO's ({error!r})") from None
    for photo, _ in pairs:
        check_file(photo)
    return classes, [(photo, lambda size, objects=objects: coco_ids(size, objects))
                     for photo, objects in pairs]


def coco_ids(size, objects):
    ids = np.zeros(size[::-1], np.uint8)
    for k, segmentation, _ in sorted(objects, key=lambda one: -one[2]):
        if isinstance(segmentation, dict):
            inside = decoded(segmentation, size)
        else:
            inside = drawn(size, [(1, list(zip(p[::2], p[1::2]))) for p in segmentation]) > 0
        ids[inside] = k
    return ids


def decoded(rle, size):
    """COCO's run lengths, a list or its compressed text, column by column -> (H, W) bool."""
    H, W = rle["size"]
    if (W, H) != size:
        raise InputError(f"a run-length mask of {W} x {H} for a picture of {size[0]} x {size[1]}")
    counts = rle["counts"] if isinstance(rle["counts"], list) else run_lengths(rle["counts"])
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    if len(flat) != H * W:
        raise InputError(f"run lengths of {len(flat)} pixels for a mask of {H * W}")
    return flat.reshape(W, H).T == 1


def run_lengths(text):
    """COCO's compressed text: numbers in base 32, five bits and one that says "more" a character,
    the sign in the last, each from the third on as the difference to the one two before."""
    counts, i = [], 0
    while i < len(text):
        value = shift = 0
        while True:
            bits = ord(text[i]) - 48
            value |= (bits & 31) << shift
            shift, i = shift + 5, i + 1
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


# --------------------------------------------------------------------------------- the new folder

def convert(source, out, images=None, names=None):
    """Write a data set in folder's layout to `out`, which must be new or empty."""
    source, out = Path(source), Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty; name a new folder")
    if source.suffix == ".json":
        classes, pairs = coco(source, images)
    elif source.is_dir() and any(source.glob("*.json")):
        classes, pairs = labelme(source)
    elif source.is_dir():
        classes, pairs = coloured_masks(source, images, names)
    else:
        raise InputError(f"{source}: expected a folder of coloured masks or of labelme's files, or "
                         "COCO's .json")
    if not 2 <= len(classes) == len(set(classes) - {""}) <= VOID or len(pairs) < 2:
        raise InputError(f"{source}: {len(pairs)} pictures of {len(classes)} classes, expected 2 "
                         f"or more of 2 to {VOID} classes with names of their own")
    stems = [image.stem for image, _ in pairs]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise InputError(f"{source}: two pictures are called {twice}")
    wrong = [f"{image}: its ending is none of {' '.join(ENDINGS)}" for image, _ in pairs
             if image.suffix.lower() not in ENDINGS]
    for image, make in pairs:                               # all of them, before any is written
        try:
            size = read_image(image).size
            if make(size).shape != size[::-1]:
                raise InputError(f"{image}: its mask has another size")
        except (InputError, ValueError, LookupError, TypeError) as error:
            wrong.append(printable(f"{image}: {error}".replace(f"{image}: {image}", str(image))))
    if wrong:
        raise InputError(f"{len(wrong)} of {len(pairs)} pictures cannot be converted: "
                         + " | ".join(wrong[:10]))
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for image, make in pairs:
        picture = Image.fromarray(make(read_image(image).size))
        picture.putpalette(palette().tobytes())
        shutil.copyfile(image, out / "JPEGImages" / image.name)
        write_atomically(out / "SegmentationClass" / f"{image.stem}.png",
                         lambda p: picture.save(p, "PNG"))
    val = sorted(stems)[1::5]
    lists = {"classes.txt": classes, "ImageSets/Segmentation/val.txt": val,
             "ImageSets/Segmentation/train.txt": [s for s in sorted(stems) if s not in set(val)]}
    for name, lines in lists.items():
        write_atomically(out / name, lambda p: p.write_text("\n".join(lines) + "\n",
                                                            encoding="utf-8"))
    print(f"{len(stems) - len(val)} training and {len(val)} test pictures of {len(classes)} "
          f"classes in {out}: {', '.join(map(printable, classes))}")
