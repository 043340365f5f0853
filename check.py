"""
A data set before a run: all that is wrong with it, and what each step of a task would see.

    python data.py check --data-root my-images                      # --dataset folder, all classes
    python data.py check --data-root my-images --task 4-1 --small   # any of train.py's flags
"""
import contextlib
import re

import numpy as np

import train
from data import load
from run import InputError, World, printable


def parse(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip() + "\n\nAll flags: python train.py --help")
        raise SystemExit(0)
    return train.parse(["--dataset", "folder", "--task", "offline", *argv])


class Odd(dict):
    """{what is wrong, whatever its numbers and names: {(path, what is wrong there): None}}."""

    def add(self, error, kind=None):
        """error: "path: what". Those of one kind are told together, if not those of alike words."""
        path, _, what = str(error).partition(": ")
        what = what.replace(path, "it") if "/" in path else what
        self.setdefault(kind or re.sub(r"\d+|image \S+", "#", what), {})[path, what] = None

    def count(self):
        number = sum(map(len, self.values()))
        return f"{number} thing{'s' * (number > 1)}"

    def report(self):
        for found in map(sorted, self.values()):
            alike = " (or alike)" * (len({what for _, what in found}) > 1)
            paths = ", ".join(printable(path) for path, _ in found[:3])
            print(f"{len(found)} x {printable(found[0][1])}{alike}: {paths}"
                  + ", ..." * (len(found) > 3))


def check(args):
    """Print everything. args: of train.py. Raises InputError if a picture or a list is wrong."""
    if args.dataset == "shapes":
        raise InputError("--dataset shapes: is drawn, there is nothing to check")
    odd, sets, keys = Odd(), {}, {}
    for split in ("train", "val"):
        try:
            dataset = load(args.dataset, args.data_root, split, odd.add)
        except InputError as error:                         # of a list, or of the classes
            odd.add(error)
            continue
        with contextlib.suppress(InputError):               # of a file that the scan names, too
            keys[split] = dataset.key()
        sets[split] = dataset, dataset.scan(odd.add)
    odd.report()
    counts = {split: np.array([pair.counts for pair in pairs if pair] or np.zeros((0, 256), int))
              for split, (_, pairs) in sets.items()}        # (images, 256)
    if len(sets) == 2:
        describe_classes(sets["train"][0].classes, counts)
    if odd:
        raise InputError(f"--data-root {args.data_root}: {odd.count()} wrong, see above")
    for split, (dataset, pairs) in sets.items():
        dataset.keep(keys[split], pairs)
    (train_set, pairs), (_, val_pairs) = sets.values()
    task = train.open_task(args, World())
    warnings = describe_steps(task, args)
    shorter = np.array([min(pair.size) for pair in pairs])
    at_crop = counts["train"] * (args.crop / shorter[:, None]) ** 2     # pixels a class is left
    for k, name in enumerate(train_set.classes[1:], 1):
        shown = counts["train"][:, k] > 0
        if not shown.any():
            warnings.append(f"{name} is in no training image: it cannot be learned")
        elif np.median(at_crop[shown, k]) < 64:
            warnings.append(f"{name} has fewer than 64 pixels in half of its images at --crop "
                            f"{args.crop}: it may vanish; raise --crop")
        if not counts["val"][:, k].any():
            warnings.append(f"{name} is in no test image: it has no score")
    if twice := {pair.digest for pair in pairs} & {pair.digest for pair in val_pairs}:
        warnings.append(f"{len(twice)} images are in both lists: they test what was trained on")
    if small := int((shorter < args.crop).sum()):
        warnings.append(f"{small} of {len(train_set)} training images are smaller than --crop "
                        f"{args.crop} and are enlarged"
                        + ": lower it, or --small" * (args.crop > train.SMALL["crop"]))
    if unseen := len(train_set) - len(set().union(*task.images)):
        warnings.append(f"{unseen} training images are in no step: most show background alone")
    print("\n" + "\n".join(f"warning: {printable(w)}" for w in warnings) if warnings
          else "\nnothing to warn of")


def describe_classes(classes, counts):
    cells = lambda pixels, k: (f"{(pixels[:, k] > 0).sum()} | "
                               f"{100 * pixels[:, k].sum() / max(1, pixels[:, :255].sum()):.2f}")
    print(f"\n| class | training images | pixels (%) | test images | pixels (%) |\n{'|---' * 5}|")
    for k, name in enumerate(classes):
        print(f"| {name} | {cells(counts['train'], k)} | {cells(counts['val'], k)} |")


def describe_steps(task, args):
    """Print what each step sees; what will disappoint, as sentences."""
    few, counts, enough = [], [*map(len, task.images)], train.SMALL["min_iters"]
    print(f"\n| step of {args.task} | classes | images | iterations | fakes |\n{'|---' * 5}|")
    for step, count in enumerate(counts):
        _, iterations = train.step_length(args, step, count)
        names = ", ".join(task.train_set.classes[c] for c in task.steps[step])
        few += [str(step)] * (iterations < enough and not args.max_iters)
        print(f"| {step} | {names} | {count} | {iterations} "
              f"| {train.number_of_fakes(args, step, counts, task.steps)} |")
    return [f"step {', '.join(few)}: under {enough} iterations few classes are learned: "
            f"--min-iters {enough}, or --small"] * bool(few)
