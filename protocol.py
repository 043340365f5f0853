"""
The protocol's rules: which images a learning step sees, and which labels (paper, Sec. 3.1 and 4.1).

A task "15-1" learns 15 classes in step 0 and then one per step. In every step only the classes of
that step are labelled: to the network, old and future classes are background (id 0). The rules are
MiB's (Cermelli et al., 2020), whose protocol the paper follows.

    t           learning step, 0 first
    steps[t]    the class ids that step t adds; background belongs to every step and is in no list
"""
import os
import re
from pathlib import Path

import numpy as np
import torch

from run import InputError, check_file, nearest, printable, reason

VOID = 255                                              # VOC's "do not care" id


def task_steps(task, num_classes, order=None):
    """"15-1", 20 -> [[1..15], [16], [17], [18], [19], [20]]; "offline" -> all classes in one step.

    num_classes does not count the background. order: the ids in which the classes are learned, if
    not the natural one.
    Raises InputError for a malformed task, or one that leaves no class for a second step.
    """
    order = order or list(range(1, num_classes + 1))
    if task == "offline":
        return [order]
    try:
        first, increment = (int(part) for part in task.split("-"))
    except ValueError:
        raise InputError(f"--task {task}: expected A-B, such as 15-1, or offline") from None
    if first < 1 or increment < 1 or first >= num_classes:
        raise InputError(f"--task {task}: the data set has {num_classes} classes, so A-B needs "
                         f"1 <= A < {num_classes} and B >= 1")
    starts = range(first, num_classes, increment)
    return [order[:first]] + [order[s:s + increment] for s in starts]


def parse_order(text, classes):
    """--order, ids or names with commas between or a file of them -> the ids, every class once."""
    if os.path.isfile(text) and "," not in text:
        try:
            text = Path(text).read_text(encoding="utf-8-sig")
        except ValueError:
            raise InputError(f"--order {text}: not UTF-8 text") from None
    words = [word.strip() for word in re.split(r"[,\n]", text) if word.strip()]
    ids = {name: i for i, name in enumerate(classes)} | {str(i): i for i in range(len(classes))}
    if any(ids[name] != i for i, name in enumerate(classes)):
        raise InputError("--order: a class has another's id for a name; rename it in classes.txt")
    wrong = [word for i, word in enumerate(words) if not ids.get(word) or word in words[:i]]
    missing = [name for i, name in enumerate(classes) if i and {name, str(i)}.isdisjoint(words)]
    if wrong or missing or len(words) != len(classes) - 1:
        what = f"{printable(wrong[0])} is unknown or there twice" + nearest(
            wrong[0], set(ids) - {wrong[0]}) if wrong else \
            f"{missing[0]} is missing" if missing else "a class is there twice"
        raise InputError(f"--order: {what}; it names every class but the background once")
    return [ids[word] for word in words]


def split_indices(image_labels, steps, step, setting):
    """Sorted indices of the images that a learning step sees.

    image_labels: for every image the class ids in its full mask (0 and 255 may be among them)
    setting:      "overlapped": images with a class of this step, whatever else they show.
                  "disjoint": of those, the images that show no class of a later step.
    """
    if setting not in ("overlapped", "disjoint"):
        raise InputError(f"unknown setting {setting!r}: choose overlapped or disjoint")
    current = set(steps[step])
    allowed = {0, VOID}.union(*steps[:step + 1])
    return [i for i, labels in enumerate(image_labels)
            if current.intersection(labels)
            and (setting == "overlapped" or allowed.issuperset(labels))]


def partition_indices(image_labels, steps):
    """ADE's disjoint lists: every image goes to exactly one step, future classes are allowed in it.

    MiB's own lists cannot be made again (their seed is lost: pass them with --split-dir), so this
    is its greedy rule, without randomness. In image order, each class c of an image bids
        120 * (1 - added_c / N_c) + sum_c' N_c' / N_c
    (N_c images show c, added_c of them are already in c's step); the highest bid's step wins.
    """
    step_of = {c: t for t, classes in enumerate(steps) for c in classes}
    N = dict.fromkeys(step_of, 0)
    for labels in image_labels:
        for c in step_of.keys() & set(labels):
            N[c] += 1
    total, added, chosen = sum(N.values()), dict.fromkeys(step_of, 0), [[] for _ in steps]
    bid = lambda c: 120 * (1 - added[c] / N[c]) + total / N[c]
    for i, labels in enumerate(image_labels):
        if present := sorted(step_of.keys() & set(labels)):
            winner = step_of[max(present, key=bid)]
            chosen[winner].append(i)
            for c in present:
                added[c] += step_of[c] == winner
    return chosen


def read_split(split_dir, step, num_images):
    """MiB's train-<step>.npy: indices into the data set's list of training images."""
    path = Path(split_dir) / f"train-{step}.npy"
    try:
        check_file(path)
        indices = np.load(path, mmap_mode="r")              # a huge shape is not believed
        if indices.dtype.kind not in "iu" or indices.ndim != 1:
            raise TypeError("not a list of integers")
        indices = sorted(set(indices.tolist()))
    except Exception as error:                              # of a wrong file numpy raises anything
        raise InputError(f"--split-dir: cannot read {path} ({reason(error)})") from None
    if not indices or indices[0] < 0 or indices[-1] >= num_images:
        raise InputError(f"--split-dir: {path} must hold indices from 0 to {num_images - 1}, "
                         "the number of training images found under --data-root less one")
    return indices


def training_indices(image_labels, groups, setting, *, ade=False, split_dir=None, joint=False):
    """The training images of every step, as sorted lists of indices.

    groups: task_steps(); joint learns all of them in one step, on all their images
    ade:    its disjoint lists are a partition
    """
    if split_dir:
        lists = [read_split(split_dir, t, len(image_labels)) for t in range(len(groups))]
        return [sorted(set().union(*lists))] if joint else lists
    steps = [sum(groups, [])] if joint else groups
    if ade and setting == "disjoint":
        return partition_indices(image_labels, steps)
    return [split_indices(image_labels, steps, t, setting) for t in range(len(steps))]


def label_map(steps, step, split, void="background", score_background=True):
    """The 256-entry uint8 table from a mask's id to the network's target: `table[mask]`.

    Channels follow the order of learning: 0 background, then the classes of step 0, of step 1, ...

                      train          test
    this step's       channel        channel
    earlier steps'    0              channel
    later steps'      0              255
    0                 0              0 *
    255               0 **           255

    *  255 with score_background=False: ADE's id 0 is "other", trained but never scored.
    ** as MiB: it becomes background, which the teacher then relabels. void="ignore" keeps 255.
    """
    channel = {c: k for k, c in enumerate(sum(steps, []), start=1)}
    labelled = steps[step] if split == "train" else sum(steps[:step + 1], [])
    table = torch.full((256,), 0 if split == "train" else VOID, dtype=torch.uint8)
    for c in labelled:
        table[c] = channel[c]
    if split == "train":
        table[VOID] = VOID if void == "ignore" else 0
    elif score_background:
        table[0] = 0
    return table
