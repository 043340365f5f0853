"""
Tables and claims out of records of runs: what reproduce.py writes into results/README.md.

study:   {table: its runs}, each a reproduce.Run
records: {name: record}, the lines of results/study.jsonl

A claim says that one row of a table beats another on all classes. Its two rows share a step 0 for
each seed, so it is about their differences: it holds, or does not, by a paired t-test of 5 %.
"""
import json
import math
import re
import statistics

from report import COLOURS, chart
from run import InputError, write_atomically

FULL, BASELINE = "+ SegInversion (HRHF)", "Baseline (no fakes)"
REAL = "real old images (outside the protocol)"
OURS, PAPERS, ANEW = "ours", "the paper's passes, made once", "ours, anew in every step"
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
MARK = "<!-- from here on written by `python reproduce.py` out of study.jsonl: do not edit -->"
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}       # Student's t, two-sided 5 %, for so many seeds
JUDGED = ("found", "sure", "size", "real size", "judge found", "judge IoU")


def read_records(path):
    """{name: its record}; of two with one name the later."""
    try:
        records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return {record["name"]: record for record in records if record["name"] + record["commit"]}
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{path}: damaged; remove its damaged line") from None


def recorded(run, records):
    """A run's record, if it is of the command as it is now."""
    record = records.get(run.name)
    return record if record and record.get("command") == run.command else None


def spread(values):
    """Mean and standard deviation over seeds, in percent."""
    percent = [100 * v for v in values]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{deviation}"


def verdict(leads):
    """What one row's leads over another, a seed each, say of the claim that it is ahead."""
    if len(leads) < 2:
        return "undecided"
    lead, error = statistics.mean(leads), statistics.stdev(leads) / math.sqrt(len(leads))
    if abs(lead) <= T[len(leads)] * error:
        return "undecided"
    return "holds" if lead > 0 else "does not hold"


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
            leads = {seed: a[seed]["all"] - b[seed]["all"] for seed in both
                     if a[seed]["step 0"] == b[seed]["step 0"]}
            texts = [f"{100 * leads[seed]:+.1f} ({seed})" if seed in leads
                     else f"other step 0 ({seed})" for seed in both]
            lines.append(f"| {claim} | {' '.join(column).removesuffix(' disjoint')} | "
                         f"{verdict([*leads.values()]) if both else 'not run'} | "
                         f"{', '.join(texts)} |")
    return lines


def shares_of_joint_and_replay(rows):
    """Lines on two shares over the seeds that have all rows they are made of, from one step 0.

    None on replay if a seed's real old images bring a point or less."""
    def scores(*names):                                 # a tuple for each seed; Joint has no step 0
        several = [rows.get(name, {}) for name in names]
        return [[row[seed]["all"] for row in several]
                for seed in sorted(set.intersection(*map(set, several)))
                if len({rows[name][seed]["step 0"] for name in names if name != "Joint"}) == 1]
    share = lambda text, values: [f"- {text}: {spread(values)} %"] if values else []
    replay = scores(FULL, BASELINE, REAL)
    gained = all(real - none > 0.01 for _, none, real in replay)
    return [*share("HRHF / Joint", [h / j for h, j in scores("HRHF", "Joint") if j]),
            *share("replay recovery, (HRHF - Baseline) / (real - Baseline)",
                   [(full - none) / (real - none) for full, none, real in replay if gained])]


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


def fakes_lines(study, records):
    """How good the fakes are: a line a step, then a line a class of voc20 15-1."""
    mean = lambda scores, key: statistics.mean(s[key] for s in scores.values())
    table = lambda title, sets: [f"| {title} | {' | '.join(JUDGED)} | n |", "|---" * 8 + "|", *(
        f"| {name} | " + " | ".join(spread([mean(scores, key) for scores in several])
                                    for key in JUDGED) + f" | {len(several)} |"
        for name, several in sets.items()), ""]
    steps, classes = {}, {}
    for run in dict.fromkeys(run._replace(row="") for table, runs in study.items()
                             if table != "first" for run in runs):
        for step, scores in (recorded(run, records) or {}).get("fakes", {}).items():
            name = " ".join([*run[:3], f"step {step}", run.flags]).strip()
            steps.setdefault(name, []).append(scores)
            for each in scores if run[:5] == ("voc20", "15-1", "disjoint", "", "") else ():
                classes.setdefault(each, []).append({each: scores[each]})
    of_classes = ["Of every class, over all steps and seeds of HRHF's voc20 15-1 disjoint:", "",
                  *table("voc20 fakes of", dict(sorted(classes.items())))]
    return [*(table("fakes of", steps) if steps else ["Not run.", ""]),
            *(of_classes if classes else [])]


def weights_svg(rows):
    """The trade-off of the weights: mIoU of new classes over that of old ones, a line a method."""
    lines = {}
    for row, by_seed in rows.items():
        for record in by_seed.values():
            point = round(100 * record["old"], 1), 100 * record["new"]
            lines.setdefault(row.split(",")[0], []).append(point)
    svg = re.search("<svg.*</svg>", chart(lines, "old classes (%)", "new classes (%)"))[0]
    names = "".join(f'<text x="60" y="{20 + 16 * k}" style="fill:{colour}">{name}</text>'
                    for k, (name, colour) in enumerate(zip(lines, COLOURS)))
    style = "<style>line{stroke:#d9dce1}text{font:12px sans-serif;fill:#667}</style>"
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(
        "</svg>", f"{style}{names}</svg>")


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


def report(study, schedules, records):
    """What stands below MARK in results/README.md; schedules: lines on the runs' training."""
    lines, tables = [], []
    for table, runs in study.items():
        lines += [f"## {TITLES[table]}", ""]
        columns = columns_of(runs, records)
        for column, rows in columns.items():
            lines += table_lines(column, rows)
            tables.append((table, column, rows))
        lines += [] if columns else ["Not run.", ""]
        if table == "weights" and columns:
            lines += ["mIoU of new classes (up) over that of old ones (right); a line joins the "
                      "weights in the table's order:", "", "![trade-off](weights.svg)", ""]
    lines += ["## How good the fakes are", "", *fakes_lines(study, records)]
    lines += ["## The same noise at three scales (paper: Figure 3)", ""]
    lines += figure3_lines(records["figure3"]) if "figure3" in records else ["Not run.", ""]
    asked = records.get("figure4", {}).get("asked", [])
    lines += ["## Fakes and predictions of voc20 15-1, seed 1 (paper: Figure 4)", "",
              f"Fakes of step 1 ({', '.join(asked) or 'not run'}), the inverted network's "
              "segmentation under each:", "", "![fakes](fakes.png)", "",
              "Image, FT, MiB and HRHF after the last step, truth, in VOC's colours:", "",
              "![predictions](figure4.png)"]
    return "\n".join(["", "", "Schedules, and learning rates that differ:", "", *schedules, "",
                      "## What holds", "", *claim_lines(tables), "", *lines, ""])


def prose(readme):
    """What stands above the tables of results/README.md, with the line that ends it."""
    try:
        head, mark, _ = readme.read_text(encoding="utf-8").partition(MARK)
    except UnicodeDecodeError:
        mark = ""
    if not mark:
        raise InputError(f"{readme}: lacks the line {MARK}; `git checkout {readme}` brings it back")
    return head + mark


def write_tables(path, study, schedules):
    """Sort the records in path; README.md's tables and weights.svg beside it of them."""
    records, readme = dict(sorted(read_records(path).items())), path.with_name("README.md")
    tables = prose(readme) + report(study, schedules, records)
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records.values())
    write_atomically(path, lambda p: p.write_text(text))
    write_atomically(readme, lambda p: p.write_text(tables, encoding="utf-8"))
    for rows in columns_of(study["weights"], records).values():         # of one task
        write_atomically(path.with_name("weights.svg"), lambda p: p.write_text(weights_svg(rows)))
