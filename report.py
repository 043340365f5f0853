"""
One page of a run, `report.html`: what it did, what came out, and what to look at.

    python report.py runs/shapes-15-1-disjoint          # into the run folder; train.py does it, too
    python report.py runs/a runs/b                      # side by side, into report.html here

Every number is read from the run's records. The page needs no network and no script.
"""
import base64
import contextlib
import html
import io
import json
from pathlib import Path

# first, as it sees to Ctrl-C while the others are imported
from run import InputError, Parser, Run, plain_errors, printable, read_json, write_atomically

import numpy as np
import torch
from PIL import Image

import eval
from data import palette
from fakes import FOUND, read_manifest

HEADLINE = "background excluded"
ENOUGH = 300                   # iterations of a step; in fewer, few classes are learned
MOST_CLASSES, MOST_FAKES, THUMBNAIL = 30, 64, 112    # of the confusion matrix; of a page; pixels
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#64748b", "#dc2626", "#0891b2")
CSS = """
:root { --ink: #1c1e21; --soft: #667; --paper: #fff; --card: #f4f5f7; --line: #d9dce1;
        --high: #1d4ed8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #14171a; --card: #1d2126; --line: #343a41;
          --high: #7aa2ff } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p, li { max-width: 46rem } .soft, figcaption { color: var(--soft); font-size: .85rem }
pre, .scroll { overflow-x: auto } pre { background: var(--card); padding: .6rem .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left } th { font-weight: 600 }
.row { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
.fakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: .8rem }
.fakes img { width: 112px; display: block } .panels img { width: 31%; max-width: 224px }
.key { display: inline-block; margin-right: .9rem; white-space: nowrap; font-size: .85rem }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em;
         border: 1px solid var(--line) }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 11px system-ui }
svg .soft { fill: var(--soft) } svg line { stroke: var(--line) }
"""


# ------------------------------------------------------------------------------- small pieces

def text(value):
    return html.escape(printable(str(value)))


def percent(value):
    return "-" if value is None or value != value else f"{100 * value:.1f}"


def table(head, rows):
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
    body = "".join(line(cells, "td") for cells in rows)
    return f"<div class=scroll><table>{line(head, 'th')}{body}</table></div>"


def picture(image, alt, flat=False):
    """A PIL picture inside the page, no larger than it is shown on a sharp screen. flat: a map of
    classes, whose colours stay as they are"""
    filters, buffer = Image.Resampling, io.BytesIO()
    image.thumbnail((2 * THUMBNAIL,) * 2, filters.NEAREST if flat else filters.BICUBIC)
    image.save(buffer, "PNG") if flat else image.save(buffer, "JPEG", quality=85)
    kind = "png" if flat else "jpeg"
    coded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{coded}">'


def legend(names, colours):
    return "".join(f'<span class=key><i style="background:{colour}"></i>{text(name)}</span>'
                   for name, colour in zip(names, colours))


def class_colours(number):
    return ["#%02x%02x%02x" % tuple(rgb) for rgb in palette()[:number].tolist()]


def chart(series, x_label, y_label, width=520, height=210):
    """Lines of {name: [(x, y), ...]}, as SVG with its legend."""
    points = [p for line in series.values() for p in line if p[1] is not None and p[1] == p[1]]
    if not points:
        return ""
    (x0, x1), top = (f(x for x, _ in points) for f in (min, max)), max(y for _, y in points) or 1
    power = 10.0 ** np.floor(np.log10(top / 4))             # four lines at round numbers
    top = 4 * power * next(k for k in (1, 2, 2.5, 5, 10) if k * power >= top / 4)
    left, bottom = 44, height - 32
    at = lambda x, y: (left + (width - left - 8) * (x - x0) / max(x1 - x0, 1e-9),
                       bottom - (bottom - 8) * y / top)
    parts = []
    for k in range(5):
        y = top * k / 4
        parts.append('<line x1="{:.0f}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>'.format(
            *at(x0, y), width - 8, at(x0, y)[1]))
        parts.append(f'<text class="soft" x="{left - 6}" y="{at(x0, y)[1] + 4:.1f}" '
                     f'text-anchor="end">{y:.3g}</text>')
    for x in sorted({x for x, _ in points}) if x1 - x0 < 12 else (x0, x1):
        anchor = "end" if x == x1 > x0 else "middle"
        parts.append(f'<text class="soft" x="{at(x, 0)[0]:.1f}" y="{bottom + 14}" '
                     f'text-anchor="{anchor}">{x:g}</text>')
    for colour, line in zip(COLOURS * len(series), series.values()):
        path = " ".join("%.1f,%.1f" % at(x, y) for x, y in line if y is not None and y == y)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
                     f'points="{path}"/>')
        parts += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (*at(x, y), colour)
                  for x, y in line if y is not None and y == y and len(line) < 20]
    parts.append(f'<text class="soft" x="{(left + width) / 2}" y="{bottom + 28}" '
                 f'text-anchor="middle">{text(x_label)}</text>' * (len(points) > 1))
    drawing = (f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
               f'aria-label="{text(y_label)} over {text(x_label)}">{"".join(parts)}</svg>')
    return (f"<figure>{drawing}<figcaption>{text(y_label)}: {legend(series, COLOURS * 9)}"
            "</figcaption></figure>")


def heat(rows, columns, values, cell=30, zeros=False):
    """A heat map of shares, a list of them or None for each row, as SVG, with the percentages."""
    left, top = 8 + 7 * max(map(len, rows)), 8 + 6 * max(map(len, columns))
    width, height = left + cell * len(columns) + top // 2, top + 20 * len(rows) + 4
    parts = [f'<text x="{left + cell * (j + .65)}" y="{top - 5}" '
             f'transform="rotate(-60 {left + cell * (j + .65)} {top - 5})">{text(name)}</text>'
             for j, name in enumerate(columns)]
    for i, (name, shares) in enumerate(zip(rows, values)):
        y = top + 20 * i
        parts.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{text(name)}</text>')
        for j, share in enumerate(shares):
            if share is None or share != share:
                continue
            x = left + cell * j
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="19" '
                         f'fill="var(--high)" fill-opacity="{0.06 + 0.6 * share:.2f}"/>')
            if share >= 0.005 or zeros:
                parts.append(f'<text x="{x + cell / 2 - .5}" y="{y + 14}" text-anchor="middle">'
                             f'{100 * share:.0f}</text>')
    return (f'<div class=scroll><svg viewBox="0 0 {width} {height}" width="{width}" '
            f'style="max-width:none" role="img">{"".join(parts)}</svg></div>')


# ------------------------------------------------------------------------- what the records say

class Records:
    """What a run folder says of the steps that are scored so far."""

    def __init__(self, folder):
        self.run = Run(folder)
        self.name = self.run.folder.resolve().name
        if not (self.run.folder / "settings.json").exists():
            raise InputError(f"{folder}: no settings.json; a report is of a run of train.py")
        self.settings = read_json(self.run.folder / "settings.json", dict.fromkeys(
            ("dataset", "task", "setting", "method", "backbone", "data_root"), str) | {
            "crop": int, "seed": int}, "run the command that made it again")
        self.log = list(self.read_log())
        self.launch = ([line for line in self.log if "command" in line] or [{}])[-1]
        records = []
        while (path := self.run.record(len(records))).exists():
            records.append(read_json(path, {"confusion": list, "seconds": dict, "of": list}))
        if not records:
            raise InputError(f"{folder}: no step is scored yet; a report needs one")
        self.seconds = [record["seconds"] for record in records]
        self.confusions = [torch.tensor(record["confusion"]) for record in records]
        self.classes, sizes = (records[-1]["of"][0][key] for key in ("classes", "classes_per_step"))
        ends = np.cumsum(sizes).tolist()
        self.groups = [self.classes[a:b] for a, b in zip([1, *ends], ends)]
        self.scores = [eval.summarize(confusion, self.groups) for confusion in self.confusions]

    def read_log(self):
        with contextlib.suppress(OSError):
            log = (self.run.folder / "log.jsonl").read_text(encoding="utf-8", errors="replace")
            for line in log.splitlines():
                with contextlib.suppress(ValueError):       # a line that a kill cut
                    if isinstance(event := json.loads(line), dict):
                        yield event

    def shares(self):
        """Of every class's pixels, the share that goes to each class; nan without pixels."""
        counts = self.confusions[-1].double()
        return (counts / counts.sum(1, keepdim=True)).numpy()

    def iou_over_steps(self):
        of_step = [eval.iou(confusion).tolist() for confusion in self.confusions]
        return {name: [values[k] if k < len(values) else None for values in of_step]
                for k, name in enumerate(self.classes)}

    def fakes(self, step):
        """[(names asked for, r, shares found)] of a step's fakes."""
        lines = read_manifest(self.run.fakes(step) / "manifest.jsonl").values()
        return [([self.classes[c] for c in line["classes"]], line["r"], line["found"])
                for line in lines]


# ---------------------------------------------------------------------------- the page's sections

def what_was_run(r):
    s, launch = r.settings, r.launch
    groups = "".join(f"<li value={step}>{text(', '.join(names))}</li>"
                     for step, names in enumerate(r.groups))
    phases = list(dict.fromkeys(phase for seconds in r.seconds for phase in seconds))
    seconds = [[step, *(f"{of.get(phase, 0):.0f}" for phase in phases)]
               for step, of in enumerate(r.seconds)]
    method = f"{s['method']} {launch.get('flags', '')}".strip()
    return (f"<pre>{text(launch.get('command', ''))}</pre><p>{text(s['dataset'])} "
            f"{text(s['task'])}, {text(s['setting'])}; method {text(method)}; "
            f"{text(s['backbone'])} at {s['crop']} pixels, seed {s['seed']}; data in "
            f"{text(s['data_root'])}; {launch.get('processes', 1)} x "
            f"{text(launch.get('device', '?'))}, torch {text(launch.get('torch', '?'))}.</p>"
            f"<p>Classes of each step, beside the background:</p><ol start=0>{groups}</ol>"
            + table(["seconds of step", *phases], seconds))


def scores(r):
    """eval.py's table, with the paper's row if the run is one."""
    lines = eval.table(r.scores[-1], r.settings, r.launch.get("flags", "unknown")).splitlines()
    head, _, *rows = ([text(cell) for cell in line[2:-2].split(" | ")] for line in lines)
    return table(head, rows)


def over_the_steps(runs):
    """old, new and all of one run, or `all` of several."""
    line = lambda r, key: [(t, 100 * of[HEADLINE][key]) for t, of in enumerate(r.scores)]
    series = {r.name: line(r, "all") for r in runs} if len(runs) > 1 else {
        key: line(runs[0], key) for key in ("old", "new", "all")}
    return chart(series, "step", "mIoU (%)" + ", all classes" * (len(runs) > 1))


def every_class(r):
    of_class = r.iou_over_steps()
    steps = [f"step {t}" for t in range(len(r.scores))]
    return heat(list(of_class), steps, of_class.values(), cell=44, zeros=True)


def confusions(r, most=8):
    """The heat map of the classes with the most confused pixels, and the largest in words."""
    shares, counts = r.shares(), r.confusions[-1].numpy()
    wrong = counts.sum(1) + counts.sum(0) - 2 * counts.diagonal()
    shown = sorted(np.argsort(-wrong)[:MOST_CLASSES].tolist())
    names = [r.classes[k] for k in shown]
    classes = range(1, len(shares))
    pairs = sorted(((shares[i, j], i, j) for i in classes for j in classes
                    if i != j and shares[i, j] >= 0.05), reverse=True)[:most]
    words = "".join(f"<li>{text(r.classes[i])} is taken for {text(r.classes[j])}: "
                    f"{100 * share:.0f} %</li>" for share, i, j in pairs)
    of = f"; the {MOST_CLASSES} most confused of {len(shares)}" * (len(shares) > MOST_CLASSES)
    return (f"<ul>{words}</ul>" + heat(names, names, shares[np.ix_(shown, shown)].tolist())
            + f"<p class=soft>Rows: the truth; columns: what its pixels were taken for, in percent"
              f"{of}.</p>")


def losses(r):
    of_step = {}
    for line in r.log:
        if {"step", "iteration", "loss"} <= line.keys():
            ours = ("step", "iteration", "of", "lr", "data_wait", "eta", "images/s")
            for name, value in line.items():
                if name not in ours and value is not None:
                    series = of_step.setdefault(line["step"], {}).setdefault(name, {})
                    series[line["iteration"]] = value       # a resumed epoch: its last lines
    charts = [chart({name: sorted(points.items()) for name, points in series.items()
                     if name != "loss" or len(series) > 2},
                    "iteration", f"loss, step {step}") for step, series in sorted(of_step.items())]
    return f"<div class=row>{''.join(charts)}</div>"


def cut(path, columns, pairs):
    """The pictures of a grid that data.save_grid wrote, row by row, as lists of `pairs` rows."""
    with Image.open(path) as file:
        grid = file.convert("RGB")
    width = (grid.width - 2) // columns
    rows = [[grid.crop((2 + x * width, 2 + y * width, (x + 1) * width, (y + 1) * width))
             for x in range(columns)] for y in range((grid.height - 2) // width)]
    return [rows[k:k + pairs] for k in range(0, len(rows), pairs)]


def fakes(r, step, most):
    path, made = r.run.fakes(step).with_suffix(".png"), r.fakes(step)
    if not (made and path.is_file()):
        return ""
    hues, cards = set(), []
    cells = [pair for images, maps in cut(path, 8, 2) for pair in zip(images, maps)]
    for (image, segmented), (names, scales, found) in zip(cells[:most], made):
        asked = [f"{text(name)} {100 * share:.0f} %, r {scale}" for name, scale, share in
                 zip(names[1:], scales[1:], found[1:])]
        hues |= {"#%02x%02x%02x" % rgb for _, rgb in segmented.getcolors(1 << 20)}
        cards.append(f"<figure>{picture(image, 'a fake')}{picture(segmented, 'its map', flat=True)}"
                     f"<figcaption>{'<br>'.join(asked)}</figcaption></figure>")
    colours = dict(zip(r.classes, class_colours(len(r.classes))))
    known = [name for name, colour in colours.items() if colour in hues]
    return (f"<h3>Step {step}: {len(made)} fakes</h3><p>{legend(known, map(colours.get, known))}"
            f"</p><div class=fakes>{''.join(cards)}</div>")


def panels(r):
    path = r.run.folder / "predictions.png"
    if not path.is_file():
        return ""
    rows = "".join('<p class="panels">' + " ".join(
        picture(image, what, flat=what != "image")
        for image, what in zip(row, ("image", "truth", "prediction"))) + "</p>"
        for row, in cut(path, 3, 1))
    colours = class_colours(256)
    key = legend([*r.classes, "void"], [*colours[:len(r.classes)], colours[255]])
    return f"<p>{key}</p><p class=soft>Image, truth, prediction.</p>{rows}"


def advice(r):
    """What a reader should look at, in words, with the flag that helps."""
    found, of_class, shares = {}, r.iou_over_steps(), r.shares()
    say = lambda what, name: found.setdefault(what, []).append(name)
    pixels = (r.confusions[-1].sum(1) / r.confusions[-1].sum()).tolist()
    iterations = {line["step"]: line["of"] for line in r.log
                  if {"iteration", "step", "of"} <= line.keys()}
    keeps = ", ".join(["lower --lr"] + ["raise --num-fakes"] * (r.settings.get("fake") != "none")
                      + ["raise --lam"] * bool(r.settings.get("lam")))
    for step, names in enumerate(r.groups):
        made = iterations.get(step, ENOUGH)
        if made == r.settings.get("max_iters"):
            longer = f"step {step} had {made} iterations, capped by --max-iters"
        elif step == 0 and r.settings.get("step0"):
            longer = "step 0 came with --step0: train it anew"
        elif made < ENOUGH or made == r.settings.get("min_iters"):
            more = ENOUGH if made < ENOUGH else 2 * made
            longer = f"step {step} had {made} iterations: --min-iters {more}"
        else:
            longer = "raise --lr or --epochs" if step else "raise --lr0 or --epochs0"
        for name in names:
            k = r.classes.index(name)
            values = [v for v in of_class[name] if v is not None and v == v]
            if not pixels[k]:
                say("{}: no pixel in the test images, so no score", name)
            elif not values:
                continue
            elif max(values) < 0.1:
                degree = "never" if max(values) < 0.02 else "hardly"
                say(f"{{}}: {degree} learned; {longer}; more images or a larger --crop help",
                    f"{name} (IoU {percent(max(values))}, {100 * pixels[k]:.1f} % of the pixels)")
            elif values[-1] < max(values) / 2:
                drops = [a - b for a, b in zip(values, values[1:])]
                say(f"{{}}: forgotten, most in step {step + 1 + int(np.argmax(drops))}; {keeps}",
                    f"{name} (IoU {percent(max(values))}, then {percent(values[-1])})")
            if shares[k, 0] > 0.6:
                say(f"{{}}: over 60 % of the pixels are taken for the background; {longer}", name)
    first, last = r.scores[0][HEADLINE]["all"], r.scores[-1][HEADLINE]["old"]
    if len(r.scores) > 1 and last < 0.75 * first:
        say(f"{{}} had {percent(first)} % and have {percent(last)} %; {keeps}", "The old classes")
    made = [(step, r.fakes(step)) for step in range(1, len(r.scores))]
    for step, of_step in made:
        missed = {}
        for names, _, shares_found in of_step:
            for name, share in zip(names[1:], shares_found[1:]):
                missed.setdefault(name, []).append(share <= FOUND)
        for name in (name for name, of_name in missed.items() if sum(of_name) > len(of_name) / 2
                     and r.settings.get("fake") == "seginversion"):
            say(f"{{}}: most fakes of step {step} that were asked for it do not show it; raise "
                "--fake-steps, or lower --bn", name)
    lines = [what.format(", ".join(names)) + "." for what, names in found.items()]
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines or [
        "Nothing stands out: no class stayed under 10 % or lost half of its IoU"
        + ", and most fakes show their classes" * any(of_step for _, of_step in made) + "."
    ]) + "</ul>"


def sections(r, of=1):
    """of: how many runs are on the page"""
    steps = range(1, len(r.scores))
    made = "".join(fakes(r, step, max(1, min(16, MOST_FAKES // (of * len(steps)))))
                   for step in steps)
    parts = [("What was run", what_was_run(r)), ("Scores", scores(r)),
             ("Over the steps", over_the_steps([r])), ("IoU of every class (%)", every_class(r)),
             ("Confusions of the last step", confusions(r)), ("Losses", losses(r)),
             ("Fakes", made), ("Predictions", panels(r)), ("What to look at", advice(r))]
    return "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in parts if body)


def page(runs):
    """The HTML of one run, or of several beside each other."""
    body = ""
    if len(runs) > 1:
        rows = [[f'<a href="#{k}">{text(r.name)}</a>',
                 *(percent(r.scores[-1][HEADLINE][key]) for key in ("old", "new", "all"))]
                for k, r in enumerate(runs)]
        body = (table([f"mIoU (%), {HEADLINE}", "old", "new", "all"], rows)
                + over_the_steps(runs))
    for k, r in enumerate(runs):
        body += f"<article id={k}><h1>{text(r.name)}</h1>{sections(r, len(runs))}</article>"
    title = ", ".join(text(r.name) for r in runs)
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f'content="width=device-width"><title>{title}</title><style>{CSS}</style>'
            f"<body>{body}</body></html>\n")


def write(folders, path):
    text_of_page = page([Records(folder) for folder in folders])
    write_atomically(path, lambda p: p.write_text(text_of_page, encoding="utf-8"))


def parse(argv=None):
    parser = Parser(description="One page of a run, or of several side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    return parser.parse_args(argv)


def main(argv=None):
    folders = parse(argv).runs
    path = Path(folders[0] if len(folders) == 1 else ".", "report.html")
    write(folders, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    with plain_errors("report.py"):
        main()
