"""
Scores of class-incremental segmentation, and predictions for any picture.

    python eval.py runs/shapes-15-1-disjoint                            # score a run again
    python eval.py runs/shapes-15-1-disjoint --predict a.jpg b/ --out d # palette masks and overlays
    python eval.py runs/shapes-15-1-disjoint --fakes 1                  # how good its fakes are
    python eval.py --compare runs/*                                     # methods side by side

    IoU_c = TP_c / (TP_c + FP_c + FN_c), from one confusion matrix over all pixels of the test set

"old" is the classes of step 0, "new" those of every later step, "all" both. The paper's tables mix
three conventions for the background, so all three are printed; the first is MiB's and the headline.
"""
import csv
import io
import math
import re
import sys
import time
from pathlib import Path

# first, as it sees to Ctrl-C while the others are imported
from run import (InputError, Parser, Run, World, autocast, default_workers, plain_errors, printable,
                 quiet_worker, read_json, setup, write_atomically)

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks

import data
import protocol
from fakes import judge_fakes
from fast import upsample_rows
from model import load_model, upsample
from pictures import ENDINGS, palette, read_image

CONVENTIONS = {                                 # label -> background in old, background in all
    "background excluded": (False, False),
    "background in old": (True, True),
    "background in all, not in old": (False, True),
}


# -------------------------------------------------------------------------------------- scores

def confusion_matrix(prediction, target, num_classes):
    """(num_classes, num_classes) int64 pixel counts, rows the ground truth, columns the prediction.

    prediction, target: integer tensors of one shape. Targets outside 0 .. num_classes - 1 (255) are
    left out.
    """
    target, prediction = target.flatten().long(), prediction.flatten().long()
    inside, left_out = (target >= 0) & (target < num_classes), num_classes ** 2
    pairs = torch.where(inside, target * num_classes + prediction, left_out)
    counts = torch.bincount(pairs, minlength=left_out + 1)[:-1]
    return counts.view(num_classes, num_classes)


def iou(confusion):
    """(n,) IoU per class in 0 .. 1; nan for a class in neither prediction nor ground truth."""
    tp = confusion.diag().double()
    return tp / (confusion.sum(0) + confusion.sum(1) - tp)


def summarize(confusion, groups):
    """Mean IoU of groups of classes: {convention: {"old", "new", "all", "per_step": [...]}}.

    confusion: (n, n), channels in the order of learning, background first; n may stop at any step.
    groups:    class ids per step; only their number matters here.
    A class with no pixel in the ground truth is left out of every mean, as in MiB (so ADE's
    "other", which is never scored, drops out too); a mean over nothing is nan.
    """
    per_class = torch.where(confusion.sum(1) > 0, iou(confusion), torch.nan)
    bounds = np.cumsum([1, *map(len, groups)]).tolist()
    mean = lambda first, end=None: per_class[first:end].nanmean().item()
    later = [mean(a, b) for a, b in zip(bounds[1:], bounds[2:]) if a < len(per_class)]
    summary = {}
    for name, (in_old, in_all) in CONVENTIONS.items():
        old = mean(0 if in_old else 1, bounds[1])
        summary[name] = {"old": old, "new": mean(bounds[1]), "all": mean(0 if in_all else 1),
                         "per_step": [old, *later]}
    return summary


def test_view(dataset, labels, steps, step, crop, name):
    """The test images of a step: those that show a class learned so far, all of these labelled.

    name: of the data set; ADE's background is not scored
    """
    seen = sum(steps[:step + 1], [])
    table = protocol.label_map(steps, step, "test", score_background=name != "ade")
    return data.View(dataset, protocol.split_indices(labels, [seen], 0, "overlapped"), table,
                     data.test_transform(crop))


@torch.inference_mode()
def evaluate(model, view, world=World(), workers=0, amp=False, batch_size=8, report=None):
    """Confusion matrix of a model over a View. Every rank takes [rank::size], all get the sum.

    A plain model, not its DDP wrapper: ranks may hold different numbers of batches. The batch size
    does not follow the run's, and cuDNN may not choose by timing, so that a score comes out the
    same on any number of ranks. report: called as report(dict) with this rank's progress.
    """
    model.eval()
    n, device = sum(model.classes_per_step), world.device
    total = torch.zeros(n, n, dtype=torch.int64, device=device)
    keys = [(i, 0) for i in range(len(view.indices))][world.rank::world.size]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    began = time.monotonic()
    loader = DataLoader(view, batch_sampler=batches, num_workers=workers,
                        pin_memory=device.type == "cuda", worker_init_fn=quiet_worker)
    for b, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with autocast(device, amp), torch.backends.cudnn.flags(
                enabled=True, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            logits = model(images)
        total += confusion_matrix(upsample(logits, targets).argmax(1), targets, n)
        if report:
            each = (time.monotonic() - began) / (b + 1)
            report({"phase": "scoring", "batch": b, "of": len(batches),
                    "eta": each * (len(batches) - b - 1),
                    "images/s": world.size * batch_size / each})
    return world.sum(total).cpu()


# -------------------------------------------------------------------------------------- tables

def paper_results():
    """(data set, task, setting) -> method -> (old, new, all) in percent, from results/paper.csv."""
    results = {}
    path = Path(__file__).parent / "results" / "paper.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for row in csv.DictReader(lines):
        later = [float(v) for v in (row["groups"] or row["new"]).split()]   # Table 7: one a step
        results.setdefault((row["dataset"], row["task"], row["setting"]), {})[row["method"]] = (
            float(row["old"]), sum(later) / len(later), float(row["all"]))
    return results


def table(summary, settings, flags=""):
    """A Markdown table of one summary in percent, with the paper's row if the run is one.

    settings: the run's dataset, task, setting, method; flags: those that make it another method
    """
    percent = lambda v: "-" if v != v else f"{100 * v:.1f}"
    rows = ["| mIoU (%) | old | new | all |", "|---|---|---|---|"]
    rows += [f"| {name} | " + " | ".join(percent(s[k]) for k in ("old", "new", "all")) + " |"
             for name, s in summary.items()]
    paper = paper_results().get(tuple(settings[k] for k in ("dataset", "task", "setting")), {})
    if (theirs := paper.get(settings["method"])) and not flags:
        numbers = " | ".join(f"{v:.1f}" for v in theirs)
        rows.append(f"| paper, {settings['method']} | {numbers} |")
    return "\n".join(rows)


def compare(runs, csv_path):
    """Print a Markdown table, a row per method and a column per setting, the paper's in brackets.

    old / new / all in percent, background excluded. A run off its method's defaults is named by its
    flags and stands without the paper's numbers. The same goes to csv_path, a line per run and
    number.
    """
    cells, paper = {}, paper_results()
    lines = ["run method dataset task setting seed group mIoU paper".split()]
    for run in runs:
        path = Path(run) / "results.json"
        if not Path(run).is_dir():
            raise InputError(f"--compare {run}: no such folder")
        if not path.exists():
            print(f"note: {run} has no results.json, it is left out", file=sys.stderr)
            continue
        results = read_json(path, {"final": dict, "settings": dict, "flags": str})
        s = results["settings"]
        try:
            score = results["final"]["background excluded"]
            column = tuple(printable(s[k]) for k in ("dataset", "task", "setting"))
            label = printable(f"{s['method']} {results['flags']}".strip())
            ours = [math.nan if score[k] is None else 100 * float(score[k])
                    for k in ("old", "new", "all")]
            seed = int(s["seed"])
        except (LookupError, TypeError, ValueError, OverflowError):
            raise InputError(f"{path}: damaged; run train.py again") from None
        theirs = paper.get(column, {}).get(label, [None] * 3)
        text = " / ".join(f"{v:.1f}" for v in ours)
        text += f" ({' / '.join(f'{v:.1f}' for v in theirs)})" if theirs[0] is not None else ""
        cells.setdefault(label, {}).setdefault(column, []).append(text)
        lines += [[run, label, *column, seed, group, f"{v:.2f}", p and f"{p:.1f}"]
                  for group, v, p in zip(("old", "new", "all"), ours, theirs)]
    columns = list(dict.fromkeys(c for row in cells.values() for c in row))
    heads = " | ".join(" ".join(c) for c in columns)
    print(f"| mIoU (%), old / new / all (paper) | {heads} |")
    print("|---" * (1 + len(columns)) + "|")
    for label, row in cells.items():
        print(f"| {label} | " + " | ".join("; ".join(row.get(c, ["-"])) for c in columns) + " |")
    write_csv(csv_path, lines)


def print_fakes(scores):
    """judge_fakes' numbers as a Markdown table, shares in percent, with the mean over classes."""
    columns = list(next(iter(scores.values())))
    print(f"| class | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    mean = {c: float(np.mean([s[c] for s in scores.values()])) for c in columns}
    for name, s in {**scores, "mean": mean}.items():
        shares = " | ".join(f"{100 * s[c]:.1f}" for c in columns[1:])
        print(f"| {name} | {s['images']:.0f} | {shares} |")


# --------------------------------------------------------------------------------- predictions

@torch.inference_mode()
def predict(model, image, crop):
    """PIL image -> (H, W) uint8 ids at the image's own size; the short side is scaled to `crop`."""
    device, (W, H) = next(model.parameters()).device, image.size
    size, most = crop, 8 * crop
    if max(W, H) > 8 * min(W, H):                       # long ones are made smaller, for memory
        size = [max(1, most * side // max(W, H)) for side in (H, W)]
    transform = v2.Compose([v2.ToImage(), v2.Resize(size), *data.normalise()])
    logits = model.eval()(transform(image).unsqueeze(0).to(device))
    bands = [upsample_rows(logits, rows, H, W).argmax(1)[0].to(torch.uint8).cpu()
             for rows in row_bands(H, logits.shape[1] * W)]
    return torch.cat(bands)


def row_bands(H, numbers_a_row):
    """Slices of rows with at most 64 Mi numbers, or one row."""
    tall = max(1, 2 ** 26 // numbers_a_row)
    return [slice(top, top + tall) for top in range(0, H, tall)]


def overlay(image, mask):
    """A PIL image with the colours of a mask's classes laid over it."""
    pixels, seen = v2.functional.pil_to_tensor(image), [k for k in mask.unique().tolist() if k]
    colours = [tuple(palette()[k].tolist()) for k in seen]
    # a mask for each class, and some pictures in float32 that drawing makes on its way
    for rows in row_bands(image.height, image.width * (32 + len(seen))) if seen else ():
        masks = torch.stack([mask[rows] == k for k in seen])
        pixels[:, rows] = draw_segmentation_masks(pixels[:, rows], masks, alpha=0.6, colors=colours)
    return v2.functional.to_pil_image(pixels)


@torch.inference_mode()
def save_predictions(model, view, path, device, count=8):
    """Figure 4: image, ground truth, prediction for `count` test images spread over the set."""
    count = min(count, len(view.indices))
    pictures = []
    for position in np.linspace(0, len(view.indices) - 1, count).astype(int).tolist():
        image, target = view[position, 0]
        logits = model.eval()(image[None].to(device))
        prediction = upsample(logits, target[None]).argmax(1)[0].cpu()
        pictures += [data.denormalise(image), data.colour(target), data.colour(prediction)]
    if pictures:
        data.save_grid(pictures, 3, path)


def pictures_to_predict(paths, out):
    """The pictures named by --predict, and those in the folders named; InputError if two clash."""
    found = []
    for path in map(Path, paths):
        inside = [path] if not path.is_dir() else [
            p for p in sorted(path.iterdir()) if p.suffix.lower() in ENDINGS and p.name[0] != "."]
        if not inside:
            raise InputError(f"--predict {path}: no picture in this folder "
                             f"({' '.join(ENDINGS)})")
        found += inside
    stems = [path.stem for path in found]
    if twice := next((s for s in stems if stems.count(s) > 1), None):
        raise InputError(f"--predict: two pictures are called {twice}; predict them into two --out "
                         "folders")
    if clash := next((p for p in found if p.resolve().parent == out.resolve()), None):
        raise InputError(f"--out {out}: holds {clash.name}, one of the pictures; choose another "
                         "folder")
    return found


def save_legend(names, path):
    """The classes' names beside their colours."""
    picture = Image.new("RGB", (16 + 10 * max(map(len, names)), 20 * len(names) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        draw.rectangle((6, 6 + 20 * k, 20, 20 + 20 * k), tuple(palette()[k].tolist()), "grey")
        draw.text((28, 6 + 20 * k), name.encode("latin-1", "replace").decode("latin-1"), "black")
    write_atomically(path, lambda p: picture.save(p, "PNG"))


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8",
                                                  errors="replace"))


def predict_all(run, paths, out, device, shares=False):
    """A palette mask and an overlay of every picture, by the last network of a run; a legend; with
    `shares`, shares.csv: of every picture the percentage of its pixels that each class has.

    A picture that cannot be read does not stop the others; False at the end.
    """
    found = [re.fullmatch(r"step-(\d+)\.pth", path.name) for path in run.folder.iterdir()]
    steps = [int(name[1]) for name in found if name]
    if not steps:
        raise InputError(f"{run.folder}: no finished step to predict with yet")
    model, about = load_model(run.checkpoint(max(steps)), device)
    paths, unreadable = pictures_to_predict(paths, out), []
    out.mkdir(parents=True, exist_ok=True)
    save_legend(about["classes"], out / "legend.png")
    write_csv(out / "legend.csv", [["id", "name", "red", "green", "blue"], *(
        [k, name, *palette()[k].tolist()] for k, name in enumerate(about["classes"]))])
    rows = [["picture", *about["classes"]]]
    for path in paths:
        try:
            image = read_image(path)
        except InputError as error:
            unreadable.append(str(error))
            continue
        mask = predict(model, image, about["crop"])
        ids, laid_over = Image.fromarray(mask.numpy()), overlay(image, mask)
        ids.putpalette(palette().tobytes())
        write_atomically(out / f"{path.stem}-mask.png", lambda p: ids.save(p, "PNG"))
        write_atomically(out / f"{path.stem}-overlay.png", lambda p: laid_over.save(p, "PNG"))
        counts = np.array(ids.histogram()[:len(about["classes"])])
        rows.append([path, *(f"{v:.2f}" for v in 100 * counts / counts.sum())])
        names = [about["classes"][k] for k in np.flatnonzero(counts) if k]
        print(f"{printable(str(path))}: {', '.join(names) or 'background only'}")
    if shares:
        write_csv(out / "shares.csv", rows)
    for sentence in unreadable:
        print(f"eval.py: {printable(sentence)}", file=sys.stderr)
    return not unreadable


# -------------------------------------------------------------------------------- the commands

def score_fakes(run, step, judge, dataset, device):
    """--fakes: judge the fakes that a step of a run was given."""
    networks = [(model, about["classes"]) for path in (run.checkpoint(step - 1), judge) if path
                for model, about in [load_model(path, device)]]
    if gone := [c for c in networks[0][1][1:] if c not in dataset.classes]:
        raise InputError(f"{run.folder}: knows {gone[0]}, which --data-root has not")
    if judge and (unknown := [c for c in networks[0][1] if c not in networks[1][1]]):
        raise InputError(f"--judge {judge}: does not know {unknown[0]}")
    print_fakes(judge_fakes(run.fakes(step), networks[0], dataset, *networks[1:]))


def score_again(run, settings, dataset, world):
    """Score every step's checkpoint; True if all are to the pixel as results.json has them."""
    path = run.folder / "results.json"
    results = read_json(path, {"steps": list, "flags": str})
    try:
        recorded = [torch.tensor(step["confusion"], dtype=torch.int64)
                    for step in results["steps"]]
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise InputError(f"{path}: damaged; remove it, then run train.py again") from None
    order, n = settings["order"], len(dataset.classes) - 1
    ids = order is None or all(type(c) is int for c in order)
    if not ids or order is not None and sorted(order) != list(range(1, n + 1)):
        raise InputError(f"{run.folder}/settings.json: its order is not of the data's {n} classes")
    groups = protocol.task_steps(settings["task"], n, order)
    steps = groups if len(recorded) > 1 else [sum(groups, [])]              # Joint has one step
    if len(recorded) != len(steps):
        raise InputError(f"{path}: not of the {len(steps)} steps of this task; run train.py again")
    labels, same = dataset.labels(), True
    for step, theirs in enumerate(recorded):
        names = [dataset.classes[c] for c in [0, *sum(steps[:step + 1], [])]]
        model, _ = load_model(run.checkpoint(step), world.device, {"classes": names})
        view = test_view(dataset, labels, steps, step, settings["crop"], settings["dataset"])
        confusion = evaluate(model, view, world, default_workers(), settings["amp"])
        if confusion.shape != theirs.shape:
            raise InputError(f"{path}: step {step} is not of this run; run train.py again")
        moved = -(-int((confusion - theirs).abs().sum()) // 2)              # rounded up
        same = same and not moved
        differs = f"differs from results.json in {moved} of {int(confusion.sum())} pixels"
        if world.rank == 0:
            print(f"step {step}: {differs if moved else 'exactly as recorded'}")
    if world.rank == 0:
        print(table(summarize(confusion, groups), settings, results["flags"]))
    return same


def parse(argv=None):
    parser = Parser(
        description="Score a run again, segment pictures with its last model, or judge its fakes.")
    a = parser.add_argument
    a("run", nargs="?", help="run folder that train.py wrote")
    a("--compare", nargs="+", metavar="RUN",
      help="print one table of these runs, and write compare.csv")
    a("--fakes", type=int, metavar="STEP", help="judge the fakes that this step was given")
    a("--judge", metavar="CHECKPOINT",
      help="--fakes: of another network, not used in their synthesis")
    a("--predict", nargs="+", metavar="PATH", help="segment these images and folders instead")
    a("--csv", action="store_true", help="--predict: also shares.csv, the share of each class")
    a("--out", default="predictions", help="folder for --predict's PNGs")
    a("--data-root", help="where the data is now, if it was moved since the run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if "" in [value for given in vars(args).values()
              for value in (given if isinstance(given, list) else [given])]:
        raise InputError("an argument is empty: a shell variable that is not set?")
    if args.compare:
        return compare(args.compare, Path("compare.csv"))
    if not args.run:
        raise InputError("name a run folder, or --compare several")
    if args.judge and args.fakes is None:
        raise InputError("--judge: judges --fakes; add --fakes and the step that was given them")
    if args.csv and not args.predict:
        raise InputError("--csv: of --predict; add the pictures")
    if args.predict and args.fakes is not None:
        raise InputError("--predict and --fakes: one at a time")
    if args.fakes is not None and args.fakes < 1:
        raise InputError(f"--fakes {args.fakes}: the steps that are given fakes are 1 and later")
    run, world = Run(args.run), setup()
    if world.rank and (args.predict or args.fakes is not None):
        return                                              # one process does these
    if args.predict:
        if not run.folder.is_dir():
            raise InputError(f"{run.folder}: no such folder")
        if not predict_all(run, args.predict, Path(args.out), world.device, args.csv):
            sys.exit(1)
        return
    settings = read_json(
        run.folder / "settings.json",
        {"dataset": str, "task": str, "crop": int, "setting": str, "method": str, "amp": bool,
         "data_root": str, "order": (list, type(None))}, "run the command that made it again")
    if not 16 <= settings["crop"] <= 10 ** 4:
        raise InputError(f"{run.folder}/settings.json: damaged; run the command that made it again")
    root = args.data_root or settings["data_root"]
    if args.fakes is not None:
        dataset = data.load(settings["dataset"], root, "train")
        return score_fakes(run, args.fakes, args.judge, dataset, world.device)
    if not score_again(run, settings, data.load(settings["dataset"], root, "val"), world):
        sys.exit(1)


if __name__ == "__main__":
    with plain_errors("eval.py"):
        main()
