"""
Masks as people have them, into the layout of `--dataset folder`. Originals stay as they are.

    python data.py convert masks/ --images photos/ --names colours.txt --out my-images
    python data.py convert annotations/ --out my-images      # labelme: a JSON beside each image
    python data.py convert instances.json --images photos/ --out my-images      # COCO's

colours.txt holds a line `name red green blue` for each class. `void`, or labelme's `__ignore__`, is
255. A polygon has the pixels that its outline runs through, as in labelme. Every fifth image, by
name, tests (val.txt). All that cannot be converted is listed, and nothing is written then.
"""
import json
import math
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from check import Odd
from data import pictures, read_lines
from pictures import ENDINGS, open_picture, palette, read_image
from protocol import VOID
from run import InputError, check_file, printable, write_atomically


class Source(NamedTuple):
    classes: list           # names, background first
    pairs: list             # (image path, (W, H) of its annotation or None, (W, H) -> (H, W) ids)


def numbered(names):
    """Names -> classes, background first, and {name: id}."""
    fixed = {"background": 0, "_background_": 0, "void": VOID, "__ignore__": VOID}
    classes = ["background", *dict.fromkeys(name for name in names if name not in fixed)]
    return classes, {**{name: k for k, name in enumerate(classes)}, **fixed}


def read_json(path):
    check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


# ------------------------------------------------------------------------------ masks in colours

def coloured_masks(folder, images, names, odd):
    if images is None or names is None:
        raise InputError("coloured masks need --images, a folder, and --names, a file of colours")
    classes, ids = read_colours(Path(names))
    masks, photos = pictures(folder, odd.add), pictures(Path(images), odd.add)
    for name in sorted(set(masks) ^ set(photos)):
        odd.add(f"{name}: is a picture in {folder if name in masks else images} alone")
    return Source(classes, [(photos[name], None, lambda size, path=path: ids_of_colours(
        path, ids, odd)) for name, path in masks.items() if name in photos])


def read_colours(path):
    """A file of lines `name red green blue` -> classes, {(red, green, blue): id}."""
    names = {}
    for number, line in enumerate(read_lines(path), 1):
        name, *rgb = line.replace(",", " ").rsplit(maxsplit=3)
        if len(rgb) != 3 or not all(v.isdecimal() and int(v) < 256 for v in rgb):
            raise InputError(f"{path}, line {number}: expected `name red green blue`, 0 to 255")
        colour, name = tuple(map(int, rgb)), printable(name).strip()
        if colour in names or name in names.values():
            raise InputError(f"{path}, line {number}: {name} {colour} is there twice")
        names[colour] = name
    classes, ids = numbered(names.values())
    return classes, {colour: ids[name] for colour, name in names.items()}


def ids_of_colours(path, known, odd):
    """(H, W) uint8 ids of a mask in colours."""
    mask, *_ = open_picture(path, "mask")
    if "A" in mask.getbands() and mask.getchannel("A").getextrema()[0] < 255:
        odd.add(f"{path}: the mask is transparent in places")
    pixels = np.asarray(read_image(path)).astype(np.int64) @ [65536, 256, 1]       # (H, W)
    ids = np.full(pixels.shape, VOID, np.uint8)
    for code in np.unique(pixels).tolist():
        colour = code >> 16, code >> 8 & 255, code & 255
        if colour not in known:
            odd.add(f"{path}: the colour {colour} is unknown", f"colour {colour}")
        ids[pixels == code] = known.get(colour, VOID)
    return ids


# -------------------------------------------------------------------------------------- outlines

def points_of(values, least=3):
    """Values as a list of `least` or more points (x, y); a ValueError that says what is wrong."""
    try:
        points = [(float(x), float(y)) for x, y in values]
    except (TypeError, ValueError):
        raise ValueError("an outline is no list of points") from None
    if len(points) < least:
        raise ValueError(f"an outline has fewer than {least} points, so no area")
    if not all(abs(v) < 1e6 for point in points for v in point):            # nan is not, either
        raise ValueError("an outline leads to infinity")
    return points


def drawn(size, outlines):
    """(H, W) bool: inside any of the outlines. size: W, H"""
    mask = Image.new("1", size)
    for points in outlines:
        ImageDraw.Draw(mask).polygon(points, fill=1)
    return np.array(mask)


def layered(size, objects):
    """(H, W) ids of [(id, (H, W) bool)], later ones over earlier ones."""
    ids = np.zeros(size[::-1], np.uint8)
    for k, inside in objects:
        ids[inside] = k
    return ids


def labelme(folder, images, odd):
    """Classes are the labels of all files, in order of their names."""
    found, labels, seen = [], set(), set()
    for path in sorted(folder.rglob("*.json")):
        try:
            record = read_json(path)
            name = record["imagePath"].replace("\\", "/")
            image = Path(images) / Path(name).name if images else path.parent / name
            check_file(image)
            size = record.get("imageWidth"), record.get("imageHeight")
            shapes = [(printable(str(shape["label"])).strip(), labelme_outline(shape))
                      for shape in record["shapes"]]
        except InputError as error:
            odd.add(error)
        except ValueError as error:
            odd.add(f"{path}: {error}")
        except (LookupError, TypeError, AttributeError) as error:
            odd.add(f"{path}: not labelme's ({error!r})")
        else:
            found.append((image, size if all(size) else None, shapes))
            labels |= {label for label, _ in shapes}
            seen.add(image.resolve())
    alone = [path for path in pictures(Path(images or folder), odd.add).values()
             if path.resolve() not in seen]
    if alone:
        print(f"note: {len(alone)} pictures have no JSON and are left out: "
              f"{printable(alone[0].name)}" + ", ..." * (len(alone) > 1), file=sys.stderr)
    classes, ids = numbered(sorted(labels))
    return Source(classes, [(image, size, lambda size, shapes=shapes: layered(
        size, [(ids[label], drawn(size, [points])) for label, points in shapes]))
        for image, size, shapes in found])


def labelme_outline(shape):
    """The points around a labelme shape; a ValueError for one without area."""
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle", "circle"):
        raise ValueError(f"a shape is of kind {kind}, expected polygon, rectangle or circle")
    points = points_of(shape["points"], 3 if kind == "polygon" else 2)
    if kind == "polygon":
        return points
    (x, y), (u, v) = points[:2]
    if kind == "rectangle":
        return [(x, y), (u, y), (u, v), (x, v)]
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)    # a circle: its centre, a point of it
    r = math.hypot(u - x, v - y)
    return list(zip((x + r * np.cos(turn)).tolist(), (y + r * np.sin(turn)).tolist()))


def coco(path, images, odd):
    """Classes are in the order of the categories; small objects lie over large ones."""
    if images is None:
        raise InputError(f"{path}: COCO's needs --images, the folder of its pictures")
    record = read_json(path)
    try:
        names = {c["id"]: printable(str(c["name"])).strip() for c in record["categories"]}
        classes, ids = numbered(names.values())
        photos = {image["id"]: (Path(images) / image["file_name"],
                                (image.get("width"), image.get("height")))
                  for image in record["images"]}
        objects = {image: [] for image in photos}
        for a in record["annotations"]:
            where = f"object {a.get('id')}"
            if a["image_id"] not in photos or a["category_id"] not in names:
                odd.add(f"{where}: is of an image or a category that is not there")
            elif not a.get("segmentation"):
                odd.add(f"{where}: has no segmentation; a box alone is no mask")
            else:
                objects[a["image_id"]].append((ids[names[a["category_id"]]], a["segmentation"],
                                               where))
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not COCO's ({error!r})") from None
    for photo, _ in photos.values():
        try:
            check_file(photo)
        except InputError as error:
            odd.add(error)
    return Source(classes, [
        (photo, size if all(size) else None, lambda size, objects=objects[image]: coco_ids(
            size, objects, odd)) for image, (photo, size) in photos.items() if photo.is_file()])


def coco_ids(size, objects, odd):
    masks = []
    for k, segmentation, where in objects:
        try:
            if isinstance(segmentation, dict):
                inside = decoded(segmentation, size)
            elif any(len(p) % 2 for p in segmentation):
                raise ValueError("an outline has an odd number of coordinates")
            else:
                inside = drawn(size, [points_of(zip(p[::2], p[1::2])) for p in segmentation])
        except ValueError as error:
            odd.add(f"{where}: {error}")
        except (LookupError, TypeError) as error:
            odd.add(f"{where}: its segmentation is not COCO's ({error!r})")
        else:
            masks.append((k, inside))
    return layered(size, sorted(masks, key=lambda one: -one[1].sum()))


def decoded(rle, size):
    """COCO's run lengths, a list or its compressed text, column by column -> (H, W) bool."""
    H, W = rle["size"]
    if (W, H) != size:
        raise ValueError("its run lengths are of a picture of another size")
    counts = rle["counts"] if isinstance(rle["counts"], list) else run_lengths(rle["counts"])
    if min(counts, default=0) < 0 or sum(counts) != H * W:
        raise ValueError("its run lengths are not as many pixels as the picture has")
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(W, H).T == 1


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
    source, out, odd = Path(source), Path(out), Odd()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there and not empty; name a new folder")
    if source.suffix.lower() == ".json":
        classes, pairs = coco(source, images, odd)
    elif source.is_dir() and any(source.rglob("*.json")):
        classes, pairs = labelme(source, images, odd)
    elif source.is_dir():
        classes, pairs = coloured_masks(source, images, names, odd)
    else:
        raise InputError(f"{source}: expected a folder of coloured masks or of labelme's files, or "
                         "COCO's .json")
    stems = {}
    for image, annotated, make in pairs:                    # all of them, before any is written
        if stems.setdefault(image.stem, image) != image:
            odd.add(f"{image}: has the name of {stems[image.stem]}; give each a name of its own")
        if image.suffix.lower() not in ENDINGS:
            odd.add(f"{image}: its ending is none of {' '.join(ENDINGS)}")
            continue
        try:
            size = read_image(image).size
            if annotated not in (None, size) or make(size).shape != size[::-1]:
                odd.add(f"{image}: its annotation is for a picture of another size")
        except InputError as error:
            odd.add(error)
    odd.report()
    if odd:
        raise InputError(f"{source}: {sum(map(len, odd.values()))} things cannot be converted, see "
                         "above; nothing is written")
    if not 2 <= len(classes) <= VOID or "" in classes or len(pairs) < 2:
        raise InputError(f"{source}: {len(pairs)} pictures of {len(classes)} classes, expected 2 "
                         f"or more of 2 to {VOID} classes, background among them")
    made = out.with_name(f".{out.name}.tmp")                # --out is all there or not at all
    shutil.rmtree(made, ignore_errors=True)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (made / folder).mkdir(parents=True)
    for image, _, make in pairs:
        picture = Image.fromarray(make(read_image(image).size))
        picture.putpalette(palette().tobytes())
        shutil.copyfile(image, made / "JPEGImages" / image.name)
        write_atomically(made / "SegmentationClass" / f"{image.stem}.png",
                         lambda p: picture.save(p, "PNG"))
    val = sorted(stems)[1::5]
    lists = {"classes.txt": classes, "ImageSets/Segmentation/val.txt": val,
             "ImageSets/Segmentation/train.txt": [s for s in sorted(stems) if s not in set(val)]}
    for name, lines in lists.items():
        write_atomically(made / name, lambda p: p.write_text("\n".join(lines) + "\n",
                                                             encoding="utf-8"))
    made.replace(out)
    print(f"{len(stems) - len(val)} training and {len(val)} test pictures of {len(classes)} "
          f"classes in {out}: {', '.join(classes)}")
