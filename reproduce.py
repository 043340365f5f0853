"""
The paper's tables at a size that two CPU cores can run: every run, and the tables made of them.

    python reproduce.py --voc6 data/voc6            # all runs that have no result yet, then results/README.md
    python reproduce.py --only table2 --seed 1      # some of them; another process may do --seed 2 at the same time
    python reproduce.py --quick                     # two iterations of every kind of run, in a temporary folder
    python reproduce.py --make-voc6 data            # voc6 out of VOC 2012: needs data/VOCdevkit with SegmentationClassAug

A run is a command of train.py. Its result, results/study/<run>.json, is committed, and a run that has one
is skipped; an interrupted run goes on where it stopped. Runs of one data set, task and seed share the
step 0 of their first (--step0), as far as their method allows.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

import data
import train
from baselines import METHODS
from bench import commit
from data import write_atomically

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)

# The schedule of each data set; the same for every method.
SETTINGS = {
    "shapes": "--dataset shapes",
    "voc6": "--dataset folder --backbone mobilenet_v2 --crop 96 --batch-size 16 --epochs0 6 --epochs 4 --lr0 0.02 --lr 0.01 "
            "--num-fakes 64 --fake-steps 200 --fake-classes 1 --tv 1.5 --bn 3 --workers 1",
}
ORACLE = "real"                                             # --fake real: not in train.py, outside the protocol


class Run(NamedTuple):
    dataset: str
    task: str
    setting: str
    row: str                        # its name in the table
    flags: str                      # what it adds to SETTINGS
    seed: int

    @property
    def name(self):                 # of its flags, not of its row: rows of several tables may be one and the same run
        flags = self.flags.removeprefix("--method ").replace("--", "").replace(" ", "-").replace(":", "-") or "hrhf"
        return f"{self.dataset}-{self.task}-{self.setting}-{flags}-{self.seed}"


MAIN = {"FT": "--method ft", "LwF": "--method lwf", "MiB": "--method mib", "HRHF": "", "Joint": "--method joint"}
OTHERS = {"PI": "--method pi", "EWC": "--method ewc", "RW": "--method rw", "LwF-MC": "--method lwf-mc", "ILT": "--method ilt"}
HRHF, BASELINE, REAL = "+ SegInversion (HRHF)", "Baseline (no fakes)", "real old images (outside the protocol)"
ROWS = {
    "table2": {BASELINE: "--fake none", "+ Noise": "--fake noise", HRHF: "", REAL: f"--fake {ORACLE}"},
    "table3": {"AVG": "--r avg", "MAX": "--r max", "SAA (random r)": ""},
    "table4": {**{f"r = {r}": f"--r {r}" for r in ("0.5", "1", "5", "10", "20")}, "random": ""},
    "table5": {"without KD": "--lam 0", "with KD": ""},
    "table6": {"1:1": "", "1:2": "--real-fake 1:2", "2:1": "--real-fake 2:1"},
}
CLAIMS = [                          # what the paper says, as table, better row, worse row
    ("HRHF beats MiB", "table1", "HRHF", "MiB"), ("HRHF beats LwF", "table1", "HRHF", "LwF"),
    ("HRHF beats fine-tuning", "table1", "HRHF", "FT"),
    ("fakes beat no fakes", "table2", HRHF, BASELINE), ("fakes beat noise", "table2", HRHF, "+ Noise"),
    ("SAA beats AVG", "table3", "SAA (random r)", "AVG"), ("SAA beats MAX", "table3", "SAA (random r)", "MAX"),
    *[(f"a random r beats r = {r}", "table4", "random", f"r = {r}") for r in ("0.5", "1", "5", "10", "20")],
    ("distillation helps", "table5", "with KD", "without KD"),
    ("1:1 beats 1:2", "table6", "1:1", "1:2"), ("1:1 beats 2:1", "table6", "1:1", "2:1"),
]
TITLES = {"table1": "Methods (paper: Table 1)", "table2": "Fakes (paper: Table 2)", "table3": "Aggregation (paper: Table 3)",
          "table4": "Scale r (paper: Table 4)", "table5": "Knowledge distillation (paper: Table 5)",
          "table6": "Real : fake in a mini-batch (paper: Table 6)"}


def study():
    """{table: its runs}, the most telling first."""
    def runs(rows, dataset, task, seeds=SEEDS, setting="disjoint"):
        return [Run(dataset, task, setting, row, flags, seed) for seed in seeds for row, flags in rows.items()]
    tables = {
        "table1": runs(MAIN, "shapes", "15-1") + runs(MAIN, "voc6", "4-1") + runs(MAIN, "voc6", "3-1")
        + runs(MAIN, "shapes", "15-5") + runs(MAIN, "shapes", "19-1")
        + runs(OTHERS, "shapes", "15-1", SEEDS[:1]) + runs(OTHERS, "voc6", "4-1", SEEDS[:1])
        + runs(OTHERS, "voc6", "3-1", SEEDS[:1]) + runs(OTHERS, "shapes", "15-5", SEEDS[:1])
        + runs(OTHERS, "shapes", "19-1", SEEDS[:1])
        + [run for task in ("5-1", "4-2") for run in runs({**MAIN, **OTHERS}, "voc6", task, SEEDS[:1])]
        + [run for task in ("4-1", "3-1") for run in runs({**MAIN, **OTHERS}, "voc6", task, SEEDS[:1], "overlapped")],
        "table2": runs(ROWS["table2"], "shapes", "15-1") + runs(ROWS["table2"], "voc6", "4-1")
        + runs(ROWS["table2"], "voc6", "3-1"),
        **{table: runs(ROWS[table], "shapes", "15-1") for table in ("table3", "table4", "table5", "table6")},
    }
    tables["table5"] += runs(ROWS["table5"], "voc6", "3-1")
    return tables


# --------------------------------------------------------------------------------------------- running

def real_replay(train_set, groups, step, model, folder, num_images, *, size, seed=0, **_):
    """The oracle in synthesize's place: as many real images of old classes, as they were in earlier steps."""
    labels = train_set.labels()
    old = sorted({i for t in range(step) for i in data.split_indices(labels, groups, t, "disjoint")})
    order = data.shuffled_passes(len(old), torch.Generator().manual_seed(seed))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    crop = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    paths = [folder / f"{i:05d}.png" for i in range(num_images)]
    for path in paths:
        image = crop(train_set.read(old[next(order)])[0])
        write_atomically(path, lambda p: image.save(p, "PNG"))
    return paths


def execute(run, roots, folder, step0, extra=()):
    """Run train.py in `folder`; its results.json as an object."""
    flags = f"{SETTINGS[run.dataset]} --task {run.task} --setting {run.setting} --seed {run.seed} {run.flags}".split()
    flags += ["--data-root", str(roots[run.dataset]), "--out", str(folder), *extra]
    if run.dataset == "voc6":
        flags += ["--pretrained", str(roots["weights"])]
    if step0:
        flags += ["--step0", str(step0)]
    synthesize = train.synthesize
    if ORACLE in flags:
        flags[flags.index(ORACLE)] = "seginversion"
        args = train.parse(flags)
        train_set = data.load(args.dataset, args.data_root, "train")
        groups = data.task_steps(run.task, len(train_set.classes) - 1)

        def replay(model, folder, *rest, **options):
            step = int(Path(folder).name.removeprefix("fakes-step-"))
            return real_replay(train_set, groups, step, model, folder, *rest, **options)
        train.synthesize = replay
    try:
        train.main(flags)
    finally:
        train.synthesize = synthesize
    return json.loads((Path(folder) / "results.json").read_text())


def perform(run, roots, runs, results, extra=()):
    """Do one run, unless it has a result; write its result; keep of its folder what other runs build upon."""
    result = results / f"{run.name}.json"
    if result.exists():
        return
    shared = runs / f"step0-{run.dataset}-{run.task}-{run.setting}-{run.seed}.pth"
    method = METHODS[train.parse(run.flags.replace(ORACLE, "none").split()).method]
    shares = not (method.offline or method.importance) and "lwf-mc" not in run.flags         # those have a step 0 of their own
    print(f"reproduce.py: {run.name}", flush=True)
    folder, began = runs / run.name, time.monotonic()
    scores = execute(run, roots, folder, shared if shares and shared.exists() else None, extra)
    if shares and not shared.exists():
        write_atomically(shared, lambda p: shutil.copyfile(folder / "step-0.pth", p))
    final, first = (steps["background excluded"] for steps in (scores["final"], scores["steps"][0]))
    command = f"train.py {SETTINGS[run.dataset]} --task {run.task} --setting {run.setting} --seed {run.seed} {run.flags}"
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(result, lambda p: p.write_text(json.dumps({
        "command": command.strip(), "commit": commit(), "versions": scores["versions"],
        "old": final["old"], "new": final["new"], "all": final["all"], "step 0": first["all"],
        "iou": scores["steps"][-1]["iou"], "seconds": round(time.monotonic() - began)}, indent=1) + "\n"))
    for pattern in ("step-*.pth", "fakes-step-*/*.png"):
        for path in folder.glob(pattern):
            path.unlink()


# -------------------------------------------------------------------------------------------- the tables

def spread(values):
    """Mean and standard deviation over seeds, in percent."""
    percent = [100 * v for v in values]
    return f"{statistics.mean(percent):.1f}" + (f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else "")


def verdict(better, worse):
    """A claim about two rows' scores over the seeds: it holds if their ranges say so without overlap."""
    if len(better) < 2 or len(worse) < 2:
        return "undecided (fewer than two seeds)"
    return "holds" if min(better) > max(worse) else "does not hold" if max(better) < min(worse) else "undecided"


def claims(table, cells):
    """Lines on what a table's cells, {row: its results}, say of the paper's claims; on all classes."""
    scores = {row: [d["all"] for d in done] for row, done in cells.items() if done}
    lines = [f"- {text}: **{verdict(scores[a], scores[b])}** ({spread(scores[a])} against {spread(scores[b])})"
             for text, where, a, b in CLAIMS if where == table and a in scores and b in scores]
    if all(row in scores for row in (HRHF, BASELINE, REAL)):
        shares = [(h - b) / (r - b) for h, b, r in zip(scores[HRHF], scores[BASELINE], scores[REAL])]
        lines.append(f"- replay recovery, (HRHF - Baseline) / (real - Baseline): {spread(shares)} %")
    return lines + [""] if lines else []


def report(results):
    """results/README.md as a string: every table, from the committed results alone."""
    lines = ["# Results of the study", "",
             "Written by `python reproduce.py`; do not edit. mIoU in percent, background excluded, mean ± standard deviation over n",
             "seeds. \"Step 0\" is the network that all rows of a column start from, on its own classes. A claim of the paper \"holds\"",
             "or \"does not hold\" here if the two rows' seeds do not overlap on all classes. `voc6` is photographs, `shapes` is drawn;",
             "neither is the paper's VOC 2012 with its network, so only the pattern can be compared.", "", "Schedules:", ""]
    lines += [f"- {name}: `{flags}`" for name, flags in SETTINGS.items()]
    for table, runs in study().items():
        lines += ["", f"## {TITLES[table]}", ""]
        columns = list(dict.fromkeys((r.dataset, r.task, r.setting) for r in runs))
        for column in columns:
            here = [r for r in runs if (r.dataset, r.task, r.setting) == column]
            cells = {}
            for run in here:
                path = results / f"{run.name}.json"
                cells.setdefault(run.row, [])
                if path.exists():
                    cells[run.row].append(json.loads(path.read_text()))
            if not any(cells.values()):
                lines += [f"{' '.join(column)}: not run.", ""]
                continue
            lines += [f"| {' '.join(column)} | step 0 | old | new | all | n |", "|---|---|---|---|---|---|"]
            for row, done in cells.items():
                numbers = [spread([d[key] for d in done]) for key in ("step 0", "old", "new", "all")] if done else ["not run"] * 4
                lines.append(f"| {row} | {' | '.join(numbers)} | {len(done)} |")
            lines += ["", *claims(table, cells)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def make_voc6(root, target):
    """voc6 out of VOC 2012: the listed images, short side 192, bicubic, JPEG quality 90; masks nearest, ids 1 .. 6."""
    voc, target = Path(root) / "VOCdevkit" / "VOC2012", Path(target)
    names = "background cat cow dog horse person sheep".split()
    table = [names.index(c) if c in names else 0 for c in data.VOC_CLASSES] + [0] * (255 - len(data.VOC_CLASSES)) + [255]
    lists = json.loads((HERE / "results" / "voc6.json").read_text())
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for split, ids in lists.items():
        for name in ids:
            image = data.read_image(voc / "JPEGImages" / f"{name}.jpg")
            mask = data.read_mask(voc / ("SegmentationClassAug" if split == "train" else "SegmentationClass") / f"{name}.png")
            scale = 192 / min(image.size)
            size = [round(side * scale) for side in image.size]
            small = Image.fromarray(np.array(table, np.uint8)[np.array(mask)])
            small = small.resize(size, Image.Resampling.NEAREST)
            write_atomically(target / "JPEGImages" / f"{name}.jpg", lambda p: image.resize(size, Image.Resampling.BICUBIC).save(
                p, "JPEG", quality=90))
            write_atomically(target / "SegmentationClass" / f"{name}.png", lambda p: small.save(p, "PNG"))
        (target / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    print(f"{', '.join(f'{len(ids)} {split}' for split, ids in lists.items())} images in {target}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TITLES), help="one table")
    parser.add_argument("--dataset", choices=list(SETTINGS), help="one data set")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="one seed")
    parser.add_argument("--voc6", default="data/voc6", help="where voc6 is")
    parser.add_argument("--weights", default="imagenet", help="of MobileNetV2, if there is no download: a file")
    parser.add_argument("--runs", default="runs/study", help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="two iterations of every kind of run on shapes; results are thrown away")
    parser.add_argument("--tables", action="store_true", help="run nothing, write results/README.md")
    parser.add_argument("--make-voc6", metavar="DATA_ROOT", help="make --voc6 out of the VOC 2012 there")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.make_voc6:
        return make_voc6(args.make_voc6, args.voc6)
    results = HERE / "results" / "study"
    roots = {"shapes": "data", "voc6": args.voc6, "weights": args.weights}
    runs = [run for table, runs in study().items() for run in runs if args.only in (None, table)
            and args.dataset in (None, run.dataset) and args.seed in (None, run.seed)]
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            kinds = {run.flags: run for run in runs if run.dataset == "shapes"}
            for run in kinds.values():
                perform(run, roots, Path(folder) / "runs", Path(folder), ["--max-iters", "2", "--num-fakes", "16"])
            print(f"reproduce.py: all {len(kinds)} kinds of runs work")
        return
    if not args.tables:
        Path(args.runs).mkdir(parents=True, exist_ok=True)
        for run in runs:
            perform(run, roots, Path(args.runs), results)
    write_atomically(HERE / "results" / "README.md", lambda p: p.write_text(report(results)))


if __name__ == "__main__":
    with data.plain_errors("reproduce.py"):
        main()
