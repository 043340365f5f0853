"""
The paper's tables at a size that two CPU cores can run: every run, and the tables made of them.

    python photographs.py data                      # data/voc20 and voc6 out of data/VOCdevkit
    python reproduce.py --list                      # every run and a command for it
    python reproduce.py                             # all that have no record yet, then the tables
    python reproduce.py --only voc20/15-1/hrhf/1    # one, or some; or figure3, or figure4

A run is a command of train.py. Its record is a line of results/study.jsonl, and a run that has one
is skipped; an interrupted run goes on where it stopped. Runs that begin alike share a step 0
(--step0), and Joint of another seed judges fakes: one process at a time for a data set. All tables
are made of the records, by tables.py.
"""
import argparse
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import NamedTuple

# first, as it sees to Ctrl-C while the others are imported
from run import (InputError, Parser, check_file, commit, plain_errors, read_json, sha256,
                 write_atomically)

import numpy as np

import data
import fakes
import photographs
import train
from eval import test_view
from methods import METHODS
from model import load_model
from protocol import task_steps
from tables import (ANEW, BASELINE, FULL, OURS, PAPERS, REAL, prose, read_records, recorded,
                    write_tables)

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)

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
    one, tasks = SEEDS[:1], [("voc20", task) for task in ("15-1", "15-5", "19-1")]
    few = {row: MAIN[row] for row in ("FT", "MiB", "HRHF")}
    return {
        "first": runs(ROWS["first"], "shapes", "15-1", (42,)),
        "table1": [run for where in tasks for run in runs(MAIN, *where) + runs(OTHERS, *where, one)]
        + runs(few, "voc20", "15-1", setting="overlapped")
        + runs(MAIN, "voc6", "3-1") + runs(MAIN, "shapes", "15-1"),
        "table2": [run for where in (*tasks[:2], ("voc6", "3-1"))
                   for run in runs(ROWS["table2"], *where)],
        **{table: [run for where in tasks[:0:-1] for run in runs(ROWS[table], *where)]
           for table in ("table3", "table4", "table5", "table6")},
        "ours": runs(ROWS["ours"], "voc20", "15-1"),
        "weights": runs(ROWS["weights"], "voc20", "15-1", one),
    }


def schedules():
    """How the runs of each data set are trained, as lines of a list."""
    return [f"- {name}: `{flags}`" + "".join(f", `{method} {rate}`"
                                             for method, rate in RATES[name].items())
            for name, flags in SETTINGS.items()]


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


# ------------------------------------------------------------------------------------ commands

def check_weights(weights):
    """All records of photographs start from torchvision's weights."""
    if weights != "imagenet":
        check_file(Path(weights))
        if not sha256(Path(weights).read_bytes()).startswith("b0353104"):
            raise InputError(f"--weights {weights}: not torchvision's mobilenet_v2-b0353104.pth, "
                             "whose name has its digest")


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--only", default="", metavar="TEXT", help="runs with this in the name; figure3; figure4")
    a("--list", action="store_true", help="print their names and commands, run nothing")
    a("--tables", action="store_true", help="run nothing, write the tables of results/README.md")
    a("--photos", default="data", help="the folder of voc20 and voc6")
    a("--weights", default="imagenet", help="of MobileNetV2; torchvision's file saves a download")
    a("--runs", default="runs/study", help="folder of the runs")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
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
            photographs.check(roots[name], name)
            check_weights(args.weights)
        prose(place.records.with_name("README.md"))     # before hours of runs
        for run in todo:                                # one that diverges does not stop the rest
            try:
                perform(run, place)
            except FloatingPointError as error:
                diverged.append(f"{run.name}: {error}")
        for draw in pictures:
            draw(place)
    write_tables(place.records, study(), schedules())
    if diverged:
        raise FloatingPointError(f"{len(diverged)} of {len(todo)} diverged; {diverged[0]}")


if __name__ == "__main__":
    with plain_errors("reproduce.py"):
        main()
