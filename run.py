"""
What a run is: its processes and device, its folder and settings, its seeds, log, files and errors.

    world = setup()                             # rank, size and device, from torchrun's environment
    run = Run("runs/voc-15-1-disjoint", world)  # holds settings.json, log.jsonl, step-<t>.pth, ...
    run.claim(settings)                         # this command's, or InputError
    run.log(step=0, iteration=20, loss=1.5)     # one JSON line, to the screen and to log.jsonl
"""
import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


# -------------------------------------------------------------------------------------- errors

class InputError(ValueError):
    """Bad input. One sentence for the user; the scripts print it and exit with code 2."""


@contextlib.contextmanager
def plain_errors(program):
    """Bad input, and a loss that is no number, end a script with one sentence and exit code 2."""
    try:
        yield
    except (InputError, FloatingPointError) as error:
        # An error in a loader's worker arrives with the worker's traceback in front.
        sentence = str(error).strip().splitlines()[-1].removeprefix("run.InputError: ")
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


# --------------------------------------------------------------------------------------- files

def write_atomically(path, write):
    """Call write(temporary_path), then rename: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value, indent=None):
    write_atomically(path, lambda p: p.write_text(strict_json(value, indent=indent)))


def read_json(path, expected):
    """A JSON object with the keys of `expected` (name -> type), or InputError naming the file."""
    try:
        value = json.loads(Path(path).read_text())
        if all(isinstance(value[key], kind) for key, kind in expected.items()):
            return value
    except FileNotFoundError:
        raise InputError(f"{path}: not there; train.py writes it") from None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: damaged; remove it and what it belongs to, then run train.py again")


def strict_json(value, digits=17, indent=None):
    """JSON with null for nan and inf, which JSON does not have, and floats of so many digits."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None,
                       parse_float=lambda text: float(f"{float(text):.{digits}g}"))
    return json.dumps(plain, indent=indent)


# --------------------------------------------------------------------------------------- seeds

def derive_seed(*numbers):
    """One seed out of several numbers, e.g. (seed, step, batch); the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ----------------------------------------------------------------------- processes and devices

class World(NamedTuple):
    """The processes that share a run; one process alone is a world of size 1."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def rank_0_first(self):
        """Rank 0 goes through the block before the others: it downloads, they find it done."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def from_rank_0(self, value):
        """The value rank 0 has, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensor):
        """`tensor`, summed over the ranks in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def setup():
    """The World, from torchrun's environment."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if size > 1:                                # ranks wait for each other's last batch of fakes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return World(rank, size, device)


def default_workers():
    """Loader processes for each of the processes that torchrun starts on this machine."""
    return min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def autocast(device, enabled):
    """torch.amp for this device: bfloat16 where it has it (the CPU does), else float16."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


# ---------------------------------------------------------------------------------- the folder

ANOTHER_FOLDER = ("Choose another --out (step-<t>.pth and step-<t>.json copied there are kept and "
                  "built upon), or remove that folder")


class Run:
    """A run folder. `seconds` are those of the phases of the step that is under way."""

    def __init__(self, folder, world=World()):
        self.folder, self.rank, self.seconds = Path(folder), world.rank, {}
        self.last = self.folder / "last.pth"    # the training step that is under way

    def checkpoint(self, step):
        return self.folder / f"step-{step}.pth"

    def record(self, step):
        return self.folder / f"step-{step}.json"

    def fakes(self, step):
        return self.folder / f"fakes-step-{step}"

    def claim(self, settings):
        """Make the folder this command's, or refuse: mixed settings would go unnoticed in results.

        settings: {name of a flag: value}, and under "data" a digest of the data, which may move.
        Settings may change until something was trained.
        """
        path = self.folder / "settings.json"
        if [*self.folder.glob("step-*.pth"), *self.folder.glob("last.pth")] and path.exists():
            there = read_json(path, {"dataset": str})
            differing = [f"--{k.replace('_', '-')} is {there.get(k)} there and {settings[k]} here"
                         for k in settings if there.get(k) != settings[k]
                         and k not in ("data", "data_root")]
            if there.get("data") != settings["data"]:
                differing.append("its classes, images or labels have changed")
            if differing:
                raise InputError(f"{self.folder} holds a run with other settings: "
                                 f"{'; '.join(differing)}. {ANOTHER_FOLDER}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for litter in self.folder.rglob(".*.tmp"):      # of a process that was killed
            litter.unlink()
        write_json(path, settings, indent=1)

    def log(self, **event):
        """One JSON line an event, the same to screen and log.jsonl; rank 0 only."""
        if self.rank == 0:
            line = strict_json(event, digits=4)
            print(line, flush=True)
            with open(self.folder / "log.jsonl", "a") as file:
                print(line, file=file)

    @contextlib.contextmanager
    def timed(self, phase):
        """Adds the seconds spent inside to `seconds`."""
        began = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began
