"""
The study's photographs out of VOC 2012: those that results/voc20.json and voc6.json name.

    python data.py voc --data-root data
    python photographs.py data                  # makes data/voc20 and data/voc6
"""
import argparse
import json
from pathlib import Path

# first, as it sees to Ctrl-C while the others are imported
from run import InputError, Parser, plain_errors, write_atomically

import numpy as np
from PIL import Image

import data

HERE = Path(__file__).parent
VOC6_CLASSES = "background cat cow dog horse person sheep".split()


def lists_of(name):
    """{split: names of images} of voc6 or voc20."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def folder_of(root, name):
    """The folder in VOC's layout: voc6 is a `folder` data set, voc20 a VOC 2012."""
    return Path(root) if name == "voc6" else Path(root, "VOCdevkit", "VOC2012")


def make(root):
    """voc6 and voc20 out of the VOC 2012 in `root`, beside it: the listed images, short side at
    most 192. voc6 has ids 1 .. 6, voc20 VOC's own."""
    voc = folder_of(root, "voc20")
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        if not (voc / folder).is_dir():
            raise InputError(f"{root}: no VOC 2012 there ({voc / folder} is no folder); "
                             f"python data.py voc --data-root {root}")
    same = np.arange(256, dtype=np.uint8)
    six = np.array([VOC6_CLASSES.index(c) if c in VOC6_CLASSES else 0 for c in data.VOC_CLASSES]
                   + [0] * (255 - len(data.VOC_CLASSES)) + [255], np.uint8)
    for name, ids, quality in (("voc6", six, 90), ("voc20", same, 88)):
        made = folder_of(Path(root, name), name)
        for split, names in lists_of(name).items():
            theirs = "SegmentationClass" if split == "val" else "SegmentationClassAug"
            masks = "SegmentationClass" if name == "voc6" else theirs
            for folder in ("JPEGImages", masks, "ImageSets/Segmentation"):
                (made / folder).mkdir(parents=True, exist_ok=True)
            for each in names:
                image = data.read_image(voc / "JPEGImages" / f"{each}.jpg")
                mask = Image.fromarray(ids[np.array(data.read_mask(voc / theirs / f"{each}.png"))])
                scale = min(1, 192 / min(image.size))
                size = [round(side * scale) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC)
                mask = mask.resize(size, Image.Resampling.NEAREST)
                write_atomically(made / "JPEGImages" / f"{each}.jpg",
                                 lambda p: image.save(p, "JPEG", quality=quality))
                write_atomically(made / masks / f"{each}.png", lambda p: mask.save(p, "PNG"))
            (made / "ImageSets/Segmentation" / f"{split}.txt").write_text(
                "".join(f"{each}\n" for each in names))
            print(f"{len(names)} {split} images in {made}")
    (Path(root) / "voc6" / "classes.txt").write_text("".join(f"{c}\n" for c in VOC6_CLASSES))


def check(root, name):
    """The study's records are of these lists of images and these classes alone."""
    folder = folder_of(root, name)
    wanted = {folder / "classes.txt": VOC6_CLASSES} if name == "voc6" else {}
    for split, names in lists_of(name).items():
        wanted[folder / "ImageSets/Segmentation" / f"{split}.txt"] = names
    for path, words in wanted.items():
        if not path.is_file() or path.read_bytes().split() != [word.encode() for word in words]:
            raise InputError(f"{root}: not the study's {name}, {path} differs; photographs.py "
                             "makes it")


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", help="the folder with VOCdevkit/VOC2012")
    return parser.parse_args(argv)


def main(argv=None):
    make(parse(argv).data_root)


if __name__ == "__main__":
    with plain_errors("photographs.py"):
        main()
