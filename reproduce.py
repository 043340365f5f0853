"""
The paper's tables at a size that two CPU cores can run: every run, and the tables made of them.

    python reproduce.py --make data                 # data/voc20 and voc6 out of data/VOCdevkit
    python reproduce.py --list                      # every run and a command for it
    python reproduce.py                             # all that have no record yet, then the tables
    python reproduce.py --only voc20/15-1/hrhf/1    # one, or some; or figure3, or figure4

A run is a command of train.py. Its record is a line of results/study.jsonl, and a run that has one
is skipped; an interrupted run goes on where it stopped. Runs that begin alike share a step 0
(--step0), and Joint of another seed judges fakes: one process at a time for a data set. All tables
are made of the records.
"""
import argparse
import json
import shlex
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

# first, as it sees to Ctrl-C while the others are imported
from run import (InputError, Parser, check_file, commit, plain_errors, read_json, sha256,
                 write_atomically)

import numpy as np
from PIL import Image

import data
import fakes
import train
from eval import test_view
from methods import METHODS
from model import load_model
from protocol import task_steps

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
VOC6_CLASSES = "background cat cow dog horse person sheep".split()

# --------------------------------------------------------------------------------- what is run

OUR_INVERSION = ("--fake-steps 190 --fake-sizes 1/3,2/3,1 --reuse-fakes --spectrum 1 --tv 0.3 "
                 "--bn 10")
# The schedule of each data set; the same for every method but for the learning rate.
SETTINGS = {
    "voc20": f"--dataset voc --small --epochs0 30 --epochs 15 --min-iters 150 {OUR_INVERSION}",
    "voc6": "--dataset folder --small --epochs0 6 --epochs 8",
    "shapes": "--dataset shapes",
}
TASK = {"voc20": "15-1", "voc6": "3-1", "shapes": "15-1"}   # of the Joint networks that judge
# Learning rates of their own, chosen on a part of the training images (results/trials.md), ILT's as
# LwF's; the authors' for the importances.
IMPORTANCES = {f"--method {name}": "--lr 0.001" for name in ("pi", "ewc", "rw")}
RATES = {"voc20": {**{f"--method {name}": "--lr 0.001" for name in ("mib", "lwf", "ilt")},
                   **IMPORTANCES},
         "voc6": {"--method ft": "--lr 0.03", "--method lwf": "--lr 0.001",
                  "--method mib": "--lr 0.01"}, "shapes": {}}
REPLAY = "real_replay"                                  # train.main's argument, no flag of train.py
FIGURE3 = "--classes cat bus dog horse --r 0.5,5,10 --images 16"

MAIN = {"FT": "--method ft", "MiB": "--method mib", "HRHF": "", "Joint": "--method joint",
        "LwF": "--method lwf", "ILT": "--method ilt"}
OTHERS = {"PI": "--method pi", "EWC": "--method ewc", "RW": "--method rw",
          "LwF-MC": "--method lwf-mc"}
FULL, BASELINE = "+ SegInversion (HRHF)", "Baseline (no fakes)"
REAL = "real old images (outside the protocol)"
OURS, PAPERS, ANEW = "ours", "the paper's passes, made once", "ours, anew in every step"
ROWS = {
    "table2": {BASELINE: "--fake none", "+ Noise": "--fake noise", FULL: "", REAL: REPLAY},
    "table3": {"AVG": "--r avg", "MAX": "--r max", "SAA (random r)": ""},
    "table4": {**{f"r = {r}": f"--r {r}" for r in ("0.5", "1", "5", "10", "20")}, "random": "",
               "random, one r an image": "--r random-image"},
    "table5": {"without KD": "--lam 0", "with KD": ""},
    "table6": {"1:1": "", "1:2": "--real-fake 1:2", "2:1": "--real-fake 2:1"},
    "ours": {OURS: "", PAPERS: "--fake-steps 1000 --fake-sizes 1 --spectrum 0 --tv 0.355 --bn 1.16",
             ANEW: "--no-reuse-fakes"},
    # distillation weights; without --lam the method's own
    "weights": {**{f"MiB, {lam or 10}": "--method mib" + (f" --lam {lam}" if lam else "")
                   for lam in (1, 3, None, 30, 100)},
                **{f"HRHF, {1 if lam is None else lam}": "" if lam is None else f"--lam {lam}"
                   for lam in (0, 0.3, None, 3, 10)}},
    "first": {"python train.py": "", "without fakes": "--fake none"},
}
TITLES = {
    "first": "The first run of README (seed 42)",
    "table1": "Methods (paper: Table 1)", "table2": "Fakes (paper: Table 2)",
    "table3": "Aggregation (paper: Table 3)", "table4": "Scale r (paper: Table 4)",
    "table5": "Knowledge distillation (paper: Table 5)",
    "table6": "Real : fake in a mini-batch (paper: Table 6)",
    "ours": "What is ours (not in the paper)",
    "weights": "The weight of distillation"}
CLAIMS = [                                              # text, table, better row, worse row
    ("HRHF beats MiB", "table1", "HRHF", "MiB"), ("HRHF beats LwF", "table1", "HRHF", "LwF"),
    ("HRHF beats ILT", "table1", "HRHF", "ILT"),
    ("HRHF beats fine-tuning", "table1", "HRHF", "FT"),
    ("fakes beat no fakes", "table2", FULL, BASELINE),
    ("fakes beat noise", "table2", FULL, "+ Noise"),
    ("SAA beats AVG", "table3", "SAA (random r)", "AVG"),
    ("SAA beats MAX", "table3", "SAA (random r)", "MAX"),
    *[(f"a random r beats r = {r}", "table4", "random", f"r = {r}")
      for r in ("0.5", "1", "5", "10", "20")],
    ("one random r an image beats one for every class of it", "table4", "random, one r an image",
     "random"),
    ("distillation helps", "table5", "with KD", "without KD"),
    ("1:1 beats 1:2", "table6", "1:1", "1:2"), ("1:1 beats 2:1", "table6", "1:1", "2:1"),
    ("our passes beat the paper's", "ours", OURS, PAPERS),
    ("fakes made once beat fakes made anew", "ours", OURS, ANEW)]


class Run(NamedTuple):
    dataset: str
    task: str
    setting: str
    row: str                    # its name in the table
    flags: str                  # what it adds to SETTINGS
    seed: int

    @property
    def name(self):             # of its flags: rows of several tables may be one and the same run
        flags = self.flags.removeprefix("--method ").replace("--", "")
        flags = flags.replace(" ", "-").replace(":", "-") or "hrhf"
        overlapped = "-overlapped" * (self.setting == "overlapped")
        return f"{self.dataset}/{self.task}{overlapped}/{flags}/{self.seed}"

    @property
    def command(self):
        return (f"train.py {SETTINGS[self.dataset]} --task {self.task} --setting {self.setting} "
                f"--seed {self.seed} {self.flags}").strip()

    @property
    def argv(self):
        return self.command.replace(REPLAY, "").split()[1:]


def study():
    """{table: its runs}, the most telling first."""
    def runs(rows, dataset, task, seeds=SEEDS, setting="disjoint"):
        rate = lambda flags: RATES[dataset].get(" ".join(flags.split()[:2]), "")
        return [Run(dataset, task, setting, row, f"{flags} {rate(flags)}".strip(), seed)
                for seed in seeds for row, flags in rows.items()]
    one, photographs = SEEDS[:1], [("voc20", task) for task in ("15-1", "15-5", "19-1")]
    few = {row: MAIN[row] for row in ("FT", "MiB", "HRHF")}
    return {
        "first": runs(ROWS["first"], "shapes", "15-1", (42,)),
        "table1": [run for where in photographs
                   for run in runs(MAIN, *where) + runs(OTHERS, *where, one)]
        + runs(few, "voc20", "15-1", setting="overlapped")
        + runs(MAIN, "voc6", "3-1") + runs(MAIN, "shapes", "15-1"),
        "table2": [run for where in (*photographs[:2], ("voc6", "3-1"))
                   for run in runs(ROWS["table2"], *where)],
        **{table: [run for where in photographs[:0:-1] for run in runs(ROWS[table], *where)]
           for table in ("table3", "table4", "table5", "table6")},
        "ours": runs(ROWS["ours"], "voc20", "15-1"),
        "weights": runs(ROWS["weights"], "voc20", "15-1", one),
    }


def judge(run):
    """The network that judges a run's fakes: Joint of another seed."""
    return Run(run.dataset, TASK[run.dataset], "disjoint", "Joint", "--method joint",
               2 if run.seed == 1 else 1)


# ------------------------------------------------------------------------------------- running

class Place(NamedTuple):
    roots: dict                 # data set -> its --data-root
    weights: str                # of MobileNetV2: a file, or "imagenet"
    runs: Path
    records: Path               # study.jsonl


def read_records(path):
    """{name: its record}; of two with one name the later."""
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return {record["name"]: record for record in map(json.loads, lines)}
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{path}: damaged; remove its damaged line") from None


def recorded(run, records):
    """A run's record, if it is of the command as it is now."""
    record = records.get(run.name)
    return record if record and record["command"] == run.command else None


def add_record(path, record):
    with open(path, "a") as file:                       # one write: two processes may do it at once
        file.write(json.dumps(record) + "\n")


def flags_of(run, place):
    """train.py's flags for a run: its own, and where its data, weights and folder are."""
    flags = [*run.argv, "--data-root", str(place.roots[run.dataset]),
             "--out", str(place.runs / run.name)]
    return flags if run.dataset == "shapes" else [*flags, "--pretrained", place.weights]


def shell_command(run, place):
    """What does a run in a shell, without reproduce.py."""
    flags = flags_of(run, place)
    if REPLAY in run.flags:
        code = f"import train; train.main({json.dumps(flags)}, {REPLAY}=True)"
        return shlex.join(["python", "-c", code])
    return shlex.join(["python", "train.py", *flags])


def train_run(run, place):
    """Run train.py in the run's folder, from the shared step 0 if there is one; its folder."""
    folder, args = place.runs / run.name, train.parse(run.argv)
    method, first = METHODS[args.method], run.task.split("-")[0]    # 15-1 and 15-5 begin alike
    shared = (place.runs / run.dataset / f"step0-{'joint' if method.joint else first}"
              f"-{run.setting}-{run.seed}.pth")
    shares = not method.own_step0
    begun = folder / "settings.json"                    # it goes on as it began
    step0 = read_json(begun, {"dataset": str})["step0"] if begun.exists() else \
        str(shared) if shares and shared.exists() else None
    flags = flags_of(run, place) + (["--step0", step0] if step0 else [])
    train.main(flags, real_replay=REPLAY in run.flags)
    if shares and not shared.exists():
        write_atomically(shared, lambda p: shutil.copyfile(folder / "step-0.pth", p))
    return folder


def network(run, place):
    """The last network of a run, which is finished first; and what its checkpoint says."""
    folder = train_run(run, place)
    number = lambda path: int(path.stem.removeprefix("step-"))
    return load_model(max(folder.glob("step-*.pth"), key=number))


def perform(run, place):
    """Do one run and write its record."""
    print(f"reproduce.py: {run.name}", flush=True)
    began, folder = time.monotonic(), train_run(run, place)
    seconds = round(time.monotonic() - began)           # of the last launch
    scores = json.loads((folder / "results.json").read_text())
    final, settings = scores["final"]["background excluded"], scores["settings"]
    places = ("out", "data_root", "step0", "pretrained", "workers", "amp")
    record = {"name": run.name, "command": run.command,
              "settings": {k: v for k, v in settings.items() if k not in places},
              "commit": commit(), "versions": scores["versions"], "seconds": seconds,
              **{key: final[key] for key in ("old", "new", "all")},
              "step 0": scores["steps"][0]["background excluded"]["all"],
              "final": scores["final"], "iou": scores["steps"][-1]["iou"]}
    if settings["fake"] == "seginversion" and REPLAY not in run.flags:
        judging, about = network(judge(run), place)
        dataset = data.load(settings["dataset"], place.roots[run.dataset], "train")
        record["fakes"] = {}
        for step in range(1, len(scores["steps"])):
            teacher, known = load_model(folder / f"step-{step - 1}.pth")
            record["fakes"][step] = fakes.judge_fakes(
                folder / f"fakes-step-{step}", (teacher, known["classes"]), dataset,
                (judging, about["classes"]))
    add_record(place.records, record)


# -------------------------------------------------------------------------------- the pictures

def figure_runs():
    """FT, MiB and HRHF of voc20 15-1, seed 1."""
    return {run.row: run for run in study()["table1"][:3]}


def figure3(place):
    """The same noise at three scales, out of voc20's step 0; shares of pixels to the records."""
    run = figure_runs()["HRHF"]
    network(run, place)                                 # a record is there without its networks
    step0 = place.runs / run.name / "step-0.pth"
    shares = fakes.main([*FIGURE3.split(), "--checkpoint", str(step0),
                         "--out", str(place.records.with_name("figure3.png"))])
    add_record(place.records, {"name": "figure3", "command": f"fakes.py {FIGURE3}",
                               "commit": commit(), "share": shares})


def figure4(place, count=6):
    """Image, FT, MiB, HRHF, truth for some of voc20's test images; and HRHF's first fakes, the
    classes they were asked for to the records."""
    models = {row: network(run, place) for row, run in figure_runs().items()}
    first, about = place.runs / figure_runs()["HRHF"].name / "fakes-step-1", models["HRHF"][1]
    shutil.copyfile(first.with_suffix(".png"), place.records.with_name("fakes.png"))
    steps = task_steps(TASK["voc20"], len(about["classes"]) - 1)
    test_set = data.load("voc", place.roots["voc20"], "val")
    view = test_view(test_set, test_set.labels(), steps, len(steps) - 1, about["crop"], "voc")
    panels = []
    for position in np.linspace(0, len(view.indices) - 1, count).astype(int).tolist():
        image, target = view[position, 0]
        predicted = [fakes.segment(model, image[None])[0] for model, _ in models.values()]
        panels += [data.denormalise(image), *predicted, data.colour(target)]
    data.save_grid(panels, 2 + len(models), place.records.with_name("figure4.png"))
    asked = [" and ".join(about["classes"][c] for c in ids) for _, ids in fakes.read_fakes(first)]
    add_record(place.records, {"name": "figure4", "commit": commit(), "asked": asked[:16]})


# ---------------------------------------------------------------------------------- the tables

MARK = "<!-- from here on written by `python reproduce.py` out of study.jsonl: do not edit -->"
JUDGED = ("found", "sure", "size", "real size", "judge found", "judge IoU")


def spread(values):
    """Mean and standard deviation over seeds, in percent."""
    percent = [100 * v for v in values]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{deviation}"


def verdict(better, worse):
    """A claim about two rows' scores: it holds if the ranges over the seeds say so, apart."""
    if len(better) < 2 or len(worse) < 2:
        return "undecided"
    return "holds" if min(better) > max(worse) else \
        "does not hold" if max(better) < min(worse) else "undecided"


def columns_of(runs, records):
    """{(data set, task, setting): {row: {seed: its record}}}; a row without a record is empty."""
    columns = {}
    for run in runs:
        row = columns.setdefault(run[:3], {}).setdefault(run.row, {})
        if record := recorded(run, records):
            row[run.seed] = record
    return {column: rows for column, rows in columns.items() if any(rows.values())}


def claim_lines(tables):
    """What the rows say of CLAIMS, on all classes, over the seeds that both have from one step 0.

    tables: (table, column, rows) each
    """
    lines = ["| claim | on | verdict | lead in points (seed) |", "|---|---|---|---|"]
    for claim, where, better, worse in CLAIMS:
        of_claim = [(column, rows[better], rows[worse]) for table, column, rows in tables
                    if table == where and {better, worse} <= rows.keys()]
        if not of_claim:
            lines.append(f"| {claim} |  | not run |  |")
        for column, a, b in of_claim:
            both = sorted(a.keys() & b.keys())
            seeds = [seed for seed in both if a[seed]["step 0"] == b[seed]["step 0"]]
            leads = [f"{100 * (a[seed]['all'] - b[seed]['all']):+.1f} ({seed})" if seed in seeds
                     else f"other step 0 ({seed})" for seed in both]
            outcome = verdict(*([row[seed]["all"] for seed in seeds] for row in (a, b)))
            lines.append(f"| {claim} | {' '.join(column).removesuffix(' disjoint')} | "
                         f"{outcome if both else 'not run'} | {', '.join(leads)} |")
    return lines


def shares_of_joint_and_replay(rows):
    """Lines on two shares over the seeds that have all rows they are made of, from one step 0."""
    def scores(*names):                                 # a tuple for each seed; Joint has no step 0
        several = [rows.get(name, {}) for name in names]
        return [[row[seed]["all"] for row in several]
                for seed in sorted(set.intersection(*map(set, several)))
                if len({rows[name][seed]["step 0"] for name in names if name != "Joint"}) == 1]
    share = lambda text, values: [f"- {text}: {spread(values)} %"] if values else []
    return [*share("HRHF / Joint", [h / j for h, j in scores("HRHF", "Joint") if j]),
            *share("replay recovery, (HRHF - Baseline) / (real - Baseline)",
                   [(full - none) / (real - none) for full, none, real in
                    scores(FULL, BASELINE, REAL) if real != none])]


def table_lines(column, rows):
    lines = [f"| {' '.join(column)} | step 0 | old | new | all | n |", "|---|---|---|---|---|---|"]
    for row, by_seed in rows.items():
        done = list(by_seed.values())
        cells = [spread([d[key] for d in done]) for key in ("step 0", "old", "new", "all")] \
            if done else ["not run"] * 4
        if row.startswith("Joint") and done:            # has one step alone
            cells[0] = "-"
        lines.append(f"| {row} | {' | '.join(cells)} | {len(done)} |")
    shares = shares_of_joint_and_replay(rows)
    return [*lines, "", *shares, *[""] * bool(shares)]


def fakes_lines(records):
    """How good the fakes are: a line a step, then a line a class of voc20 15-1."""
    mean = lambda scores, key: statistics.mean(s[key] for s in scores.values())
    table = lambda title, sets: [f"| {title} | {' | '.join(JUDGED)} | n |", "|---" * 8 + "|", *(
        f"| {name} | " + " | ".join(spread([mean(scores, key) for scores in several])
                                    for key in JUDGED) + f" | {len(several)} |"
        for name, several in sets.items()), ""]
    steps, classes = {}, {}
    for run in dict.fromkeys(run._replace(row="") for runs in study().values() for run in runs
                             if run.seed in SEEDS):
        for step, scores in (recorded(run, records) or {}).get("fakes", {}).items():
            name = " ".join([*run[:3], f"step {step}", run.flags]).strip()
            steps.setdefault(name, []).append(scores)
            for each in scores if run[:5] == ("voc20", "15-1", "disjoint", "", "") else ():
                classes.setdefault(each, []).append({each: scores[each]})
    of_classes = ["Of every class, over all steps and seeds of HRHF's voc20 15-1 disjoint:", "",
                  *table("voc20 fakes of", dict(sorted(classes.items())))]
    return [*(table("fakes of", steps) if steps else ["Not run.", ""]),
            *(of_classes if classes else [])]


def figure3_lines(record):
    shares = record["share"]
    classes = [name for name in next(iter(shares.values())) if name != "background"]
    cells = lambda values: " | ".join(f"{100 * v:.1f} %" for v in values)
    lines = [f"`{record['command']}`: share of the pixels that the inverted network gives to the "
             "class asked for.", "",
             "| r | " + " | ".join(shares) + " |", "|---" * (1 + len(shares)) + "|"]
    lines += [f"| {name} | {cells(share[name] for share in shares.values())} |" for name in classes]
    means = [statistics.mean(share[name] for name in classes) for share in shares.values()]
    return [*lines, f"| all | {cells(means)} |", "",
            "Fakes and the network's segmentation, from top to bottom the command's classes:", "",
            "![Figure 3](figure3.png)", ""]


def report(records):
    """The tables of results/README.md as a string, from the records alone."""
    lines, tables = [], []
    for table, runs in study().items():
        lines += [f"## {TITLES[table]}", ""]
        columns = columns_of(runs, records)
        for column, rows in columns.items():
            lines += table_lines(column, rows)
            tables.append((table, column, rows))
        lines += [] if columns else ["Not run.", ""]
    lines += ["## How good the fakes are", "", *fakes_lines(records)]
    lines += ["## The same noise at three scales (paper: Figure 3)", ""]
    lines += figure3_lines(records["figure3"]) if "figure3" in records else ["Not run.", ""]
    asked = records.get("figure4", {}).get("asked", [])
    lines += ["## Fakes and predictions of voc20 15-1, seed 1 (paper: Figure 4)", "",
              f"Fakes of step 1 ({', '.join(asked) or 'not run'}), the inverted network's "
              "segmentation under each:", "", "![fakes](fakes.png)", "",
              "Image, FT, MiB and HRHF after the last step, truth, in VOC's colours:", "",
              "![predictions](figure4.png)"]
    schedules = [f"- {name}: `{flags}`" + "".join(f", `{method} {rate}`"
                                                  for method, rate in RATES[name].items())
                 for name, flags in SETTINGS.items()]
    return "\n".join(["", "", "Schedules, and learning rates that differ:", "", *schedules, "",
                      "## What holds", "", *claim_lines(tables), "", *lines, ""])


# ------------------------------------------------------------------------------ voc6 and voc20

def make_photographs(root):
    """voc6 and voc20 out of the VOC 2012 in `root`, beside it: listed images, short side at most
    192. voc6 is a `folder` with ids 1 .. 6, voc20 has VOC's own layout and ids."""
    root, keep = Path(root), np.arange(256, dtype=np.uint8)
    voc = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        if not (voc / folder).is_dir():
            raise InputError(f"--make {root}: no VOC 2012 there ({voc / folder} is no folder); "
                             f"python data.py voc --data-root {root}")
    six = np.array([VOC6_CLASSES.index(c) if c in VOC6_CLASSES else 0 for c in data.VOC_CLASSES]
                   + [0] * (255 - len(data.VOC_CLASSES)) + [255], np.uint8)
    for name, table, quality, target in (
            ("voc6", six, 90, root / "voc6"),
            ("voc20", keep, 88, root / "voc20" / "VOCdevkit" / "VOC2012")):
        lists = json.loads((HERE / "results" / f"{name}.json").read_text())
        for split, names in lists.items():
            masks = "SegmentationClass" if split == "val" else "SegmentationClassAug"
            made = target / ("SegmentationClass" if name == "voc6" else masks)
            for folder in (target / "JPEGImages", made, target / "ImageSets/Segmentation"):
                folder.mkdir(parents=True, exist_ok=True)
            for each in names:
                image = data.read_image(voc / "JPEGImages" / f"{each}.jpg")
                mask = Image.fromarray(table[np.array(data.read_mask(voc / masks / f"{each}.png"))])
                scale = min(1, 192 / min(image.size))
                size = [round(side * scale) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC)
                mask = mask.resize(size, Image.Resampling.NEAREST)
                write_atomically(target / "JPEGImages" / f"{each}.jpg",
                                 lambda p: image.save(p, "JPEG", quality=quality))
                write_atomically(made / f"{each}.png", lambda p: mask.save(p, "PNG"))
            (target / f"ImageSets/Segmentation/{split}.txt").write_text(
                "".join(f"{each}\n" for each in names))
        if name == "voc6":
            (target / "classes.txt").write_text("".join(f"{c}\n" for c in VOC6_CLASSES))
        numbers = ", ".join(f"{len(names)} {split}" for split, names in lists.items())
        print(f"{numbers} images in {root / name}")


def check_photographs(args, name):
    """The records are of these lists of images, these classes and these weights alone."""
    root = Path(args.photos, name)
    wanted = {root / "classes.txt": VOC6_CLASSES} if name == "voc6" else {}
    lists = (root if name == "voc6" else root / "VOCdevkit" / "VOC2012") / "ImageSets/Segmentation"
    for split, names in json.loads((HERE / "results" / f"{name}.json").read_text()).items():
        wanted[lists / f"{split}.txt"] = names
    for path, words in wanted.items():
        if not path.is_file() or path.read_bytes().split() != [word.encode() for word in words]:
            raise InputError(f"--photos {args.photos}: not {name}, {path} differs; see --make")
    if args.weights != "imagenet":
        check_file(Path(args.weights))
        if not sha256(Path(args.weights).read_bytes()).startswith("b0353104"):
            raise InputError(f"--weights {args.weights}: not torchvision's mobilenet_v2-b0353104."
                             "pth, whose name has its digest")


# ------------------------------------------------------------------------------------ commands

def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", default="", metavar="TEXT", help="runs with this in the name; figure3; figure4")
    a("--list", action="store_true", help="print their names and commands, run nothing")
    a("--tables", action="store_true", help="run nothing, write the tables of results/README.md")
    a("--photos", default="data", help="the folder of voc20 and voc6")
    a("--weights", default="imagenet", help="of MobileNetV2; torchvision's file saves a download")
    a("--runs", default="runs/study", help="folder of the runs")
    a("--make", metavar="DATA_ROOT", help="make voc20 and voc6 beside the VOC 2012 there")
    return parser.parse_args(argv)


def prose(readme):
    """What stands above the tables of results/README.md, with the line that ends it."""
    try:
        head, mark, _ = readme.read_text(encoding="utf-8").partition(MARK)
    except UnicodeDecodeError:
        mark = ""
    if not mark:
        raise InputError(f"{readme}: lacks the line {MARK}; `git checkout {readme}` brings it back")
    return head + mark


def write_tables(path):
    """Sort the records; the tables of results/README.md of them."""
    records, readme = dict(sorted(read_records(path).items())), path.with_name("README.md")
    tables = prose(readme) + report(records)
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records.values())
    write_atomically(path, lambda p: p.write_text(text))
    write_atomically(readme, lambda p: p.write_text(tables, encoding="utf-8"))


def main(argv=None):
    args = parse(argv)
    if args.make is not None:
        return make_photographs(args.make)
    roots = {name: Path(args.photos, name) for name in ("voc20", "voc6")}
    place = Place({"shapes": "data", **roots}, args.weights, Path(args.runs),
                  HERE / "results" / "study.jsonl")
    runs = {run.name: run for runs in study().values() for run in runs if args.only in run.name}
    pictures = [draw for draw in (figure3, figure4) if args.only == draw.__name__]
    if not (runs or pictures or args.tables):
        raise InputError(f"--only {args.only}: in no run's name; --list prints them all")
    if args.list:
        return print("\n".join(f"{name:45} {shell_command(run, place)}"
                               for name, run in runs.items()))
    diverged = []
    if not args.tables:
        records = read_records(place.records)
        todo = [run for run in runs.values() if not recorded(run, records)]
        used = [run.dataset for run in todo] + ["voc20"] * len(pictures)
        for name in sorted({*used} - {"shapes"}):
            check_photographs(args, name)
        prose(place.records.with_name("README.md"))     # before hours of runs
        for run in todo:                                # one that diverges does not stop the rest
            try:
                perform(run, place)
            except FloatingPointError as error:
                diverged.append(f"{run.name}: {error}")
        for draw in pictures:
            draw(place)
    write_tables(place.records)
    if diverged:
        raise FloatingPointError(f"{len(diverged)} of {len(todo)} diverged; {diverged[0]}")


if __name__ == "__main__":
    with plain_errors("reproduce.py"):
        main()
