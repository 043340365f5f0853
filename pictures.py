"""
Other people's pictures: what is read as an image, what as a mask of class ids, and what is refused.

A picture that is read as something else is the worst error there is here: nothing fails and all
numbers are wrong. So a mask is refused unless it surely holds the ids that it shows.

    image   any picture of 8-bit channels, as a viewer shows it: EXIF orientation applied
    mask    one lossless channel of at most 8 bits, or three equal ones; the ids are the numbers
            that the file stores, also in 1, 2 or 4 bits; a palette may not contradict them
"""
import functools
import warnings

import numpy as np
from PIL import Image, ImageOps

from protocol import VOID
from run import InputError, check_file

warnings.filterwarnings("ignore", module="PIL")         # odd metadata, very large pictures
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LOSSLESS = ("PNG", "BMP", "TIFF")
STORED = ("L", "P", "1", "RGB", "L;2", "L;4", "P;1", "P;2", "P;4", "BGR")      # Pillow's raw modes
FEW_BITS = {"L;2": 85, "L;4": 17}                       # Pillow stretches such grey to 0 .. 255


def open_picture(path, what, eighth=False, verify=False):
    """The picture, decoded, its size, how its file stores a pixel, and whether it lies on a side.

    eighth: decode a JPEG at an eighth of its size, which reads every byte of it in less time
    verify: check a PNG's checksums, which decoding passes over
    """
    check_file(path)
    try:
        picture = Image.open(path)
        if verify and picture.format == "PNG":
            picture.verify()
            picture = Image.open(path)
        size, stored = picture.size, picture.tile[0].args if picture.tile else None
        if eighth:
            picture.draft(None, (1, 1))
        picture.load()
        turn = picture.getexif().get(0x0112, 1)         # EXIF orientation: 1 is upright
    except Exception as error:                          # Pillow's decoders raise anything
        advice = "; save it without its metadata" * ("MAX_TEXT_CHUNK" in str(error))
        raise InputError(f"{path}: not a readable {what} ({error}{advice})") from None
    if picture.mode.startswith(("I", "F")):
        raise InputError(f"{path}: the {what} has more than 8 bits a channel; save it with 8")
    return picture, size, stored if isinstance(stored, str) else (stored or [None])[0], turn


def upright(picture, turn, path):
    if turn not in range(2, 9):
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:
        raise InputError(f"{path}: its EXIF block is damaged ({error}); save it without") from None


def read_image(path):
    """The picture as RGB, turned as a viewer shows it. Raises InputError that names it."""
    image, _, _, turn = open_picture(path, "image")
    return upright(image, turn, path).convert("RGB")


def image_size(path):
    """(W, H) of read_image(path), after decoding it: a damaged picture is an InputError."""
    _, (W, H), _, turn = open_picture(path, "image", eighth=True, verify=True)
    return (H, W) if turn in (5, 6, 7, 8) else (W, H)


def read_mask(path, num_classes=VOID - 1, verify=False):
    """The mask as a PIL picture of ids, mode P or L. Raises InputError that names what is wrong."""
    mask, _, stored, turn = open_picture(path, "mask", verify=verify)
    kind = mask.format
    if kind not in LOSSLESS or "jpeg" in str(mask.info.get("compression")):
        raise InputError(f"{path}: a mask must be lossless, this is {kind}, which changes ids; "
                         "save it as PNG from its source")
    if mask.mode == "RGB":
        red, green, blue = (np.asarray(channel) for channel in mask.split())
        if (red == green).all() and (red == blue).all():
            mask = mask.getchannel(0)
    if mask.mode == "1":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint8))
    if stored in FEW_BITS and mask.mode == "L":
        mask = mask.point([v // FEW_BITS[stored] for v in range(256)])
    if mask.mode not in ("P", "L") or stored not in STORED:
        raise InputError(f"{path}: the mask has mode {mask.mode}, expected one 8-bit channel of "
                         "class ids (P or L)")
    if mask.mode == "P":
        check_palette(mask, path, num_classes)
    return upright(mask, turn, path)


def check_palette(mask, path, num_classes):
    """An index with the colour of another id: an optimiser or editor has renumbered the palette."""
    valid, own = [*range(num_classes + 1), VOID], mask.getpalette("RGB") or []
    if own == Image.new("RGB", (1, 1)).convert("P").getpalette():
        raise InputError(f"{path}: has Pillow's palette for coloured pictures, so its numbers are "
                         "colours and no ids; save the ids themselves as 8-bit grey")
    for index in (i for i, count in enumerate(mask.histogram()) if count):
        colour = own[3 * index:3 * index + 3]
        if colour in ([index] * 3, palette()[index].tolist()):
            continue
        for kind, known in (("VOC's colour", palette()[valid].tolist()),
                            ("the grey", [[i] * 3 for i in valid])):
            if colour in known:
                raise InputError(
                    f"{path}: index {index} has {kind} of id {valid[known.index(colour)]}, "
                    f"{tuple(colour)}, so a program has renumbered its palette; save the ids as "
                    "8-bit grey, without optimising")


@functools.cache
def palette():
    """VOC's colour map, (256, 3) uint8: bit 7 - j of R, G, B is the id's bit 3j, 3j + 1, 3j + 2."""
    ids = np.arange(256)
    bits = sum(((ids[:, None] >> (3 * j + np.arange(3))) & 1) << (7 - j) for j in range(3))
    return bits.astype(np.uint8)
