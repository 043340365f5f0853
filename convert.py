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
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from check import Odd
from data import pictures, read_lines
from pictures import ENDINGS, open_picture, palette, read_image
from protocol import VOID
from run import InputError, check_file, printable


class Source(NamedTuple):
    classes: list           # names, background first
    pairs: list             # (image path, (W, H) of its annotation or None, (W, H) -> (H, W) ids)


def numbered(names):
    """Names -> classes, background first, and {name: id}."""
    fixed = {"background": 0, "_background_": 0, "void": VOID, "__ignore__": VOID}
    classes = ["background", *dict.fromkeys(n for n in names if n.casefold() not in fixed)]
    if len(classes) > VOID:
        raise InputError(f"{len(classes)} classes, at most {VOID} fit into a mask of 8 bits")
    return classes, {name: fixed[name.casefold()] if name.casefold() in fixed
                     else classes.index(name) for name in names}


def note(what, names):
    if names:
        print(f"note: {len(names)} {what}: {printable(str(names[0]))}" + ", ..." * (len(names) > 1),
              file=sys.stderr)


def photographs(folder):
    return sorted(path for path in Path(folder).rglob("*")
                  if path.suffix.lower() in ENDINGS and not path.name.startswith("."))


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
    if open_picture(path, "mask")[0].convert("RGBA").getchannel("A").getextrema()[0] < 255:
        odd.add(f"{path}: the mask is transparent in places")
    pixels = np.asarray(read_image(path)).astype(np.int64) @ [65536, 256, 1]       # (H, W)
    codes, which = np.unique(pixels, return_inverse=True)
    colours = [(code >> 16, code >> 8 & 255, code & 255) for code in codes.tolist()]
    unknown = [colour for colour in colours if colour not in known]
    if len(unknown) > 8:
        odd.add(f"{path}: {len(unknown)} colours are unknown; is it a photograph, or a JPEG, which "
                "changes colours?", "colours")
    else:
        for colour in unknown:
            odd.add(f"{path}: the colour {colour} is unknown", f"colour {colour}")
    ids = np.array([known.get(colour, VOID) for colour in colours], np.uint8)
    return ids[which].reshape(pixels.shape)


# -------------------------------------------------------------------------------------- outlines

def points_of(values, least=3):
    """Values as a list of `least` or more points (x, y); a ValueError that says what is wrong."""
    try:
        points = [(float(x), float(y)) for x, y in values]
    except (TypeError, ValueError, OverflowError):
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


def annotated_size(record, *keys):
    """(W, H) of the picture that was annotated, None if the record does not say it."""
    try:
        return tuple(int(record[key]) for key in keys)
    except (LookupError, TypeError, ValueError):
        return None


def layered(size, objects, odd):
    """(H, W) ids of [(id, function that makes its (H, W) bool, where it is from)], later ones over
    earlier ones."""
    ids = np.zeros(size[::-1], np.uint8)
    for k, make, where in objects:
        inside = make(size)
        if not inside.any():
            odd.add(f"{where}: an object has no pixel inside its picture")
        ids[inside] = k
    return ids


def labelme(folder, images, odd):
    """Classes are the labels of all files, in order of their names."""
    found, labels, seen = [], set(), set()
    for path in sorted(folder.rglob("*.json")):
        shapes = []
        try:
            record = read_json(path)
            name = record["imagePath"].replace("\\", "/")
            image = Path(images) / Path(name).name if images else path.parent / name
            seen.add(image.resolve())
            check_file(image)
            for shape in record["shapes"]:
                try:
                    label = printable(str(shape["label"] or "")).strip()
                    shapes.append((label, labelme_outline(shape, label), path))
                except ValueError as error:
                    odd.add(f"{path}: {error}")
        except InputError as error:
            odd.add(error)
        except (LookupError, TypeError, AttributeError) as error:
            odd.add(f"{path}: not labelme's ({error!r})")
        else:
            found.append((image, annotated_size(record, "imageWidth", "imageHeight"), shapes))
            labels |= {label for label, *_ in shapes}
    note("pictures have no JSON and are left out",
         [path for path in photographs(images or folder) if path.resolve() not in seen])
    classes, ids = numbered(sorted(labels))
    return Source(classes, [(image, size, lambda size, shapes=shapes: layered(
        size, [(ids[label], lambda size, points=points: drawn(size, [points]), path)
               for label, points, path in shapes], odd)) for image, size, shapes in found])


def labelme_outline(shape, label):
    """The points around a labelme shape; a ValueError for one without area or label."""
    kind = shape.get("shape_type") or "polygon"
    if not label:
        raise ValueError("a shape has no label")
    if kind not in ("polygon", "rectangle", "circle"):
        raise ValueError(f"a shape is of kind {kind}, expected polygon, rectangle or circle")
    points = points_of(shape["points"], 3 if kind == "polygon" else 2)
    if kind == "polygon":
        return points
    if kind == "rectangle":                                 # two of its corners, or four
        (x, u), (y, v) = ((min(of), max(of)) for of in zip(*points))
        return [(x, y), (u, y), (u, v), (x, v)]
    (x, y), (u, v) = points[:2]
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)    # a circle: its centre, a point of it
    r = math.hypot(u - x, v - y)
    return list(zip((x + r * np.cos(turn)).tolist(), (y + r * np.sin(turn)).tolist()))


def coco(path, images, odd):
    """Classes are in the order of the categories; small objects lie over large ones."""
    if images is None:
        raise InputError(f"{path}: COCO's needs --images, the folder of its pictures")
    record = read_json(path)
    try:
        for what in ("categories", "images"):
            for k, times in Counter(one["id"] for one in record[what]).items():
                if times > 1:
                    odd.add(f"{k}: an id that is there twice among the {what}")
        names = {c["id"]: printable(str(c["name"] or "")).strip() for c in record["categories"]}
        classes, ids = numbered([*names.values()])
        photos = {image["id"]: (Path(images) / image["file_name"],
                                annotated_size(image, "width", "height"))
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
    seen = {photo.resolve() for photo, _ in photos.values()}
    note("pictures are not in the JSON and are left out",
         [path for path in photographs(images) if path.resolve() not in seen])
    note("pictures have no object, their masks are background alone",
         [photo for image, (photo, _) in photos.items() if not objects[image]])
    return Source(classes, [
        (photo, size, lambda size, objects=objects[image]: coco_ids(size, objects, odd))
        for image, (photo, size) in photos.items() if photo.is_file()])


def coco_ids(size, objects, odd):
    areas = []
    for k, segmentation, where in objects:
        make = lambda size, segmentation=segmentation: coco_mask(size, segmentation)
        try:
            areas.append((-int(make(size).sum()), k, make, where))
        except ValueError as error:
            odd.add(f"{where}: {error}")
        except (LookupError, TypeError) as error:
            odd.add(f"{where}: its segmentation is not COCO's ({error!r})")
    areas.sort(key=lambda one: one[0])
    return layered(size, [one[1:] for one in areas], odd)


def coco_mask(size, segmentation):
    if isinstance(segmentation, dict):
        return decoded(segmentation, size)
    if any(len(p) % 2 for p in segmentation):
        raise ValueError("an outline has an odd number of coordinates")
    return drawn(size, [points_of(zip(p[::2], p[1::2])) for p in segmentation])


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
    source, out, odd = Path(source), Path(out).resolve(), Odd()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there and not empty; name a new folder")
    if source.suffix.lower() == ".json" and names is None:
        classes, pairs = coco(source, images, odd)
    elif source.is_dir() and any(source.rglob("*.json")) and names is None:
        classes, pairs = labelme(source, images, odd)
    elif source.is_dir():
        classes, pairs = coloured_masks(source, images, names, odd)
    else:
        raise InputError(f"{source}: expected a folder of coloured masks or of labelme's files, or "
                         "COCO's .json; --names is for coloured masks")
    made = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # --out is all there or not at all
    try:
        stems = write_pairs(made, pairs, odd)
        odd.report()
        if odd:
            raise InputError(f"{source}: {odd.count()} cannot be converted, see above; nothing is "
                             "written")
        if len(classes) < 2 or "" in classes or len(stems) < 2:
            raise InputError(f"{source}: {len(stems)} pictures of {len(classes)} classes, expected "
                             "2 or more of 2 or more classes, background among them, with names")
        val = stems[1::5]
        lists = {"classes.txt": classes, "ImageSets/Segmentation/val.txt": val,
                 "ImageSets/Segmentation/train.txt": [s for s in stems if s not in set(val)]}
        for name, lines in lists.items():
            (made / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    print(f"{len(stems)} pictures of {len(classes)} classes, each fifth for testing, in {out}: "
          + ", ".join(classes))


def write_pairs(made, pairs, odd):
    """Copy the images and write their masks; the images' names, sorted."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (made / folder).mkdir(parents=True)
    stems = set()
    for image, annotated, make in pairs:
        if image.stem in stems:
            odd.add(f"{image}: is annotated twice, or has the name of another picture")
        stems.add(image.stem)
        if image.stem != image.stem.strip() or image.name.startswith("."):
            odd.add(f"{image}: begins or ends with a blank or a dot; rename it")
        if image.suffix.lower() not in ENDINGS:
            odd.add(f"{image}: its ending is none of {' '.join(ENDINGS)}")
            continue
        try:
            size = read_image(image).size
            ids = make(size)
        except InputError as error:
            odd.add(error)
            continue
        if annotated not in (None, size) or ids.shape != size[::-1]:
            odd.add(f"{image}: its annotation is for a picture of another size")
        mask = Image.fromarray(ids)
        mask.putpalette(palette().tobytes())
        mask.save(made / "SegmentationClass" / f"{image.stem}.png")
        shutil.copyfile(image, made / "JPEGImages" / image.name)
    return sorted(stems)
