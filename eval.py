"""
Scores of class-incremental segmentation, and predictions for any picture.

    python eval.py runs/shapes-15-1-disjoint                                  # score a run again
    python eval.py runs/shapes-15-1-disjoint --predict a.jpg b/ --out d       # palette masks and overlays
    python eval.py --compare runs/*                                           # methods side by side

    IoU_c = TP_c / (TP_c + FP_c + FN_c), from one confusion matrix over all pixels of the test set

"old" is the classes of step 0, "new" those of every later step, "all" both. The paper's tables mix
three conventions for the background, so all three are printed; the first is MiB's and the headline.
"""
import argparse
import math
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
from baselines import METHODS
from chunked import upsample
from data import InputError, write_atomically
from model import load_model

FOUND = 0.01                                                # of an image's pixels; fewer are no object

# mIoU (old, new, all) of the paper's Tables 1 and 7, as printed there. In 19-1 disjoint its Joint row
# has a new mIoU of 48.0, which does not fit its own mean: read 78.0.
PAPER_ROWS = """
voc    19-1 disjoint    19-1 overlapped  15-5 disjoint    15-5 overlapped  15-1 disjoint    15-1 overlapped
ft     5.8 12.3 6.2     6.8 12.9 7.1     1.1 33.6 9.2     2.1 33.1 9.8     0.2 1.8 0.6      0.2 1.8 0.6
pi     5.4 14.1 5.9     7.5 14.0 7.8     1.3 34.1 9.5     1.6 33.3 9.5     0.0 1.8 0.4      0.0 1.8 0.5
ewc    23.2 16.0 22.9   26.9 14.0 26.3   26.7 37.7 29.4   24.3 33.5 27.1   0.3 4.3 1.3      0.3 4.3 1.3
rw     19.4 15.7 19.2   23.3 14.2 22.9   17.9 36.9 22.7   16.6 34.9 21.2   0.2 5.4 1.5      0.0 5.2 1.3
lwf    53.0 9.1 50.8    51.2 8.5 49.1    58.4 37.4 53.1   58.9 36.6 53.3   0.8 3.6 1.5      1.0 3.9 1.8
lwf-mc 63.0 13.2 60.5   64.4 13.3 61.9   67.2 41.2 60.7   58.1 35.0 52.3   4.5 7.0 5.2      6.4 8.4 6.9
ilt    69.1 16.4 66.4   67.1 12.3 64.4   63.2 39.5 57.3   66.3 40.6 59.9   3.7 5.7 4.2      4.9 7.8 5.7
mib    69.6 25.6 67.4   70.2 22.1 67.8   71.8 43.3 64.7   75.5 49.4 69.0   46.2 12.9 37.9   35.1 13.5 29.7
hrhf   76.8 56.3 75.8   76.6 57.3 75.7   76.2 49.2 69.5   78.9 57.8 73.9   72.6 32.2 62.5   72.4 39.6 64.6
joint  77.4 48.0 77.4   77.4 78.0 77.4   79.1 72.6 77.4   79.1 72.6 77.4   79.1 72.6 77.4   79.1 72.6 77.4

ade    100-50 disjoint
ft     0.0 24.9 8.3
lwf    21.1 25.6 22.6
lwf-mc 34.2 10.5 26.3
ilt    22.9 18.9 21.6
mib    37.9 27.9 34.6
hrhf   39.8 28.0 35.8
joint  44.3 28.2 38.9
"""
# Table 7's other tasks list a column for every step: "new" is the mean of the columns after the first.
PAPER_GROUPS = """
ade    100-10 disjoint                     50-50 disjoint
ft     0.0 0.0 0.0 0.0 0.0 16.6 1.1        0.0 0.0 22.0 7.3
lwf    0.1 0.0 0.4 2.6 4.6 16.9 1.7        5.7 12.9 22.8 13.9
lwf-mc 18.7 2.5 8.7 4.1 6.5 5.1 14.3       27.8 7.0 10.4 15.1
ilt    0.3 0.0 1.0 2.1 4.6 10.7 1.4        8.4 9.7 14.3 10.8
mib    31.8 10.4 14.8 12.8 13.6 18.7 25.9  35.5 22.2 23.6 27.0
hrhf   37.0 14.2 19.5 19.4 14.8 15.3 30.2  42.5 28.3 25.3 33.3
joint  44.3 26.1 42.8 26.7 28.1 17.3 38.9  51.1 38.3 28.2 38.9
"""


def paper_results():
    """(data set, task, setting) -> method -> (old, new, all), in percent."""
    results = {}
    for block in (PAPER_ROWS + PAPER_GROUPS).strip().split("\n\n"):
        (dataset, *head), *rows = (line.split() for line in block.strip().splitlines())
        columns = list(zip(head[::2], head[1::2]))
        for method, *numbers in rows:
            numbers, start = [float(v) for v in numbers], 0
            for task, setting in columns:
                width = {"100-10": 7, "50-50": 4}.get(task, 3)
                old, *new, all_classes = numbers[start:start + width]
                results.setdefault((dataset, task, setting), {})[method] = (old, sum(new) / len(new), all_classes)
                start += width
    return results


PAPER = paper_results()
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


def table(summary, method, paper=None):
    """A Markdown table of one summary in percent, with the paper's row if there is one.

    HRHF's own 15-5 and 15-1 overlapped rows have the background in old; the paper's others have it excluded.
    """
    percent = lambda v: "-" if v != v else f"{100 * v:.1f}"
    rows = ["| mIoU (%) | old | new | all |", "|---|---|---|---|"]
    rows += [f"| {name} | " + " | ".join(percent(s[k]) for k in ("old", "new", "all")) + " |"
             for name, s in summary.items()]
    if paper:
        rows.append(f"| paper, {method} | " + " | ".join(f"{v:.1f}" for v in paper) + " |")
    return "\n".join(rows)


def compare(runs, csv_path):
    """Print a Markdown table, a row per method and a column per setting, the paper's numbers in brackets.

    old / new / all in percent, background excluded. A run off its method's defaults is named by its flags
    and stands without the paper's numbers. The same goes to csv_path, a line per run and number.
    """
    cells, lines = {}, ["run,method,dataset,task,setting,seed,group,mIoU,paper"]
    for run in runs:
        if not (Path(run) / "results.json").exists():
            print(f"note: {run} has no results.json, it is left out", file=sys.stderr)
            continue
        results = data.read_json(Path(run) / "results.json", {"final": dict, "settings": dict})
        s, score = results["settings"], results["final"]["background excluded"]
        column, method = (s["dataset"], s["task"], s["setting"]), METHODS[s["method"]]
        usual = {"lam": method.lam, "init": method.init, "fake": "seginversion" if method.fakes else "none",
                 "r": "random", "real_fake": "1:1", "void": "background", "keep_fakes": False,
                 "retry_fakes": False, "spectrum": 1.0}
        flags = [f"--{k.replace('_', '-')}" + (f" {s[k]}" if s[k] is not True else "")
                 for k in usual if s.get(k, usual[k]) != usual[k]]
        label = " ".join([s["method"], *flags])
        paper = None if flags else PAPER.get(column, {}).get(label)
        ours = [math.nan if score[k] is None else 100 * score[k] for k in ("old", "new", "all")]
        text = " / ".join(f"{v:.1f}" for v in ours) + (f" ({' / '.join(f'{v:.1f}' for v in paper)})" if paper else "")
        cells.setdefault(label, {}).setdefault(column, []).append(text)
        lines += [f"{run},{label},{','.join(column)},{s['seed']},{group},{v:.2f},{f'{p:.1f}' if paper else ''}"
                  for group, v, p in zip(("old", "new", "all"), ours, paper or ours)]
    columns = list(dict.fromkeys(c for row in cells.values() for c in row))
    print("| mIoU (%), old / new / all (paper) | " + " | ".join(" ".join(c) for c in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for method, row in cells.items():
        print(f"| {method} | " + " | ".join("; ".join(row.get(c, ["-"])) for c in columns) + " |")
    write_atomically(csv_path, lambda p: p.write_text("\n".join(lines) + "\n"))


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


@torch.inference_mode()
def judge_fakes(folder, teacher, dataset, judge=None):
    """How good the fakes in a folder are, class by class: a dict of numbers for each old class's name.

    folder:  of synthesize(); teacher: (model, its class names), the network that was inverted
    dataset: the real training images, for the size of the objects
    judge:   (model, class names) of a network that had no part in the synthesis, trained on real data
    images   fakes that were asked to show the class
    found    share of those in which the teacher gives it more than 1 % of the pixels
    sure     the teacher's mean probability of the class on the pixels it gives it
    size     share of pixels the class has in those where it was found, and in the real images that show it
    judge    the same share as found, by the judge; and its IoU with the teacher's map over all fakes asked (0 if
             neither finds it)
    """
    names, sums = teacher[1], {}
    for path, classes in data.read_fakes(folder):
        x = data.read_image(path)
        for transform in (v2.ToImage(), *data.normalise()):
            x = transform(x)
        x = x.as_subclass(torch.Tensor)[None].to(next(teacher[0].parameters()).device)
        p = upsample(teacher[0](x), x).softmax(1)[0]                                        # (C_old, H, W)
        theirs = upsample(judge[0](x), x).argmax(1)[0] if judge else None
        for c in classes:
            s = sums.setdefault(names[c], dict.fromkeys(
                ("images", "found", "sure", "size", "judge found", "both", "either"), 0))
            mine = p.argmax(0) == c
            share = mine.float().mean().item()
            s["images"] += 1
            s["found"] += share > FOUND
            s["sure"] += p[c][mine].mean().item() if share > FOUND else 0
            s["size"] += share if share > FOUND else 0
            if judge:
                other = theirs == judge[1].index(names[c])
                s["judge found"] += other.float().mean().item() > FOUND
                s["both"] += (mine & other).sum().item()
                s["either"] += (mine | other).sum().item()
    labels, scores = dataset.labels(), {}
    for name, s in sums.items():
        c, found = dataset.classes.index(name), max(1, s["found"])
        real = [np.mean(np.array(dataset.read(i)[1]) == c) for i in range(len(labels)) if c in labels[i]]
        scores[name] = {"images": s["images"], "found": s["found"] / s["images"], "sure": s["sure"] / found,
                        "size": s["size"] / found, "real size": float(np.mean(real)) if real else math.nan}
        if judge:
            scores[name] |= {"judge found": s["judge found"] / s["images"],
                             "judge IoU": s["both"] / max(1, s["either"])}
    return scores


def print_fakes(scores):
    """judge_fakes' numbers as a Markdown table, shares in percent, with the mean over the classes."""
    columns = list(next(iter(scores.values())))
    print(f"| class | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    mean = {c: float(np.mean([s[c] for s in scores.values()])) for c in columns}
    for name, s in {**scores, "mean": mean}.items():
        print(f"| {name} | {s['images']:.0f} | " + " | ".join(f"{100 * s[c]:.1f}" for c in columns[1:]) + " |")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Score a run again, segment pictures with its last model, or judge its fakes.")
    parser.add_argument("run", nargs="?", help="run folder that train.py wrote")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="print one table of these runs, and write compare.csv")
    parser.add_argument("--fakes", type=int, metavar="STEP", help="judge the fakes that this step of the run was given")
    parser.add_argument("--judge", metavar="CHECKPOINT",
                        help="--fakes: of another network, not used in their synthesis")
    parser.add_argument("--predict", nargs="+", metavar="PATH", help="segment these images and folders instead")
    parser.add_argument("--out", default="predictions", help="folder for --predict's PNGs")
    parser.add_argument("--data-root", help="where the data is now, if it was moved since the run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return compare(args.compare, Path("compare.csv"))
    if not args.run:
        raise InputError("name a run folder, or --compare several")
    if args.judge and args.fakes is None:
        raise InputError("--judge: judges --fakes; add --fakes and the step that was given them")
    if args.predict and args.fakes is not None:
        raise InputError("--predict and --fakes: one at a time")
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

    if args.fakes is not None:
        folder = run / f"fakes-step-{args.fakes}"
        if not (folder / "manifest.jsonl").exists():
            raise InputError(f"--fakes {args.fakes}: {folder} holds no finished set of fakes")
        networks = [(model, about["classes"]) for path in (run / f"step-{args.fakes - 1}.pth", args.judge) if path
                    for model, about in [load_model(path, device)]]
        if args.judge and (unknown := [name for name in networks[0][1] if name not in networks[1][1]]):
            raise InputError(f"--judge {args.judge}: does not know {unknown[0]}")
        dataset = data.load(settings.dataset, args.data_root or settings.data_root, "train")
        return print_fakes(judge_fakes(folder, networks[0], dataset, *networks[1:]))

    results = data.read_json(run / "results.json", {"steps": list})
    dataset = data.load(settings.dataset, args.data_root or settings.data_root, "val")
    labels = dataset.labels()
    steps = groups = data.task_steps(settings.task, len(dataset.classes) - 1)
    if len(results["steps"]) == 1:                          # joint: one step on all classes
        steps = [sum(groups, [])]
    same = True
    for step, recorded in enumerate(results["steps"]):
        model, _ = load_model(run / f"step-{step}.pth", device)
        view = test_view(dataset, labels, steps, step, settings.crop, settings.dataset)
        confusion = evaluate(model, view, device, data.default_workers(), amp=settings.amp)
        moved = int((confusion - torch.tensor(recorded["confusion"])).abs().sum()) // 2
        same = same and not moved
        print(f"step {step}: " + (f"differs from results.json in {moved} of {int(confusion.sum())} pixels" if moved
                                  else "exactly as recorded"))
    paper = PAPER.get((settings.dataset, settings.task, settings.setting), {}).get(settings.method)
    print(table(summarize(confusion, groups), settings.method, paper))
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    with data.plain_errors("eval.py"):
        main()
