"""
The paper's tables at a size that two CPU cores can run: every run, and the tables and pictures made of them.

    python reproduce.py --voc6 data/voc6            # all runs that have no result yet, then results/README.md
    python reproduce.py --only table2 --seed 1      # some of them; another process may do --seed 2 at the same time
    python reproduce.py --quick                     # two iterations of every kind of run that shapes has, thrown away
    python reproduce.py --make-voc6 data            # voc6 out of VOC 2012: needs data/VOCdevkit with SegmentationClassAug

A run is a command of train.py. Its result, results/study/<run>.json, is committed, and a run that has one
is skipped unless its network is needed (a judge, a step 0, Figure 4) and gone; an interrupted run goes on
where it stopped. Runs of one data set, task and seed share the step 0 of their first on a machine (--step0), as far as
their method allows, and the fakes made out of it; Joint's only step is every task's.

What is chosen is chosen on training images: learning rates on voc6-dev, whose test set is every fifth
training image of voc6 (table "rates"); the weights of SegInversion by a judge, the Joint network of a seed
that no table has (--only weights).
"""
import argparse
import contextlib
import fcntl
import filecmp
import hashlib
import json
import math
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import data
import seginversion
import train
from baselines import METHODS
from bench import commit
from data import InputError, derive_seed, write_atomically
from eval import colour, judge_fakes, save_grid, test_view
from model import load_model
from seginversion import save_fakes, segment, synthesize

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)

# The schedule of each data set; the same for every method but for the learning rate (CHOSEN).
SETTINGS = {
    "shapes": "--dataset shapes",
    "voc6": "--dataset folder --backbone mobilenet_v2 --crop 96 --batch-size 16 --epochs0 6 --epochs 8 --lr0 0.02 --lr 0.003 "
            "--num-fakes 64 --fake-steps 200 --fake-classes 1 --fake-lr 0.1 --workers 1",
}
SETTINGS["voc6-dev"] = SETTINGS["voc6"]
TASK = {"shapes": "15-1", "voc6": "4-1"}                    # of the searches, the judges and the pictures
JUDGE = 7                                                   # the seed of a Joint network that judges fakes
ORACLE = "--fake real"                                      # not in train.py: outside the protocol
VOC6_CLASSES = "background cat cow dog horse person sheep".split()
# whose fakes are judged: those that have fakes of their own
JUDGED_FLAGS = ("", "--spectrum 0", "--spectrum 0 --tv 3", "--spectrum 1", "--bn 3",
                "--spectrum 1 --bn 3", "--spectrum 1 --retry-fakes",
                *(f"--r {r}" for r in "avg 0.5 1 5 10 20 max random-image".split()))
FIGURE3 = "--classes cat cow dog horse --r 0.5,5,10 --images 64"
# what the fakes of a step 0 hang upon
PLAN = "num_fakes fake_batch fake_classes fake_steps fake_lr r tv bn retry_fakes spectrum".split()
LATER = ("lr", "epochs", "lam", "num_fakes")                # does not matter to a step 0 and 16 fakes of it


class Run(NamedTuple):
    dataset: str
    task: str
    setting: str
    row: str                        # its name in the table
    flags: str                      # what it adds to SETTINGS
    seed: int

    @property
    def name(self):                 # of its flags, not of its row: rows of several tables may be one and the same run
        flags = plain(self.flags.removeprefix("--method ")) or "hrhf"
        return f"{self.dataset}-{self.task}-{self.setting}-{flags}-{self.seed}"

    @property
    def command(self):
        return f"{SETTINGS[self.dataset]} --task {self.task} --setting {self.setting} --seed {self.seed} {self.flags}".strip()

    @property
    def args(self):                 # of train.py, which does not know the oracle
        return train.parse(self.command.replace(ORACLE, "--fake seginversion").split())

    @property
    def settings(self):             # what matters to it: train.py's, defaults written out, without those it does not use
        method, real = METHODS[self.args.method], ORACLE in self.flags
        unused = {"out", "data_root", "step0", "pretrained", "workers", "compile", "amp"}
        if method.offline:
            unused |= {"lr", "epochs"}
        if self.args.fake != "seginversion" or real:
            unused |= set(PLAN) - (set() if self.args.fake == "none" else {"num_fakes", "fake_batch"})
        return {"images": self.dataset, "real": real,
                **{key: value for key, value in vars(self.args).items() if key not in unused}}


class Place(NamedTuple):
    roots: dict                     # data set -> its --data-root; "weights" -> MobileNetV2's
    runs: Path                      # run folders, and what runs share
    results: Path                   # what is committed
    extra: tuple = ()               # more flags for train.py


def recorded(path, settings, ignored=()):
    """What a file holds, if it is of these settings, else None."""
    if path.exists():
        try:
            record = data.read_json(path, {"settings": dict})
        except InputError:
            raise InputError(f"{path}: damaged; remove it, and reproduce.py makes it again") from None
        matter = lambda these: {key: value for key, value in these.items() if key not in ignored}
        if matter(record["settings"]) == matter(settings):
            return record


def plain(flags):
    """Flags as a part of a file's name."""
    return flags.replace("--", "").replace(" ", "-").replace(":", "-")


MAIN = {"FT": "--method ft", "LwF": "--method lwf", "MiB": "--method mib", "HRHF": "", "Joint": "--method joint"}
OTHERS = {"PI": "--method pi", "EWC": "--method ewc", "RW": "--method rw", "LwF-MC": "--method lwf-mc", "ILT": "--method ilt"}
AS_IT_IS = "HRHF as it is here"
# Our records of these are of another machine, whose rounding trained another step 0; on one machine
# AGAIN is AS_IT_IS, and WEAKER_AGAIN is WEAKER, of which there are the first machine's two seeds.
SECOND = "from the second step 0"
AGAIN, WHITE = f"HRHF, {SECOND}", f"white noise, plain gradient, {SECOND}"
WHITE_TV3 = f"white noise, plain gradient, --tv 3, {SECOND}"           # the best of its trials in WEIGHTS, by judge IoU
WEAKER = "weaker BatchNorm matching"
WEAKER_AGAIN = f"{WEAKER}, {SECOND}"
RETRIED = f"fakes without their class inverted again, {SECOND}"
HRHF, BASELINE, REAL = "+ SegInversion (HRHF)", "Baseline (no fakes)", "real old images (outside the protocol)"
ROWS = {
    "table2": {BASELINE: "--fake none", "+ Noise": "--fake noise", HRHF: "", REAL: ORACLE},
    "table3": {"AVG": "--r avg", "MAX": "--r max", "SAA (random r)": ""},
    "table4": {**{f"r = {r}": f"--r {r}" for r in ("0.5", "1", "5", "10", "20")}, "random": "",
               "random, one r an image": "--r random-image"},
    "table5": {"without KD": "--lam 0", "with KD": ""},
    "table6": {"1:1": "", "1:2": "--real-fake 1:2", "2:1": "--real-fake 2:1"},
    "ours": {AS_IT_IS: "", "earlier fakes kept": "--keep-fakes", AGAIN: "--spectrum 1",
             WHITE: "--spectrum 0", WHITE_TV3: "--spectrum 0 --tv 3", WEAKER_AGAIN: "--spectrum 1 --bn 3",
             RETRIED: "--spectrum 1 --retry-fakes"},
}
FASTER = "--lr 0.01 --lam 3"
TRIED = {                           # on voc6-dev: towards Joint, and what of it is the fakes' fault
    AS_IT_IS: "--lr 0.003", WEAKER: "--bn 3", "three times the epochs": "--epochs 24",
    "1:3, real : fake": "--real-fake 1:3", "one r an image": "--r random-image",
    "rate 0.01, distillation x 3": FASTER, "these, three times the epochs": f"{FASTER} --epochs 24",
    "these, 256 fakes": f"{FASTER} --num-fakes 256", f"these, 64 {REAL}": f"{ORACLE} {FASTER}",
    f"these, 256 {REAL}": f"{ORACLE} {FASTER} --num-fakes 256", "Joint": MAIN["Joint"],
    AGAIN: "--lr 0.003 --spectrum 1", f"{AGAIN}, rate 0.01": "--lr 0.01 --spectrum 1",
    f"{SECOND}, rate 0.01, 64 {REAL}": f"{ORACLE} --lr 0.01",
    f"{SECOND}, rate 0.01, 2,048 {REAL}": f"{ORACLE} --lr 0.01 --num-fakes 2048",
    "30 epochs in step 0": "--epochs0 30", "30 epochs in every step, as in the paper": "--epochs0 30 --epochs 30",
    "Joint, 30 epochs": f"{MAIN['Joint']} --epochs0 30",
}
CLAIMS = [                          # what the paper says, and of what is ours we, as table, better row, worse row
    ("HRHF beats MiB", "table1", "HRHF", "MiB"), ("HRHF beats LwF", "table1", "HRHF", "LwF"),
    ("HRHF beats fine-tuning", "table1", "HRHF", "FT"),
    ("fakes beat no fakes", "table2", HRHF, BASELINE), ("fakes beat noise", "table2", HRHF, "+ Noise"),
    ("SAA beats AVG", "table3", "SAA (random r)", "AVG"), ("SAA beats MAX", "table3", "SAA (random r)", "MAX"),
    *[(f"a random r beats r = {r}", "table4", "random", f"r = {r}") for r in ("0.5", "1", "5", "10", "20")],
    ("one random r an image beats one for every class of it", "table4", "random, one r an image", "random"),
    ("distillation helps", "table5", "with KD", "without KD"),
    ("1:1 beats 1:2", "table6", "1:1", "1:2"), ("1:1 beats 2:1", "table6", "1:1", "2:1"),
    ("1/f noise and gradients beat white ones, at the weights chosen with them", "ours", AGAIN, WHITE),
    ("1/f noise and gradients beat white ones with --tv 3, their own best of those tried", "ours", AGAIN, WHITE_TV3),
    ("keeping earlier fakes helps", "ours", "earlier fakes kept", AS_IT_IS),
    (f"{WEAKER} helps", "ours", WEAKER, AS_IT_IS),
    (f"{WEAKER} helps, {SECOND}", "ours", WEAKER_AGAIN, AGAIN),
    ("inverting again where a class is not found helps", "ours", RETRIED, AGAIN),
]
CURVES = {                          # distillation weights; None is the method's own
    **{f"MiB, {lam or 10}": "--method mib" + (f" --lam {lam}" if lam else "") for lam in (1, 3, None, 30, 100)},
    **{f"HRHF, {1 if lam is None else lam}": "" if lam is None else f"--lam {lam}" for lam in (0, 0.3, None, 3, 10)},
}
RATES = ("0.001", "0.003", "0.01", "0.03")                  # tried on voc6-dev
# the paper's; PI diverges on shapes at 0.003
PENALTIES = {f"--method {name}": "--lr 0.001" for name in ("pi", "ewc", "rw")}
CHOSEN = {"voc6": {"--method ft": "--lr 0.03", "--method lwf": "--lr 0.001", "--method mib": "--lr 0.01", **PENALTIES},
          "shapes": PENALTIES}                              # HRHF's and the others' are in SETTINGS
WEIGHTS = {                         # tried for SegInversion: around SETTINGS, published ones, other sizes and batches
    "voc6": [f"--tv {tv} --bn {bn}" for tv in (0.1, 0.3, 1) for bn in (3, 10, 30)]
    + [f"{flag} --tv {tv} --bn 10" for flag in ("--crop 64", "--crop 128") for tv in (0.1, 0.3, 1)]
    + [f"--fake-batch 8 --tv 0.3 --bn {bn}" for bn in (3, 10, 30)]
    + [f"{flag} --tv 0.3 --bn 10" for flag in ("--fake-lr 0.05", "--fake-lr 0.25", "--fake-steps 100", "--fake-steps 400")]
    + [f"--spectrum 0 --tv {tv} --bn {bn}" for tv, bn in ((0.3, 10), (1, 3), (3, 10))]
    + [f"--spectrum {spectrum} --fake-lr 0.25 --tv 0.355 --bn 1.16" for spectrum in (0, 1)],
    "shapes": [f"--spectrum {spectrum} --fake-lr {lr} --tv {tv} --bn {bn}" for spectrum in (0, 1) for lr in (0.1, 0.25)
               for tv, bn in ((0.3, 3), (0.3, 10), (1, 3), (1, 10), (3, 3), (3, 10))],
}
TITLES = {"rates": "Learning rates (on a fifth of the training images)",
          "table1": "Methods (paper: Table 1)", "table2": "Fakes (paper: Table 2)", "table3": "Aggregation (paper: Table 3)",
          "table4": "Scale r (paper: Table 4)", "table5": "Knowledge distillation (paper: Table 5)",
          "table6": "Real : fake in a mini-batch (paper: Table 6)",
          "ours": "What is ours (not in the paper), and what else was tried",
          "curves": "Old against new classes over the weight of distillation"}


def study():
    """{table: its runs}, the most telling first."""
    def runs(rows, dataset, task, seeds=SEEDS, setting="disjoint"):
        rate = lambda flags: f"{flags} {CHOSEN.get(dataset, {}).get(' '.join(flags.split()[:2]), '')}".strip()
        return [Run(dataset, task, setting, row, rate(flags), seed) for seed in seeds for row, flags in rows.items()]
    first = SEEDS[:1]
    tables = {
        "rates": runs({f"{row}, {lr}": f"{MAIN[row]} --lr {lr}".strip()
                       for row in ("FT", "LwF", "MiB", "HRHF") for lr in RATES}, "voc6-dev", "4-1", first),
        "table1": runs(MAIN, "voc6", "4-1") + runs(MAIN, "voc6", "3-1")
        + [run for task in ("15-1", "15-5", "19-1") for run in runs(MAIN, "shapes", task) + runs(OTHERS, "shapes", task, first)]
        + runs(OTHERS, "voc6", "4-1", first) + runs(OTHERS, "voc6", "3-1", first)
        + [run for task in ("5-1", "4-2") for run in runs({**MAIN, **OTHERS}, "voc6", task, first)]
        + [run for task in ("4-1", "3-1") for run in runs({**MAIN, **OTHERS}, "voc6", task, first, "overlapped")],
        "table2": runs(ROWS["table2"], "voc6", "4-1") + runs(ROWS["table2"], "voc6", "3-1")
        + runs(ROWS["table2"], "shapes", "15-1"),
        **{table: runs(ROWS[table], "shapes", "15-5") for table in ("table3", "table4", "table5", "table6")},
        "ours": runs(ROWS["ours"], "voc6", "4-1") + runs({WEAKER: "--bn 3"}, "voc6", "4-1", SEEDS[:2])
        + runs(ROWS["ours"], "voc6", "3-1")
        + [run for task in ("15-1", "15-5")
           for run in runs({row: ROWS["ours"][row] for row in (AS_IT_IS, AGAIN, WHITE, RETRIED)}, "shapes", task)],
        "curves": runs(CURVES, "voc6", "4-1", first),
    }
    tables["table5"] += runs(ROWS["table5"], "voc6", "3-1")
    tables["ours"] += runs(TRIED, "voc6-dev", "4-1", first)
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


def hold_out(voc6, folder):
    """voc6 without its val: every fifth training image tests, the others train."""
    voc6, lists = Path(voc6), folder / "ImageSets/Segmentation"
    lines = (voc6 / "ImageSets/Segmentation/train.txt").read_text().splitlines(keepends=True)
    lists.mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "SegmentationClass", "classes.txt"):
        write_atomically(folder / name, lambda p: p.symlink_to((voc6 / name).resolve()))
    for split, part in (("val", lines[::5]), ("train", [line for i, line in enumerate(lines) if i % 5])):
        write_atomically(lists / f"{split}.txt", lambda p: p.write_text("".join(part)))
    return folder


def flags_of(run, place, step0, weights):
    """train.py's flags for a run in its folder: from a given step 0 or, if it is None, from these weights of the backbone."""
    if run.dataset == "voc6-dev":
        root = hold_out(place.roots["voc6"], place.runs / "voc6-dev")
    else:
        root = place.roots[run.dataset]
    flags = [*run.command.replace(ORACLE, "").split(), "--data-root", str(root), "--out", str(place.runs / run.name),
             *place.extra]
    if run.dataset != "shapes":
        flags += ["--pretrained", str(weights)]
    return flags + (["--step0", str(step0)] if step0 else [])


def execute(run, flags):
    """Run train.py in the run's folder; its results.json as an object."""
    folder, of_train = Path(train.parse(flags).out), train.synthesize
    if ORACLE in run.flags:
        train_set = data.load(run.args.dataset, train.parse(flags).data_root, "train")
        groups = data.task_steps(run.task, len(train_set.classes) - 1)

        def replay(model, folder, *rest, **options):
            step = int(Path(folder).name.removeprefix("fakes-step-"))
            return real_replay(train_set, groups, step, model, folder, *rest, **options)
        train.synthesize = replay
    try:
        train.main(flags)
    finally:
        train.synthesize = of_train
    return json.loads((folder / "results.json").read_text())


def network(run, place):
    """Path of the last checkpoint of a run; the run is done again if that is gone."""
    perform(run, place, network=True)
    return max((place.runs / run.name).glob("step-*.pth"), key=lambda path: int(path.stem.removeprefix("step-")))


def judge(dataset, place):
    """Path of a network that had no part in any synthesis: Joint, of a seed of its own."""
    return network(Run(dataset, TASK[dataset], "disjoint", "Joint", "--method joint", JUDGE), place)


def shared_step0(run, place):
    schedule = plain(f"{run.args.epochs0} {run.args.lr0} {run.args.batch_size} {run.args.crop}")
    # Joint's only step is every task's
    of = "joint" if METHODS[run.args.method].offline else f"{run.task}-{run.setting}"
    return place.runs / f"step0-{run.dataset}-{of}-{run.seed}-{schedule}.pth"


@contextlib.contextmanager
def alone(folder):
    """One process at a time inside: several may want the same judge."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def copy_folder(source, target):
    """Whole, or not at all; nothing if there is no source, or the target is there."""
    if source.exists() and not target.exists():
        part = target.with_name(target.name + "-part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        part.rename(target)


def begun(run, place):
    """train.py's settings in the folder of a run that can go on there, else None."""
    folder = place.runs / run.name
    trained = any(folder.glob("*.pth")) and (folder / "settings.json").exists()
    # perform removes the step 0 of a finished run first
    if trained and ((folder / "step-0.pth").exists() or not (folder / "results.json").exists()):
        there = data.read_json(folder / "settings.json", {"dataset": str})
        here = vars(train.parse([*run.command.replace(ORACLE, "").split(), *place.extra]))
        may_differ = "out data_root workers compile step0 pretrained".split()
        if all(there.get(key, False) == here[key] for key in here if key not in may_differ):
            return there


def perform(run, place, network=False):
    """Do one run, unless it has a result (and, for `network`, its last checkpoint is there); write its result.

    Its checkpoints and fakes are removed then, but for what other runs build upon.
    """
    result, folder, shared = place.results / f"{run.name}.json", place.runs / run.name, shared_step0(run, place)
    args, weights = run.args, place.roots.get("weights")
    method = METHODS[args.method]
    shares = not (method.importance or args.method == "lwf-mc")                     # those have a step 0 of their own
    with alone(folder):
        finished = (folder / "results.json").exists() and any(folder.glob("step-*.pth"))
        if recorded(result, run.settings) and (finished or not network):
            return
        print(f"reproduce.py: {run.name}", flush=True)
        if there := begun(run, place):
            step0, weights = there["step0"], there["pretrained"]
        else:                                               # of other settings, or with nothing left to go on from
            shutil.rmtree(folder, ignore_errors=True)
            step0 = shared if shares and shared.exists() else None
        fakes = args.fake == "seginversion" and ORACLE not in run.flags
        first_fakes = place.runs / f"{shared.stem}-fakes-{plain(' '.join(str(vars(args)[k]) for k in PLAN))}"
        own = folder / "step-0.pth"
        if fakes and (shared.exists() and filecmp.cmp(own, shared, shallow=False) if own.exists() else step0):
            with alone(first_fakes):
                copy_folder(first_fakes, folder / "fakes-step-1")
        began = time.monotonic()
        scores = execute(run, flags_of(run, place, step0, weights))
        seconds = round(time.monotonic() - began)           # of the last launch
        if shares and not shared.exists():
            for of_another in place.runs.glob(f"{shared.stem}-fakes-*[0-9]"):
                shutil.rmtree(of_another)
            write_atomically(shared, lambda p: shutil.copyfile(own, p))
        if fakes and filecmp.cmp(own, shared, shallow=False):
            with alone(first_fakes):
                copy_folder(folder / "fakes-step-1", first_fakes)
        final, first = (steps["background excluded"] for steps in (scores["final"], scores["steps"][0]))
        record = {"command": f"train.py {run.command}", "settings": run.settings, "commit": commit(),
                  "versions": scores["versions"], "old": final["old"], "new": final["new"], "all": final["all"],
                  "step 0": first["all"], "iou": scores["steps"][-1]["iou"], "seconds": seconds}
        if fakes and run.flags in JUDGED_FLAGS and not place.extra and run.dataset in TASK:
            record["fakes"] = {t: judged(folder / f"fakes-step-{t}", folder / f"step-{t - 1}.pth", run.dataset, place)
                               for t in range(1, len(scores["steps"]))}
        place.results.mkdir(parents=True, exist_ok=True)
        write_atomically(result, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
        kept = run.seed == JUDGE or run.name in [r.name for r in figure4_runs().values()]
        for path in [*sorted(folder.glob("step-*.pth"))[:-1 if kept else None], *folder.glob("fakes-step-*/*.png")]:
            path.unlink()


def judged(folder, teacher, dataset, place):
    """judge_fakes of eval.py, for the fakes in a folder."""
    networks = [(model.eval(), about["classes"])
                for path in (teacher, judge(dataset, place)) for model, about in [load_model(path)]]
    args = train.parse(f"{SETTINGS[dataset]} --task {TASK[dataset]}".split())
    train_set = data.load(args.dataset, place.roots[dataset], "train")
    return judge_fakes(folder, networks[0], train_set, networks[1])


def step0(dataset, place):
    """Path of the step 0 that the first seed's runs of a data set's first task share."""
    fine_tuning = next(run for run in study()["table1"] if run[:4] == (dataset, TASK[dataset], "disjoint", "FT"))
    shared, folder = shared_step0(fine_tuning, place), place.runs / fine_tuning.name
    with alone(folder):
        if not shared.exists() and (folder / "results.json").exists():
            if (folder / "step-0.pth").exists():
                write_atomically(shared, lambda p: shutil.copyfile(folder / "step-0.pth", p))
            else:
                shutil.rmtree(folder)
    if not shared.exists():
        perform(fine_tuning, place, network=True)
    return shared


def inversion(dataset, flags):
    """The run whose first 16 fakes try_weights makes."""
    return Run(dataset, TASK[dataset], "disjoint", flags, flags, SEEDS[0])


def tried(dataset, flags, results):
    """try_weights' record, if there is one."""
    return recorded(results / f"weights-{dataset}-{plain(flags)}.json", inversion(dataset, flags).settings, LATER)


def try_weights(dataset, flags, place):
    """16 fakes of a step 0 with these flags of SegInversion, judged; on training images alone."""
    if tried(dataset, flags, place.results):
        return
    result = place.results / f"weights-{dataset}-{plain(flags)}.json"
    print(f"reproduce.py: {result.stem}", flush=True)
    teacher, folder = step0(dataset, place), place.runs / result.stem
    shutil.rmtree(folder, ignore_errors=True)               # of other settings
    args = inversion(dataset, flags).args
    model, _ = load_model(teacher)
    paths = synthesize(model, folder, 16, size=args.crop, batch_size=args.fake_batch, r=args.r, most=args.fake_classes,
                       seed=derive_seed(SEEDS[0], 1, 2), steps=args.fake_steps, lr=args.fake_lr, tv=args.tv, bn=args.bn,
                       spectrum=args.spectrum)
    save_fakes(model, paths, place.runs / f"{result.stem}.png")
    scores = judged(folder, teacher, dataset, place)
    write_atomically(result, lambda p: p.write_text(json.dumps(
        {"settings": inversion(dataset, flags).settings, "commit": commit(), "fakes": scores}, indent=1) + "\n"))


def figure4_runs():
    there = {run.row: run for run in reversed(study()["table1"]) if run[:3] == ("voc6", TASK["voc6"], "disjoint")}
    return {row: there[row] for row in ("FT", "MiB", "HRHF")}


def figure4_settings():
    return {row: run.settings for row, run in figure4_runs().items()}


# ------------------------------------------------------------------------------------------ the pictures

def draw_curves(points):
    """An SVG: old (across) against new mIoU in percent; points {method: [(name, old, new, is the method's own)]}."""
    side, edge, top = 420, 50, 10 * math.ceil(max(1, *(v for ps in points.values() for p in ps for v in p[1:3])) / 10)
    x, y = (lambda v: edge + side * v / top), (lambda v: edge / 2 + side * (1 - v / top))
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{side + 2 * edge}" height="{side + 2 * edge}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for v in range(0, top + 1, 10):
        lines += [f'<path d="M{x(v):.1f} {y(0):.1f}V{y(top):.1f}M{x(0):.1f} {y(v):.1f}H{x(top):.1f}" stroke="#ddd"/>',
                  f'<text x="{x(v):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{v}</text>',
                  f'<text x="{x(0) - 6:.1f}" y="{y(v) + 4:.1f}" text-anchor="end">{v}</text>']
    lines += [f'<text x="{x(top / 2):.1f}" y="{y(0) + 34:.1f}" text-anchor="middle">mIoU of old classes (%)</text>',
              f'<text transform="translate({x(0) - 32:.1f} {y(top / 2):.1f}) rotate(-90)" text-anchor="middle">'
              'mIoU of new classes (%)</text>']
    for i, ((method, places), colour) in enumerate(zip(points.items(), ("#1f77b4", "#d62728"))):
        path = "L".join(f"{x(old):.1f} {y(new):.1f}" for _, old, new, _ in places)
        lines += [f'<path d="M{path}" stroke="{colour}" fill="none" stroke-width="2"/>',
                  f'<text x="{x(top) - 6:.1f}" y="{y(top) + 16 + 16 * i:.1f}" fill="{colour}" text-anchor="end">'
                  f'{method}</text>']
        for name, old, new, own in places:
            lines += [f'<circle cx="{x(old):.1f}" cy="{y(new):.1f}" r="{7 if own else 4}" fill="{colour}"/>',
                      f'<text x="{x(old) + 8:.1f}" y="{y(new) - 6:.1f}" fill="{colour}">{name}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def curves(results):
    """draw_curves' points, means over the seeds; none before every weight has a result."""
    cells, points = cells_of(study()["curves"], results), {}
    for row, done in cells.items() if all(cells.values()) else ():
        method, name = row.split(", ")
        old, new = (100 * statistics.mean(d[key] for d in done) for key in ("old", "new"))
        points.setdefault(method, []).append((name, old, new, CURVES[row] == MAIN[method]))
    return points


def beaten_points(points, method, other):
    """How many weights of another method are worse than one of this method in old and new at once."""
    worse = [any(old > o and new > n for _, old, new, _ in points[method]) for _, o, n, _ in points[other]]
    return (f"{sum(worse)} of {other}'s {len(worse)} weights: one of {method}'s {len(points[method])} is better "
            "in old and new at once")


def figure3_settings():
    return {**inversion("voc6", "").settings, "figure": FIGURE3}


def figure3(place):
    """Same noise, three scales, out of voc6's step 0; the shares of pixels to figure3.json.

    The images take the classes in turn, as the fakes do: the statistics that --bn asks a batch for are those of all classes.
    """
    args, path = inversion("voc6", "").args, place.results / "figure3.json"
    if recorded(path, figure3_settings(), LATER):
        return
    weights = [f"--{flag}={value}" for flag, value in (("steps", args.fake_steps), ("lr", args.fake_lr), ("tv", args.tv),
                                                       ("bn", args.bn), ("spectrum", args.spectrum))]
    shares = seginversion.main([*FIGURE3.split(), *weights, "--checkpoint", str(step0("voc6", place)),
                                "--out", str(place.results.parent / "figure3.png")])
    write_atomically(path, lambda p: p.write_text(json.dumps(
        {"settings": figure3_settings(), "commit": commit(), "share": shares}, indent=1) + "\n"))


def figure4(place, count=6):
    """Image, FT, MiB, HRHF, truth: test images spread over voc6's val, by the last networks of the first seed's runs.

    Writes fakes.png beside it: the first fakes of that HRHF run.
    """
    picture, record = place.results.parent / "figure4.png", place.results / "figure4.json"
    if recorded(record, figure4_settings()):
        return
    models = {row: load_model(network(run, place)) for row, run in figure4_runs().items()}
    fakes = place.runs / figure4_runs()["HRHF"].name / "fakes-step-1.png"
    write_atomically(picture.with_name("fakes.png"), lambda p: shutil.copyfile(fakes, p))
    names = models["HRHF"][1]["classes"]
    test_set = data.load("folder", place.roots["voc6"], "val")
    steps = data.task_steps(TASK["voc6"], len(names) - 1)
    view = test_view(test_set, test_set.labels(), steps, len(steps) - 1, models["HRHF"][1]["crop"], "folder")
    panels, shown = [], []
    for position in np.linspace(0, len(view.indices) - 1, count).astype(int).tolist():
        image, target = view[position, 0]
        x = image[None]
        panels += [data.denormalise(image), *(segment(model, x)[0] for model, _ in models.values()), colour(target)]
        shown.append(", ".join(names[c] for c in target.unique().tolist() if 0 < c < 255))
    place.runs.mkdir(parents=True, exist_ok=True)
    save_grid(panels, 2 + len(models), place.runs / "figure4.png")
    grid, margin = Image.open(place.runs / "figure4.png"), 90
    whole = Image.new("RGB", (grid.width + margin, grid.height + 14), "white")
    whole.paste(grid, (margin, 14))
    for i, text in enumerate(("image", *models, "truth")):
        ImageDraw.Draw(whole).text((margin + 4 + i * grid.width // (2 + len(models)), 1), text, "black")
    for i, text in enumerate(shown):
        ImageDraw.Draw(whole).multiline_text((4, 18 + i * grid.height // count), text.replace(", ", "\n"), "black")
    write_atomically(picture, lambda p: whole.save(p, "PNG"))
    write_atomically(record, lambda p: p.write_text(json.dumps(
        {"settings": figure4_settings(), "commit": commit()}, indent=1) + "\n"))


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


def compared(table, cells):
    """What a table's cells, {row: its results}, say of CLAIMS, over the seeds that both rows have, on all classes.

    Yields claim, verdict, the better row's scores, the worse row's, the seeds, and those whose step 0 differs.
    """
    for text, where, better, worse in CLAIMS:
        a, b = ({d["seed"]: d for d in cells.get(row, [])} for row in (better, worse))
        if where == table and (both := sorted(a.keys() & b.keys())):
            scores = [[of[seed]["all"] for seed in both] for of in (a, b)]
            yield text, verdict(*scores), *scores, both, {s for s in both if a[s]["step 0"] != b[s]["step 0"]}


def claims(table, cells):
    """Lines on what a table's cells, {row: its results}, say of the paper's claims, and the shares made of three rows."""
    lines, scores = [], {row: {d["seed"]: d["all"] for d in done} for row, done in cells.items()}
    for text, outcome, a, b, seeds, apart in compared(table, cells):
        gains = ", ".join(f"{100 * (x - y):+.1f} ({seed}{', other step 0' if seed in apart else ''})"
                          for x, y, seed in zip(a, b, seeds))
        lines.append(f"- {text}: **{outcome}** ({spread(a)} against {spread(b)}; by seed: {gains})")
    h, joint = (scores.get(row, {}) for row in ("HRHF", "Joint"))
    if shares := [h[seed] / joint[seed] for seed in sorted(h.keys() & joint.keys()) if joint[seed]]:
        lines.append(f"- HRHF / Joint: {spread(shares)} %")
    h, b, r = (scores.get(row, {}) for row in (HRHF, BASELINE, REAL))
    if shares := [(h[seed] - b[seed]) / (r[seed] - b[seed])
                  for seed in sorted(h.keys() & b.keys() & r.keys()) if r[seed] != b[seed]]:
        lines.append(f"- replay recovery, (HRHF - Baseline) / (real - Baseline): {spread(shares)} %")
    return lines + [""] if lines else []


def at_a_glance(tables):
    """A line a claim: on which tables, {name of a column: (table, cells)}, it holds, and with which mean lead in points."""
    outcomes = ("holds", "undecided", "does not hold")
    lines = [f"| claim | {' | '.join(outcomes)} |", "|---|---|---|---|"]
    found = {text: {outcome: [] for outcome in outcomes} for text, *_ in CLAIMS}
    for name, table, cells in tables:
        for text, outcome, a, b, seeds, apart in compared(table, cells):
            notes = [f"n = {len(seeds)}"] * (len(seeds) != len(SEEDS)) + [f"other step 0: {seed}" for seed in sorted(apart)]
            lead = f"{name} {100 * (statistics.mean(a) - statistics.mean(b)):+.1f}" + f" ({', '.join(notes)})" * bool(notes)
            found[text][outcome.split(" (")[0]].append(lead)
    return lines + [f"| {text} | {' | '.join(', '.join(where) for where in by_outcome.values())} |"
                    for text, by_outcome in found.items() if any(by_outcome.values())]


def cells_of(runs, results):
    """{row: the results of its runs that there are, of the settings as they are now}."""
    cells = {run.row: [] for run in runs}
    for run in runs:
        if done := recorded(results / f"{run.name}.json", run.settings):
            cells[run.row].append({**done, "seed": run.seed})
    return cells


def judged_row(name, fakes):
    """A line of a table out of judge_fakes' results, {class: its numbers} each: means over classes, then spread."""
    mean = lambda scores, key: statistics.mean(s[key] for s in scores.values())
    return f"| {name} | " + " | ".join(spread([mean(scores, key) for scores in fakes]) for key in JUDGED) + f" | {len(fakes)} |"


JUDGED = ("found", "sure", "size", "real size", "judge found", "judge IoU")
JUDGED_HEAD = f" | {' | '.join(JUDGED)} | n |\n|{'---|' * (len(JUDGED) + 2)}"


def report(results):
    """results/README.md as a string: every table, from the committed results alone."""
    lines = ["# Results of the study", "",
             "Written by `python reproduce.py`; do not edit. mIoU in percent, background excluded, mean ± standard deviation over n",
             "seeds. \"Step 0\" is the network that the rows of a column start from, on its own classes (PI, EWC, RW and LwF-MC train",
             "their own); where two rows of as many seeds differ there, some or all of their seeds began from another one, trained with",
             "the same seed on another machine, where rounding differs; the fakes of those with \"second step 0\" were judged by that",
             "machine's judge, too. A claim of the paper, or of ours, \"holds\" or \"does not hold\" here if the two rows do not overlap on",
             "all classes, over the seeds that both have; \"by seed\" is the lead in points of the row that the claim names first, and",
             "the seed. An epoch is one pass over a step's real images; a batch that is half fake makes it twice as many iterations.",
             "`voc6` is photographs, `shapes` is drawn; neither is the paper's VOC 2012 with its network, so only the pattern can be",
             "compared. `voc6-dev` is the training images of `voc6` alone: a fifth of them tests. \"not run\" has no record",
             "yet, perhaps because it diverged. A record whose fakes were judged later, by hand, has that commit",
             "under \"fakes at\"; \"seconds\" and \"commit\" are of a run's last launch.", "", "Schedules:", ""]
    lines += [f"- {name}: `{flags}`" for name, flags in SETTINGS.items()]
    lines += ["", "Learning rates other than those above:", ""]
    lines += [f"- {name}: " + ", ".join(f"`{flags} {rate}`" for flags, rate in rates.items()) for name, rates in CHOSEN.items()]
    lines += ["", "On voc6, HRHF's and LwF's are the best of four on voc6-dev (table below; LwF's the lowest tried), MiB's and FT's are",
              "within half a point of the best. Nothing else was tuned: on shapes all have 0.03, LwF-MC and ILT have HRHF's on voc6 too,",
              "and PI, EWC and RW have the paper's everywhere, as PI diverged on shapes at 0.003 (not recorded)."]
    lines.append("")
    top, tables = len(lines), []
    lines += ["## Weights of SegInversion (on training images)", ""]
    lines += ["16 fakes of step 0 each, in percent, by judge IoU. On voc6, of `--tv` and `--bn`, the defaults of train.py are the best with",
              "found > 95. The ones of shapes, 2 and 3 at its rate 0.25, lie between its two best with `--spectrum 1`.", MEANING, ""]
    for dataset in WEIGHTS:
        done = {flags: record["fakes"] for flags in WEIGHTS[dataset] if (record := tried(dataset, flags, results))}
        if not done:
            lines += [f"{dataset} {TASK[dataset]}: not run.", ""]
            continue
        ranked = sorted(done, key=lambda flags: -statistics.mean(s["judge IoU"] for s in done[flags].values()))
        lines += [f"| {dataset} {TASK[dataset]}{JUDGED_HEAD}", *(judged_row(f"`{flags}`", [done[flags]]) for flags in ranked), "",
                  f"{len(done)} of {len(WEIGHTS[dataset])} tried.", ""]
    for table, runs in study().items():
        lines += [f"## {TITLES[table]}", ""]
        for column in dict.fromkeys((r.dataset, r.task, r.setting) for r in runs):
            cells = cells_of([r for r in runs if (r.dataset, r.task, r.setting) == column], results)
            if not any(cells.values()):
                lines += [f"{' '.join(column)}: not run.", ""]
                continue
            lines += [f"| {' '.join(column)} | step 0 | old | new | all | n |", "|---|---|---|---|---|---|"]
            for row, done in cells.items():
                numbers = [spread([d[key] for d in done]) for key in ("step 0", "old", "new", "all")] if done else ["not run"] * 4
                if done and done[0]["settings"]["method"] == "joint":       # has one step alone
                    numbers[0] = "-"
                lines.append(f"| {row} | {' | '.join(numbers)} | {len(done)} |")
            lines += ["", *claims(table, cells)]
            tables.append((" ".join(column).removesuffix(" disjoint"), table, cells))
    lines[top:top] = ["## What holds", "",
                      "The mean lead in points, on all classes, of the row that a claim names first; disjoint, three seeds, unless it says",
                      "otherwise. The seeds are under the tables below; \"other step 0\" names one whose rows began from two. The claims from",
                      "1/f noise on are about what is ours.", "",
                      *at_a_glance(tables), ""]
    if points := curves(results):
        lines += ["![old against new mIoU](curves.svg)", "",
                  "The large points are the methods' own weights. MiB's distillation is a mean over the old classes, HRHF's a sum.", ""]
        lines += [f"- {beaten_points(points, 'HRHF', 'MiB')}", f"- {beaten_points(points, 'MiB', 'HRHF')}", ""]
    fakes = {}
    for run in dict.fromkeys(run._replace(row="HRHF") for flags in JUDGED_FLAGS
                             for runs in study().values() for run in runs if run.flags == flags):
        for done in cells_of([run], results)["HRHF"]:
            for step, scores in done.get("fakes", {}).items():
                name = f"{run.dataset} {run.task} {run.setting} {run.flags}".strip() + f", step {step}"
                fakes.setdefault(name, []).append(scores)
    if fakes:
        lines += ["## How good the fakes are", "", MEANING, ""]
        for title, flagged in (("HRHF's fakes of", False), ("fakes with a flag", True)):
            if rows := [judged_row(name, scores) for name, scores in fakes.items() if ("--" in name) == flagged]:
                lines += [f"| {title}" + JUDGED_HEAD, *rows, ""]
        three_seeds = ("voc6 4-1 disjoint, ", "voc6 3-1 disjoint, ")
        of_voc6 = [scores for name, all_scores in fakes.items() if name.startswith(three_seeds) for scores in all_scores]
        classes = sorted({name for scores in of_voc6 for name in scores})
        lines += ["Of every class, over the steps and seeds of HRHF's voc6 4-1 and 3-1 disjoint (n sets of fakes):", "",
                  "| voc6 fakes of" + JUDGED_HEAD]
        lines += [judged_row(c, [{c: scores[c]} for scores in of_voc6 if c in scores]) for c in classes] + [""]
    figure4_drawn = recorded(results / "figure4.json", figure4_settings())
    if figure4_drawn:
        lines += ["The first fakes of voc6 4-1, seed 1, the inverted network's own segmentation under each:", "",
                  "![fakes](fakes.png)", ""]
    lines += ["## The same noise at three scales (paper: Figure 3)", ""]
    if record := recorded(results / "figure3.json", figure3_settings(), LATER):
        shares = record["share"]
        classes = [name for name in next(iter(shares.values())) if name != "background"]
        lines += [f"`seginversion.py {FIGURE3}`: share of the pixels that the inverted network gives to the class asked for, in the",
                  "images that ask for it.", "",
                  "| r | " + " | ".join(shares) + " |", "|---|" + "---|" * len(shares)]
        for name in classes:
            lines.append(f"| {name} | " + " | ".join(f"{100 * share[name]:.1f} %" for share in shares.values()) + " |")
        means = [100 * statistics.mean(share[name] for name in classes) for share in shares.values()]
        lines += ["| all | " + " | ".join(f"{mean:.1f} %" for mean in means) + " |"]
        lines += ["", "![Figure 3](figure3.png)", ""]
    else:
        lines += ["Not run.", ""]
    lines += ["## Predictions (paper: Figure 4)", "", "![Figure 4](figure4.png)" if figure4_drawn else "Not run."]
    return "\n".join(lines).rstrip() + "\n"


MEANING = """Means over the old classes. found: share of the images asked to show a class in which the inverted network gives it more than
1 % of the pixels; sure: its mean probability there; size: share of the pixels it gets, beside that in real images; judge found and
judge IoU: the same share, and agreement with the inverted network's map, by a Joint network of another seed."""


def make_voc6(root, target):
    """voc6 out of VOC 2012: the listed images, short side 192, bicubic, JPEG quality 90; masks nearest, ids 1 .. 6."""
    voc, target = Path(root) / "VOCdevkit" / "VOC2012", Path(target)
    table = [VOC6_CLASSES.index(c) if c in VOC6_CLASSES else 0 for c in data.VOC_CLASSES]
    table += [0] * (255 - len(table)) + [255]
    lists = json.loads((HERE / "results" / "voc6.json").read_text())
    if not (voc / "JPEGImages").is_dir():
        raise InputError(f"--make-voc6 {root}: no VOC 2012 there ({voc / 'JPEGImages'} is no folder)")
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
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in VOC6_CLASSES))
    print(f"{', '.join(f'{len(ids)} {split}' for split, ids in lists.items())} images in {target}")


def check_voc6(args):
    """The records are of these lists of images, these classes and these weights alone."""
    classes = Path(args.voc6) / "classes.txt"
    if not classes.is_file() or classes.read_text().split() != VOC6_CLASSES:
        raise InputError(f"--voc6 {args.voc6}: not voc6 ({classes} is not {' '.join(VOC6_CLASSES)}); --make-voc6 makes it")
    for split, ids in json.loads((HERE / "results" / "voc6.json").read_text()).items():
        path = Path(args.voc6) / "ImageSets/Segmentation" / f"{split}.txt"
        if not path.is_file() or path.read_text().split() != ids:
            raise InputError(f"--voc6 {args.voc6}: not voc6 ({path} is not the list of results/voc6.json); --make-voc6 makes it")
    if args.weights != "imagenet":
        try:
            digest = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"--weights {args.weights}: {error.strerror}") from None
        if not digest.startswith("b0353104"):               # it is in the name of torchvision's file
            raise InputError(f"--weights {args.weights}: not torchvision's mobilenet_v2-b0353104.pth")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["weights", *TITLES, "figure3", "figure4"], help="one table or picture")
    parser.add_argument("--dataset", choices=list(SETTINGS), help="one data set")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="one seed")
    parser.add_argument("--voc6", default="data/voc6", help="where voc6 is")
    parser.add_argument("--weights", default="imagenet", help="of MobileNetV2, if there is no download: torchvision's file")
    parser.add_argument("--runs", default="runs/study", help="folder of the runs")
    parser.add_argument("--quick", action="store_true",
                        help="two iterations of every kind of run that shapes has; results are thrown away")
    parser.add_argument("--tables", action="store_true", help="run nothing, write results/README.md")
    parser.add_argument("--make-voc6", metavar="DATA_ROOT", help="make --voc6 out of the VOC 2012 there")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.make_voc6:
        return make_voc6(args.make_voc6, args.voc6)
    results = HERE / "results" / "study"
    place = Place({"shapes": "data", "voc6": args.voc6, "weights": args.weights}, Path(args.runs), results)
    runs = [run for table, runs in study().items() for run in runs if args.only in (None, table)
            and args.dataset in (None, run.dataset) and args.seed in (None, run.seed)]
    first = args.seed in (None, SEEDS[0])                   # weights and pictures are of one seed
    weights = [dataset for dataset in WEIGHTS if first and args.only in (None, "weights") and args.dataset in (None, dataset)]
    pictures = [draw for draw in (figure3, figure4)
                if first and args.only in (None, draw.__name__) and args.dataset in (None, "voc6")]
    if not (runs or weights or pictures):
        raise InputError("--only, --dataset and --seed leave nothing to run")
    if args.quick:
        if not any(run.dataset == "shapes" for run in runs):
            raise InputError("--quick runs on shapes alone: leave out --dataset, and --only but for a table with shapes")
        with tempfile.TemporaryDirectory() as folder:
            kinds = {run.flags: run for run in runs if run.dataset == "shapes"}
            place = place._replace(runs=Path(folder) / "runs", results=Path(folder), extra=("--max-iters", "2", "--num-fakes", "16"))
            for run in kinds.values():
                perform(run, place)
            print(f"reproduce.py: all {len(kinds)} kinds of runs that shapes has work")
        return
    commit()                                                # of the code that is loaded now: it is kept for all records
    diverged = []
    if not args.tables:
        if {run.dataset for run in runs} | {*weights} | {"voc6" for _ in pictures} != {"shapes"}:
            check_voc6(args)
        place.runs.mkdir(parents=True, exist_ok=True)
        work = {f"weights {dataset} {flags}": partial(try_weights, dataset, flags, place)
                for dataset in weights for flags in WEIGHTS[dataset]}
        work |= {run.name: partial(perform, run, place) for run in runs}
        work |= {draw.__name__: partial(draw, place) for draw in pictures}
        for name, do in work.items():                       # what diverges does not keep the rest from running
            try:
                do()
            except FloatingPointError as error:
                diverged.append(f"{name}: {error}")
    if points := curves(results):
        write_atomically(results.parent / "curves.svg", lambda p: p.write_text(draw_curves(points)))
    write_atomically(HERE / "results" / "README.md", lambda p: p.write_text(report(results)))
    if diverged:
        raise FloatingPointError(f"all is done but {len(diverged)} that diverged; the first is {diverged[0]}")


if __name__ == "__main__":
    with data.plain_errors("reproduce.py"):
        main()
