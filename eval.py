"""
Scores of class-incremental segmentation, and predictions for any picture.

    python eval.py runs/shapes-15-1-disjoint                                  # score a run again
    python eval.py runs/shapes-15-1-disjoint --predict a.jpg b/ --out d       # palette masks and overlays

    IoU_c = TP_c / (TP_c + FP_c + FN_c), from one confusion matrix over all pixels of the test set

"old" is the classes of step 0, "new" those of every later step, "all" both. The paper's tables mix
three conventions for the background, so all three are printed; the first is MiB's and the headline.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks, make_grid, save_image

import data
from data import InputError, write_atomically
from distill import upsample
from model import load_model

# mIoU of HRHF (old, new, all) in the paper's Tables 1 and 7. Table 7 gives groups of classes:
# "new" is the mean of the groups after the first.
PAPER = {
    ("voc", "19-1", "disjoint"): (76.8, 56.3, 75.8), ("voc", "19-1", "overlapped"): (76.6, 57.3, 75.7),
    ("voc", "15-5", "disjoint"): (76.2, 49.2, 69.5), ("voc", "15-5", "overlapped"): (78.9, 57.8, 73.9),
    ("voc", "15-1", "disjoint"): (72.6, 32.2, 62.5), ("voc", "15-1", "overlapped"): (72.4, 39.6, 64.6),
    ("ade", "100-50", "disjoint"): (39.8, 28.0, 35.8),
    ("ade", "100-10", "disjoint"): (37.0, (14.2 + 19.5 + 19.4 + 14.8 + 15.3) / 5, 30.2),
    ("ade", "50-50", "disjoint"): (42.5, (28.3 + 25.3) / 2, 33.3),
}
CONVENTIONS = {                                             # label -> background in old, background in all
    "background excluded": (False, False),
    "background in old": (True, True),
    "background in all, not in old": (False, True),
}


def confusion_matrix(prediction, target, num_classes):
    """(num_classes, num_classes) int64 pixel counts, rows the ground truth, columns the prediction.

    prediction, target: integer tensors of one shape. Targets outside 0 .. num_classes - 1 (255) are
    left out.
    """
    target, prediction = target.flatten().long(), prediction.flatten().long()
    inside = (target >= 0) & (target < num_classes)
    pairs = torch.where(inside, target * num_classes + prediction, num_classes ** 2)   # the last bin: left out
    return torch.bincount(pairs, minlength=num_classes ** 2 + 1)[:-1].view(num_classes, num_classes)


def iou(confusion):
    """(n,) IoU per class in 0 .. 1; nan for a class in neither prediction nor ground truth."""
    tp = confusion.diag().double()
    return tp / (confusion.sum(0) + confusion.sum(1) - tp)


def summarize(confusion, steps):
    """Mean IoU of groups of classes: {convention: {"old", "new", "all", "per_step": [...]}}.

    confusion: (n, n), channels in the order of learning, background first; n may stop at any step.
    steps:     class ids per step; only their number matters here.
    A class with no pixel in the ground truth is left out of every mean, as in MiB (so ADE's "other",
    which is never scored, drops out too); a mean over nothing is nan.
    """
    per_class = torch.where(confusion.sum(1) > 0, iou(confusion), torch.nan)
    bounds = np.cumsum([1] + [len(classes) for classes in steps]).tolist()
    bounds = [min(b, len(per_class)) for b in bounds]
    mean = lambda *parts: torch.cat(parts).nanmean().item()
    background, foreground = per_class[:1], per_class[1:]
    old, new = per_class[1:bounds[1]], per_class[bounds[1]:]
    none = per_class[:0]
    return {name: {"old": mean(background if in_old else none, old), "new": mean(new),
                   "all": mean(background if in_all else none, foreground),
                   "per_step": [mean(background if in_old and a == 1 else none, per_class[a:b])
                                for a, b in zip(bounds, bounds[1:]) if a < len(per_class)]}
            for name, (in_old, in_all) in CONVENTIONS.items()}


def table(summary, paper=None):
    """A Markdown table of one summary in percent, with the paper's row if there is one.

    The paper's 15-5 and 15-1 overlapped rows have the background in old, its others have it excluded.
    """
    percent = lambda v: "-" if v != v else f"{100 * v:.1f}"
    rows = ["| mIoU (%) | old | new | all |", "|---|---|---|---|"]
    rows += [f"| {name} | " + " | ".join(percent(s[k]) for k in ("old", "new", "all")) + " |"
             for name, s in summary.items()]
    if paper:
        rows.append("| paper, HRHF | " + " | ".join(f"{v:.1f}" for v in paper) + " |")
    return "\n".join(rows)


def test_view(dataset, labels, steps, step, crop, name):
    """The test images of a step: those that show a class learned so far, with the seen classes as targets."""
    seen = [c for classes in steps[:step + 1] for c in classes]
    return data.View(dataset, data.split_indices(labels, [seen], 0, "overlapped"),
                     data.label_map(steps, step, "test", score_background=name != "ade"), data.test_transform(crop))


@torch.inference_mode()
def evaluate(model, view, device, workers=0, rank=0, world=1, amp=False, batch_size=8):
    """Confusion matrix of a model over a View. Every rank takes [rank::world], all get the sum.

    A plain model, not its DDP wrapper: ranks may hold different numbers of batches. The batch size
    does not follow the run's, and cuDNN may not choose by timing, so that a score comes out the same
    on any number of ranks.
    """
    model.eval()
    n = sum(model.classes_per_step)
    total = torch.zeros(n, n, dtype=torch.int64, device=device)
    keys = [(i, 0) for i in range(len(view.indices))][rank::world]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    for images, targets in DataLoader(view, batch_sampler=batches, num_workers=workers,
                                      pin_memory=device.type == "cuda"):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast(device, amp), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            logits = model(images)
        total += confusion_matrix(upsample(logits, targets).argmax(1), targets, n)
    if world > 1:
        dist.all_reduce(total)
    return total.cpu()


def autocast(device, enabled):
    """torch.amp for this device: bfloat16 where it has it (the CPU does), else float16."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16 if bf16 else torch.float16, enabled=enabled)


@torch.inference_mode()
def predict(model, image, crop):
    """PIL image -> (H, W) uint8 channel ids at the image's own size; the short side is scaled to `crop`."""
    device = next(model.parameters()).device
    x = v2.Compose([v2.ToImage(), v2.Resize(crop), *data.normalise()])(image).unsqueeze(0).to(device)
    labels = torch.empty(1, *image.size[::-1])
    return upsample(model.eval()(x), labels).argmax(1)[0].to(torch.uint8).cpu()


def save_mask(mask, path):
    """Write ids (H, W) as a palette PNG in VOC's colours."""
    picture = Image.fromarray(mask.numpy())
    picture.putpalette(data.palette().tobytes())
    write_atomically(path, lambda p: picture.save(p, "PNG"))


def colour(mask):
    """ids (..., H, W) -> RGB (..., 3, H, W) uint8, void (255) in VOC's cream white."""
    return torch.from_numpy(data.palette())[mask.long()].movedim(-1, -3)


def save_grid(pictures, columns, path):
    """Write equally large uint8 pictures (3, H, W) as one PNG, `columns` a row."""
    grid = make_grid(torch.stack(pictures), nrow=columns, padding=2, pad_value=255)
    write_atomically(path, lambda p: save_image(grid / 255, p, format="png"))


def save_predictions(model, view, path, device, count=8):
    """Figure 4: image, ground truth, prediction for `count` test images spread over the set."""
    positions = np.linspace(0, len(view.indices) - 1, min(count, len(view.indices))).astype(int).tolist()
    pictures = []
    for position in positions:
        image, target = view[position, 0]
        with torch.inference_mode():
            logits = model.eval()(image[None].to(device))
        prediction = upsample(logits, target[None]).argmax(1)[0].cpu()
        pictures += [data.denormalise(image), colour(target), colour(prediction)]
    if pictures:
        save_grid(pictures, 3, path)


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Score a run again, or segment pictures with its last model.")
    parser.add_argument("run", help="run folder that train.py wrote")
    parser.add_argument("--predict", nargs="+", metavar="PATH", help="segment these images and folders instead")
    parser.add_argument("--out", default="predictions", help="folder for --predict's PNGs")
    parser.add_argument("--data-root", help="where the data is now, if it was moved since the run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    run = Path(args.run)
    settings = argparse.Namespace(**data.read_json(run / "settings.json", {"dataset": str, "task": str, "crop": int}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    if args.predict:
        checkpoints = sorted(run.glob("step-[0-9]*.pth"), key=lambda p: int(p.stem.split("-")[1]))
        if not checkpoints:
            raise InputError(f"{run}: no finished step to predict with yet")
        model, about = load_model(checkpoints[-1], device)
        paths = []
        for path in map(Path, args.predict):
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")] \
                if path.is_dir() else [path]
            if not inside:
                raise InputError(f"--predict {path}: no .jpg, .jpeg or .png in this folder")
            paths += inside
        stems = [path.stem for path in paths]
        if twice := next((s for s in stems if stems.count(s) > 1), None):
            raise InputError(f"--predict: two pictures are called {twice}; predict them into two --out folders")
        if clash := next((p for p in paths if p.resolve().parent == Path(args.out).resolve()), None):
            raise InputError(f"--out {args.out}: holds {clash.name}, one of the pictures; choose another folder")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            image = ImageOps.exif_transpose(data.read_image(path))              # as a viewer shows a phone's photo
            mask = predict(model, image, about["crop"])
            save_mask(mask, out / f"{path.stem}-mask.png")
            pixels = v2.functional.pil_to_tensor(image)
            seen = [k for k in mask.unique().tolist() if k]
            if seen:
                pixels = draw_segmentation_masks(pixels, torch.stack([mask == k for k in seen]), alpha=0.6,
                                                 colors=[tuple(data.palette()[k].tolist()) for k in seen])
            overlay = v2.functional.to_pil_image(pixels)
            write_atomically(out / f"{path.stem}-overlay.png", lambda p: overlay.save(p, "PNG"))
            print(f"{path}: {', '.join(about['classes'][k] for k in seen) or 'background only'}")
        return

    results = data.read_json(run / "results.json", {"steps": list})
    dataset = data.load(settings.dataset, args.data_root or settings.data_root, "val")
    labels = dataset.labels()
    steps = data.task_steps(settings.task, len(dataset.classes) - 1)
    same = True
    for step, recorded in enumerate(results["steps"]):
        model, _ = load_model(run / f"step-{step}.pth", device)
        view = test_view(dataset, labels, steps, step, settings.crop, settings.dataset)
        confusion = evaluate(model, view, device, data.default_workers(), amp=settings.amp)
        same_step = confusion.tolist() == recorded["confusion"]
        same = same and same_step
        print(f"step {step}: {'exactly as recorded' if same_step else 'differs from results.json'}")
    print(table(summarize(confusion, steps), PAPER.get((settings.dataset, settings.task, settings.setting))))
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    with data.plain_errors("eval.py"):
        main()
