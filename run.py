"""
What a run is: its processes and device, its folder and settings, its seeds, log, files and errors.

    world = setup()                             # rank, size and device, from torchrun's environment
    run = Run("runs/voc-15-1-disjoint", world)  # holds settings.json, log.jsonl, step-<t>.pth, ...
    run.claim(settings)                         # this command's, or InputError
    run.log(step=0, iteration=20, loss=1.5)     # one JSON line, to the screen and to log.jsonl
"""
import argparse
import contextlib
import difflib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

# Ctrl-C while the imports below take their seconds, which plain_errors cannot see: no traceback.
if Path(sys.argv[0]).resolve() in [Path(__file__).resolve().with_name(f"{name}.py") for name in (
        "train", "eval", "fakes", "data", "report", "bench", "reproduce", "photographs")]:
    signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))

import numpy as np
import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                                         # Windows
    fcntl = None


# -------------------------------------------------------------------------------------- errors

class InputError(ValueError):
    """Bad input. One sentence for the user; the scripts print it and exit with code 2."""


class Stopped(BaseException):
    """A signal asked the process to end. Files are whole at every moment: it may come anywhere."""


MEMORY = "memory is short: lower --fake-batch, --batch-size or --crop"
LOADER = ("a loader process died, for want of memory or of /dev/shm (docker: --shm-size); train.py "
          "--workers 0 does without")
FULL = "the disk of the output, or /dev/shm (docker: --shm-size), is full"
FEW = "too few processes or open files are allowed (ulimit -u, -n); train.py --workers 0 needs less"
RANK = "another process of this run has ended; what it printed says why"
RESOURCES = {                           # in what PyTorch says -> what to do
    "out of memory": MEMORY, "can't allocate memory": MEMORY, "is killed by signal": LOADER,
    "exited unexpectedly": LOADER, "shared memory": LOADER, "received 0 items": LOADER,
    "Connection closed": RANK, "Connection reset": RANK, "can't start new thread": FEW,
    "Too many open files": FEW}


OWNER = os.getpid()                     # a loader inherits the handlers below until it is set up


def stop(number, frame):
    """Raise Stopped; and again, as Python drops what is raised inside a destructor or a fork."""
    if os.getpid() != OWNER:                                # a loader process, just forked
        os._exit(128 + number)
    signal.signal(number, signal.SIG_DFL)                   # a second one ends at once
    if hasattr(signal, "setitimer"):                        # not on Windows
        def again(*_):
            raise Stopped(number)
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    raise Stopped(number)


def stop_no_more():
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)


def quiet_worker(_):
    """A loader process ends with its parent, to whom its errors go: it says nothing of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *_: None


@contextlib.contextmanager
def plain_errors(program):
    """Bad input, a loss that is no number, short resources: one sentence and exit code 2.

    Ctrl-C and SIGTERM: one line, and exit code 130 or 143.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):   # a terminal that lacks a character
        stream.reconfigure(errors="replace")
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    ending = []                                             # a sentence is enough by then
    sys.unraisablehook = lambda what: None if ending or what.exc_type is Stopped else \
        sys.__unraisablehook__(what)
    code = 2
    try:
        yield
        stop_no_more()
        for number, handler in before.items():
            signal.signal(number, handler)
        return
    except (InputError, FloatingPointError) as error:
        # An error in a loader's worker arrives with the worker's traceback in front.
        sentence = str(error).rpartition("run.InputError: ")[2].strip()
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else \
            FULL if error.errno == errno.ENOSPC else str(error)
    except Stopped as signalled:
        stop_no_more()
        number = signalled.args[0]
        code, name = 128 + number, signal.Signals(number).name
        sentence = f"stopped by {name}; nothing is lost, the same command goes on"
        if os.environ.get("RANK", "0") != "0":
            sys.exit(code)                                  # one line for all ranks
    except (RuntimeError, MemoryError) as error:
        known = [advice for text, advice in RESOURCES.items() if text in str(error)]
        if not known and not isinstance(error, MemoryError):
            raise
        sentence = (known or [MEMORY])[0]
    ending.append(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if stream.isatty():
            print("\r\x1b[K", end="", file=stream, flush=True)              # the live line
    print(f"{program}: {printable(sentence)}", file=sys.stderr, flush=True)
    sys.exit(code)


# --------------------------------------------------------------------------------------- files

def contents(checkpoint):
    """A digest of a checkpoint by its zip's checksums, without reading it all; None without one."""
    try:
        check_file(checkpoint)
        with zipfile.ZipFile(checkpoint) as archive:
            return sha256(json.dumps([[i.filename, i.CRC] for i in archive.infolist()]))
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def write_atomically(path, write):
    """Call write(temporary_path), then rename: a reader never sees half a file, also after a power
    cut. InputError, with the file and the disk's free space, if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """InputError, with the disk's free space, if the file cannot be written, or is no file."""
    if path.exists():
        check_file(path)                                    # not to replace a device
    try:
        yield
    except (OSError, RuntimeError) as error:                # RuntimeError: torch.save's
        free = f"{shutil.disk_usage(path.parent).free / 2 ** 20:.0f} MiB free there" \
            if path.parent.is_dir() else "no such folder"
        raise InputError(f"{path}: cannot be written ({reason(error)}; {free})") from None


def printable(text):
    """Without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", text)


def reason(error):
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or ["damaged"])[0]


def check_file(path):
    """InputError if the path is not there, or no regular file: a pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:                  # ValueError: a NUL in the name
        raise InputError(f"{path}: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file")


def write_json(path, value, indent=None):
    """Write a dict, with a digest of it under "sha256"."""
    value = {key: v for key, v in value.items() if key != "sha256"}
    value["sha256"] = sha256(strict_json(value))
    write_atomically(path, lambda p: p.write_text(strict_json(value, indent=indent)))


def read_json(path, expected, way_out="remove it, then run train.py again, which writes it anew"):
    """What write_json wrote, with the keys of `expected` (name -> type); InputError if damaged."""
    check_file(path)
    try:
        value = json.loads(Path(path).read_text())
        if value.pop("sha256") == sha256(json.dumps(value)) and all(
                isinstance(value[key], kind) for key, kind in expected.items()):
            return value
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path}: damaged; {way_out}")


def strict_json(value, digits=17, indent=None):
    """JSON with null for nan and inf, which JSON does not have, and floats of so many digits."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None,
                       parse_float=lambda text: float(f"{float(text):.{digits}g}"))
    return json.dumps(plain, indent=indent)


def sha256(data):
    """Sixteen hex digits for bytes or text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


@functools.cache
def commit():
    """The code's commit; results may have changed since. "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent,
                                        capture_output=True, text=True).stdout.strip()
    changes = git("diff", "--name-only", "HEAD", "--", "*.py")
    return (git("describe", "--always") or "unknown") + (" and changes" if changes else "")


def nearest(word, known):
    """"; did you mean ...?" for a word that is not among the known ones, or ""."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse's, which names the nearest choice of a flag to a mistyped one."""

    def error(self, message):
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += nearest(unknown[1], self._option_string_actions)
        super().error(message)


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


def of_torchrun(name, default):
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(f"{name}={value}: an environment variable of torchrun's; unset it")
    return int(value)


def setup():
    """The World, from torchrun's environment."""
    rank, size, local = (of_torchrun(name, default) for name, default in
                         [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    if rank >= size:
        raise InputError(f"RANK={rank} and WORLD_SIZE={size}: environment variables of torchrun's; "
                         "unset them, or start with torchrun")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if size > 1:                                # ranks wait for each other's last batch of fakes
        if not {"MASTER_ADDR", "RANK"} <= os.environ.keys():
            raise InputError("WORLD_SIZE is set without torchrun; unset it, or start with torchrun")
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return World(rank, size, device)


def cpus():
    """How many CPUs this process may use: by affinity, and by a container's quota (cgroup)."""
    known = hasattr(os, "sched_getaffinity")
    number = len(os.sched_getaffinity(0)) if known else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):          # ValueError: "max", no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        number = min(number, max(1, int(quota) // int(period)))
    return number


def default_workers():
    """Loader processes for each of the processes that torchrun starts on this machine."""
    return min(8, cpus() // max(1, of_torchrun("LOCAL_WORLD_SIZE", 1)))


def autocast(device, enabled):
    """torch.amp for this device: bfloat16 where it has it (the CPU does), else float16."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


# ---------------------------------------------------------------------------------- the folder

ANOTHER_FOLDER = ("Choose another --out (step-<t>.pth and step-<t>.json copied there, for "
                  "--reuse-fakes also fakes-step-<t>, are built upon), or remove that folder")


def lock(folder):
    """Keep other processes out of a folder until this one ends, however it ends.

    A POSIX lock: unlike flock's it is not inherited by loader processes, which outlive a kill.
    Returns the open file, to be kept. Not on Windows, nor on a file system without locks.
    """
    with writing(folder / ".lock"):
        file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):              # which of them depends on the system
        raise InputError(f"{folder}: in use by another process; wait for it, or choose another "
                         "--out") from None
    except OSError as error:
        print(f"note: {folder}: cannot be locked ({reason(error)}); start one process in it alone",
              file=sys.stderr)
    return file


PHASES = "seginversion", "training", "scoring"             # of a step, in this order


def clock(seconds):
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02d} h" if hours else f"{minutes}:{int(seconds) % 60:02d} min"


class LiveLine:
    """On a terminal, progress is one line that stays in its place.

    work: {(step, phase): its forward passes of an image}, for all of the run. A phase that has not
    been measured yet is taken to have the speed of the one that is under way.
    """

    def __init__(self, work):
        self.work, self.speed = work, {}                    # seconds of a forward pass, by phase

    def left(self, step, phase, share, eta):
        """Seconds left in the whole run, eta of them in this phase, of which a share is done."""
        if share < 1 and eta:
            self.speed[phase] = eta / (1 - share) / max(1, self.work[step, phase])
        now, speed = (step, PHASES.index(phase)), self.speed.get(phase, 0)
        return eta + sum(passes * self.speed.get(p, speed) for (s, p), passes in self.work.items()
                         if (s, PHASES.index(p)) > now)

    def text(self, width, step, of, eta, phase="training", batch=None, iteration=0, **event):
        done, last = iteration if batch is None else batch + 1, max(s for s, _ in self.work)
        loss = event.get("loss", event.get("cls"))
        left = self.left(step, phase, done / of, eta)
        parts = [f"step {step} of 0-{last} {phase} {'#' * (10 * done // of):-<10} {done}/{of}",
                 f"{clock(eta)} left, {clock(left)} in all"]
        parts += [f"loss {loss:.3g}"] if loss is not None else []
        parts += [f"{event['images/s']:.3g} images/s"]
        while len(parts) > 1 and len("  ".join(parts)) >= width:        # no number is cut
            parts.pop()
        return "  ".join(parts)[:width - 1]


class Run:
    """A run folder. `seconds` are those of the phases of the step that is under way."""

    def __init__(self, folder, world=World()):
        self.folder, self.rank, self.seconds = Path(folder), world.rank, {}
        self.settings = None                    # a digest of them, from claim()
        self.last = self.folder / "last.pth"    # the training step that is under way
        self.live = None                        # a LiveLine, on a terminal

    def checkpoint(self, step):
        return self.folder / f"step-{step}.pth"

    def record(self, step):
        return self.folder / f"step-{step}.json"

    def read_record(self, step, network):
        """The scores of a step's checkpoint, {} if there are none: it is scored (again) then.

        network: what the checkpoint must say of itself; a record may be a copy of another run's
        """
        path = self.record(step)
        if not path.exists():
            return {}
        try:
            record = read_json(path, {"confusion": list, "seconds": dict, "of": list})
        except InputError:
            print(f"note: {path}: damaged; the step is scored again", file=sys.stderr)
            return {}
        n, rows = len(network["classes"]), record["confusion"]
        whole = len(rows) == n and all(isinstance(row, list) and len(row) == n and all(
            type(v) is int and 0 <= v < 2 ** 62 for v in row) for row in rows)
        of_this = record["of"] == [network, contents(self.checkpoint(step))]
        return record if whole and of_this else {}

    def write_record(self, step, network, confusion, seconds):
        write_json(self.record(step), {"confusion": confusion, "seconds": seconds,
                                       "of": [network, contents(self.checkpoint(step))]})

    def fakes(self, step):
        return self.folder / f"fakes-step-{step}"

    def claim(self, settings):
        """Make the folder this command's, or refuse: mixed settings would go unnoticed in results.

        settings: {name of a flag: value}, and under "data" a digest of the data, which may move.
        They are fixed from the first write on. The folder is this process's until it ends.
        Returns a digest of them.
        """
        with contextlib.suppress(FileExistsError):          # a file: locking says so
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        path = self.folder / "settings.json"
        if path.exists():
            there = read_json(path, {"dataset": str}, "if this command is the one that made this "
                              "run, remove that file alone")
            settings["step0"] = settings["step0"] or there.get("step0")         # it is copied
            differing = [f"--{k.replace('_', '-')} is {there.get(k)} there and {settings[k]} here"
                         for k in settings if there.get(k) != settings[k]
                         and k not in ("data", "data_root")]
            if there.get("data") != settings["data"]:
                differing.append("its classes, images or labels have changed")
            if differing:
                raise InputError(f"{self.folder} holds a run with other settings: "
                                 f"{'; '.join(differing)}. {ANOTHER_FOLDER}")
        for litter in [*self.folder.glob(".*.tmp"), *self.folder.glob("fakes-step-*/.*.tmp")]:
            if re.fullmatch(r"\.[\w-]+\.(json|jsonl|pth|png)\.\d+\.tmp", litter.name):
                litter.unlink()                             # of a process that was killed
        write_json(path, settings, indent=1)
        places = ("data_root", "step0")                     # may differ from launch to launch
        return sha256(json.dumps({k: v for k, v in settings.items() if k not in places}))

    def show(self, event, line=None):
        """An event on the screen: its JSON line, or on a terminal its place in the run."""
        if self.live and "eta" in event:
            print("\r\x1b[K" + self.live.text(shutil.get_terminal_size().columns, **event),
                  end="", flush=True)
        elif line:
            print("\r\x1b[K" * bool(self.live) + line, flush=True)

    def log(self, **event):
        """One JSON line an event, to log.jsonl and the screen; rank 0 only."""
        if self.rank == 0:
            line, path = strict_json(event, digits=4), self.folder / "log.jsonl"
            self.show(event, line)
            with writing(path), open(path, "a") as file:
                print(line, file=file)

    @contextlib.contextmanager
    def timed(self, phase):
        """Adds the seconds spent inside to `seconds`."""
        began = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began
