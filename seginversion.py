"""
SegInversion (paper, Sec. 3.2): images of the old classes, drawn out of the old network itself.

    python seginversion.py --checkpoint runs/voc-15-1-disjoint/step-0.pth --classes horse,person --r 0.5,5,10

writes the paper's Figure 3: the same noise, inverted once for every r, with the network's own
segmentation underneath.

    Eq. 2   min_x  l_cls(y^(x), y) + R(x)
            l_cls  softmax cross-entropy of the aggregated scores y^ (saa.py) to the asked classes,
                   target 1/n for each of an image's n classes, background always among them
            R(x)   tv * total_variation(x) + l2 * rms(x) + bn * BatchNormMatching: the image prior
                   and the feature statistics of DeepInversion (Yin et al., 2020), from its formulas
"""
import argparse
import contextlib
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import data
from chunked import upsample
from data import InputError, derive_seed, write_atomically
from eval import FOUND, colour, save_grid
from model import load_model
from saa import scale_aware_aggregation

R_CHOICES = (0.5, 1, 5, 10, 20)                             # Sec. 4.4, "random"


def total_variation(x):
    """Roughness of images (B, 3, H, W): root mean square of the differences between neighbours.

    Over the whole batch, as published: a mean of one root per image would let a few images be all noise.
    Summed over four directions (down, right, both diagonals). Returns a scalar.
    """
    pairs = [(x[:, :, 1:], x[:, :, :-1]), (x[..., 1:], x[..., :-1]),
             (x[:, :, 1:, 1:], x[:, :, :-1, :-1]), (x[:, :, 1:, :-1], x[:, :, :-1, 1:])]
    return sum(torch.linalg.vector_norm(a - b) / math.sqrt(a.numel()) for a, b in pairs)


def rms(x):
    """Root mean square of each image of (B, 3, H, W), mean over the batch. Gradient 0 at x = 0."""
    return (torch.linalg.vector_norm(x, dim=(1, 2, 3)) / math.sqrt(x[0].numel())).mean()


def coloured(x, spectrum):
    """Images (..., H, W) with the amplitude of every frequency f divided by f ** spectrum; 0 leaves them as they are.

    f in cycles per pixel; the constant part counts as the lowest other frequency, 1 / max(H, W). Photographs
    have a spectrum near 1.
    """
    if not spectrum:
        return x
    H, W = x.shape[-2:]
    f = torch.hypot(torch.fft.fftfreq(H, device=x.device)[:, None], torch.fft.rfftfreq(W, device=x.device))
    return torch.fft.irfft2(torch.fft.rfft2(x) / f.clamp(min=1 / max(H, W)) ** spectrum, s=(H, W))


class MeasureAndNormalise(torch.autograd.Function):
    """BatchNorm2d in evaluation mode, and how far the batch is from what the layer remembers.

        y = s * (x - running_mean) + bias,      s = weight / sqrt(running_var + eps)
        d = || m - running_mean ||_2 + || v - running_var ||_2

    m, v: mean and biased variance of x (B, C, H, W) over its n = B H W values a channel, from one kernel. The
    gradients of y and d come together, affine in x. Only x gets one; 0 for a norm that is 0.

        dx = s * dy + a * x + b     a = dd * 2/n * (v - running_var) / || v - running_var ||
                                    b = dd * 1/n * (m - running_mean) / || m - running_mean || - a * m

    Returns y (B, C, H, W) and d, a scalar.
    """

    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, eps):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            m, v = torch.batch_norm_update_stats(x32, None, None, 0.0)    # BatchNorm's own kernel, far faster on a CPU
        else:                                                           # what a compiler can fuse
            v, m = torch.var_mean(x32, dim=(0, 2, 3), correction=0)
        far_m, far_v = m - running_mean, v - running_var
        norm_m, norm_v = far_m.norm(), far_v.norm()
        s = (running_var + eps).rsqrt() * weight
        ctx.save_for_backward(x, m, far_m, far_v, norm_m, norm_v, s)
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps), norm_m + norm_v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dd):
        x, m, far_m, far_v, norm_m, norm_v, s = ctx.saved_tensors
        dd = dd * (x.shape[1] / x.numel())                              # dd / n
        a = 2 * dd / norm_v.clamp(min=1e-30) * far_v
        b = dd / norm_m.clamp(min=1e-30) * far_m - a * m
        a, b, s = (c.view(1, -1, 1, 1) for c in (a, b, s))
        return torch.addcmul(b, x, a).addcmul_(dy, s), None, None, None, None, None


class MeasuredBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d in evaluation mode that keeps the distance of its latest input's statistics."""

    def forward(self, x):
        y, self.distance = MeasureAndNormalise.apply(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return y


class BatchNormMatching:
    """How far the statistics of a batch are from those that every BatchNorm layer remembers.

        sum_l  || mean_l(x) - running_mean_l ||_2  +  || var_l(x) - running_var_l ||_2

    over the layers' inputs, mean and biased variance over (B, H, W), weight `first` on the first layer
    and 1 on the others, divided by the sum of the weights. Context manager: inside, the layers are
    MeasuredBatchNorm2d, in evaluation mode; at exit they are what they were.

        with BatchNormMatching(model) as matching:
            model(x)
            loss = matching.loss()
    """

    def __init__(self, model, first=10.0):
        self.layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.weights = [first] + [1.0] * (len(self.layers) - 1)

    def __enter__(self):
        self.classes = [type(layer) for layer in self.layers]
        for layer in self.layers:                           # the class, not `forward`: torch.compile knows it again
            layer.__class__ = MeasuredBatchNorm2d
        return self

    def __exit__(self, *_):
        for layer, kind in zip(self.layers, self.classes):
            layer.__class__ = kind
            vars(layer).pop("distance", None)

    def loss(self):
        """The distance for the latest forward pass; a scalar that carries gradient to the input."""
        total = sum((w * layer.distance for w, layer in zip(self.weights, self.layers)), torch.zeros(()))
        return total / sum(self.weights)


@contextlib.contextmanager
def frozen(model):
    """Evaluation mode and no parameter gradients inside; every flag as it was outside."""
    training = [(m, m.training) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


def classification_loss(scores, targets):
    """Softmax cross-entropy (B,) of scores (B, C) to targets (B, C) that sum to one per image."""
    return -(targets * F.log_softmax(scores, dim=1)).sum(dim=1)


def invert(model, targets, r, *, size, steps=1000, lr=0.25, seed=0, tv=0.3, l2=0.0089, bn=10.0, spectrum=1.0,
           compile=False, on_step=None):
    """Optimise noise into images that the network takes for the asked classes (Eq. 2).

    model:   a segmentation network, images (B, 3, H, W) -> logits (B, C, h, w). It is left as it was
             found: weights and statistics bit for bit, training flags and requires_grad too.
    targets: (B, C) bool or float, the classes to show in each image (normalised to sum to one)
    r:       Eq. 1's scale, a number or a CPU tensor that broadcasts to (B, C)
    size:    H = W of the images, or (H, W)
    steps, lr, seed: Adam with betas (0.5, 0.9), a tenth of the steps warm-up (at most 100), then
             cosine to 0; the noise, shifts and flips come from `seed` alone (the global random state
             is not touched)
    tv, l2, bn: weights of the terms of R(x). Each term is a mean, so a weight keeps its meaning at another size, batch
             or network. tv and bn come from results/README.md; DeepInversion's are 0.355 and 1.16.
    spectrum: of the noise (standard deviation 1), and the gradient is coloured alike before Adam sees it: ours.
             Adam gives every pixel a step of one size, so that noise grows as fast as objects do; this lets the
             large shapes come first. 0 is white noise and the plain gradient.
    compile: torch.compile the network, a minute or two at first. The same images but for rounding.
    on_step: called as on_step(i, terms) after step i with the named, detached loss terms
    Returns (B, 3, H, W) in the network's normalised space, clamped to the range of real images (for
    steps=0 the noise as it is drawn).
    Raises ValueError for targets of the wrong shape, or an image without a target.
    """
    H, W = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    targets = targets.to(torch.float32)
    if targets.dim() != 2 or not bool((targets.sum(1) > 0).all()):
        raise ValueError(f"targets must be (B, C) with at least one class per image, got {tuple(targets.shape)}")
    targets = (targets / targets.sum(1, keepdim=True)).to(device)
    generator = torch.Generator().manual_seed(seed)
    x = coloured(torch.randn(len(targets), 3, H, W, generator=generator), spectrum)
    x = (x / x.std() if spectrum else x).to(device).requires_grad_()
    low, high = (torch.tensor([(v - m) / s for m, s in zip(data.MEAN, data.STD)], device=device).view(3, 1, 1)
                 for v in (0, 1))
    optimizer = torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9))
    warmup = min(100, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / max(1, steps - warmup))))
    reach = [min(30, side // 6) for side in (H, W)]         # less would stay within a cell of the network's stride
    network = torch.compile(model) if compile else model
    with frozen(model), BatchNormMatching(model) as matching, \
            torch.backends.cudnn.flags(enabled=True, deterministic=True):       # the same image every time
        for i in range(steps):
            shift = [int(torch.randint(-d, d + 1, (), generator=generator)) for d in reach]
            view = torch.roll(x, shift, dims=(2, 3))
            if torch.rand((), generator=generator) < 0.5:
                view = view.flip(3)
            scores = scale_aware_aggregation(network(view), r)                  # (B, C)
            if scores.shape != targets.shape:
                raise ValueError(f"targets are {tuple(targets.shape)}, but the network scores {tuple(scores.shape)}")
            terms = {"cls": classification_loss(scores, targets).mean(), "tv": tv * total_variation(view),
                     "l2": l2 * rms(view), "bn": bn * matching.loss()}
            optimizer.zero_grad()
            sum(terms.values()).backward()
            x.grad = coloured(x.grad, spectrum)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(low, high)
            if on_step:
                on_step(i, {name: term.detach() for name, term in terms.items()})
    return x.detach()


# --------------------------------------------------------------------------- a folder full of fakes

def balanced_targets(num_images, num_classes, seed, most=3):
    """Classes to show in each image: 1 to `most` distinct ids out of 1 .. num_classes, sorted.

    Dealt from shuffled decks, so that over the whole set no class is asked for more than once more
    often than another.
    """
    generator = torch.Generator().manual_seed(seed)
    deck, targets = [], []
    for _ in range(num_images):
        chosen, count = [], 1 + int(torch.randint(min(most, num_classes), (), generator=generator))
        while len(chosen) < count:
            if not deck:
                deck = (1 + torch.randperm(num_classes, generator=generator)).tolist()
            chosen.append(deck.pop(next(i for i, c in enumerate(deck) if c not in chosen)))
        targets.append(sorted(chosen))
    return targets


def parse_r(text):
    """--r: "avg" (0), "max" (inf), a number >= 0, or None for one out of R_CHOICES, drawn anew for every image and
    class ("random": Sec. 3.2) or for every image ("random-image": Sec. 4.4 speaks of "each random input")."""
    named = {"random": None, "random-image": None, "avg": 0.0, "max": math.inf}
    try:
        r = named[text] if text in named else float(text)
    except ValueError:
        r = -1.0
    if r is not None and not r >= 0:
        raise InputError(f"--r {text}: expected random, random-image, avg, max or a number >= 0")
    return r


def synthesize(model, folder, num_images, *, size, batch_size=16, r="random", seed=0, most=3, retry=False,
               rank=0, world=1, compile=False, report=None, **options):
    """Fill a folder with num_images fakes of all the classes a model knows.

    Writes 00000.png, ... and manifest.jsonl, a line per image: file, classes (background first), r of
    each, the seed it was inverted with, and what the saved pixels come to, unweighted: cls, tv, bn (of the batch),
    and found, the share of pixels that the model itself gives to each class asked for. Batch b belongs
    to rank b % world and, for given settings, depends on (seed, b) alone.
    Called again it goes on at the first missing batch; with other settings or another model it refuses
    with InputError. A loss that is not finite is a FloatingPointError.

    most:    most foreground classes in one image
    retry:   ours: images in which the model does not find a class that was asked for are inverted once more, from
             other noise, copies of them in turn filling a batch; the first copy with all its classes takes the place
             (found as in the manifest, at the model's own stride: `eval.py --fakes` looks at full size)
    compile: as for invert(); a folder begun without may go on with it
    report:  called as report(dict) with the progress of this rank
    options: steps, lr, tv, l2, bn, spectrum of invert()
    Returns the paths of the images, in order, on every rank.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    plan = {"num_images": num_images, "size": size, "batch_size": batch_size, "r": r, "seed": seed, "most": most,
            "retry": retry, **options, "model": digest.hexdigest()[:16]}
    plan = json.loads(json.dumps(plan))                     # as it comes back from the file
    plan_path, manifest = folder / "plan.json", folder / "manifest.jsonl"
    if plan_path.exists():
        there = data.read_json(plan_path, {"seed": int})
        # a setting that came later than the folder was off there
        differing = [k for k in plan.keys() | there.keys() if plan.get(k, False) != there.get(k, False)]
        if differing:
            raise InputError(f"{folder} holds fakes made with other settings ({', '.join(sorted(differing))}): "
                             "remove that folder or choose another")
    if world > 1:
        dist.barrier()
    if rank == 0:
        write_atomically(plan_path, lambda p: p.write_text(json.dumps(plan)))
    paths = [folder / f"{i:05d}.png" for i in range(num_images)]
    if manifest.exists():
        return paths

    C = sum(model.classes_per_step)
    device = next(model.parameters()).device
    if compile:                                 # what was compiled for another network counts against a limit
        torch.compiler.reset()
    asked = balanced_targets(num_images, C - 1, derive_seed(seed, 0), most)
    part = lambda b: folder / f"batch-{b:05d}.jsonl"
    batches = range(math.ceil(num_images / batch_size))
    for b in batches[rank::world]:
        if part(b).exists():
            continue
        started = time.monotonic()
        images = range(b * batch_size, min((b + 1) * batch_size, num_images))
        batch_seed = derive_seed(seed, 1, b)
        generator = torch.Generator().manual_seed(batch_seed)
        value = parse_r(r)
        if value is None:
            drawn = torch.randint(len(R_CHOICES), (len(images), 1 if r == "random-image" else C), generator=generator)
            scales = torch.tensor(R_CHOICES)[drawn.expand(-1, C)]
        else:
            scales = torch.full((len(images), C), value)
        targets = torch.zeros(len(images), C)
        for row, i in enumerate(images):
            targets[row, [0, *asked[i]]] = 1

        def inverted(rows, seed):
            """Fakes of these rows' classes: as they are saved, the share of pixels of every class, the last loss terms."""
            last = {}
            x = invert(model, targets[rows], scales[rows], size=size, seed=seed, compile=compile,
                       on_step=lambda _, terms: last.update(terms), **options)
            last = {name: float(term) for name, term in last.items()}
            if not all(map(math.isfinite, last.values())) or not bool(x.isfinite().all()):
                raise FloatingPointError(f"synthesis of batch {b} in {folder}: a loss is not finite: {last}")
            pixels = data.denormalise(x).cpu()
            return pixels, shares(model, normalised(pixels, device)), last

        rows, seeds = list(range(len(images))), [batch_seed] * len(images)
        pixels, found, last = inverted(rows, batch_seed)
        complete = lambda row, share: bool((share[asked[images[row]]] > FOUND).all())
        failed = [row for row in rows if not complete(row, found[row])]
        if retry and failed:
            copies = [failed[k % len(failed)] for k in rows]            # a batch as large, which --bn is meant for
            again = derive_seed(batch_seed, 1)
            with contextlib.suppress(FloatingPointError):               # the first images stay then
                others, theirs, _ = inverted(copies, again)
                for k in reversed(rows):
                    if complete(copies[k], theirs[k]):
                        pixels[copies[k]], found[copies[k]], seeds[copies[k]] = others[k], theirs[k], again
        x = normalised(pixels, device)
        with frozen(model), torch.inference_mode(), BatchNormMatching(model) as matching:
            scores = scale_aware_aggregation(model(x), scales)
            bn = matching.loss().item()
            cls = classification_loss(scores, (targets / targets.sum(1, keepdim=True)).to(device)).tolist()
        lines = []
        for row, i in enumerate(images):
            write_atomically(paths[i], lambda p: Image.fromarray(pixels[row].permute(1, 2, 0).numpy()).save(p, "PNG"))
            classes = [0, *asked[i]]
            lines.append(json.dumps({
                "file": paths[i].name, "classes": classes, "r": [str(v) for v in scales[row, classes].tolist()],
                "seed": seeds[row], "cls": cls[row], "tv": total_variation(x[row:row + 1]).item(),
                "bn": bn, "found": found[row, classes].tolist()}) + "\n")
        write_atomically(part(b), lambda p: p.write_text("".join(lines)))
        if report:
            seconds = time.monotonic() - started
            left = len([k for k in batches[rank::world] if k > b])
            report({"batch": b, "of": len(batches), **last, "again": len(images) - seeds.count(batch_seed),
                    "images/s": world * len(images) / seconds, "eta": seconds * left})
    if world > 1:
        dist.barrier()
    if rank == 0:
        write_atomically(manifest, lambda p: p.write_text("".join(part(b).read_text() for b in batches)))
        for b in batches:
            part(b).unlink()
    if world > 1:
        dist.barrier()
    return paths


def save_fakes(model, paths, path, columns=8, rows=2):
    """A grid of fakes, each with the model's own segmentation underneath."""
    device = next(model.parameters()).device
    shown = [torch.from_numpy(np.array(data.read_image(p))).movedim(-1, 0) for p in paths[:columns * rows]]
    pictures = []
    for i in range(0, len(shown), columns):
        row = shown[i:i + columns]
        blank = [torch.full_like(row[0], 255)] * (columns - len(row))
        pictures += row + blank + segment(model, normalised(torch.stack(row), device)) + blank
    save_grid(pictures, columns, path)


def normalised(pixels, device):
    """uint8 RGB (B, 3, H, W) -> the network's space."""
    for transform in data.normalise():
        pixels = transform(data.tv_tensors.Image(pixels))
    return pixels.as_subclass(torch.Tensor).to(device)


def shares(model, x):
    """The share of pixels that the model gives to each class, (B, C), of x (B, 3, H, W), at its own stride."""
    with frozen(model), torch.inference_mode():
        logits = model(x)
    return F.one_hot(logits.argmax(1), logits.shape[1]).float().mean((1, 2)).cpu()


def segment(model, x):
    """The model's segmentation of x (B, 3, H, W), as a list of coloured pictures."""
    with frozen(model), torch.inference_mode():
        return list(colour(upsample(model(x), x).argmax(1).cpu()))


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Figure 3: the same noise inverted at several r.")
    parser.add_argument("--checkpoint", required=True, help="step-<k>.pth of a run")
    parser.add_argument("--classes", nargs="+", required=True,
                        help="names, with commas: horse,person (background is added). "
                             "Several such sets: the images take them in turn")
    parser.add_argument("--r", default="0.5,5,10", help="one column of the picture each; also avg and max")
    parser.add_argument("--out", default="figure3.png")
    parser.add_argument("--images", type=int, default=16, help="inverted together; the first four are drawn")
    parser.add_argument("--size", type=int, help="height and width; default: as in the checkpoint's run")
    parser.add_argument("--steps", type=int,
                        help="more for cleaner pictures; default of this and the next four: as in the run")
    for name in ("lr", "tv", "bn", "spectrum"):
        parser.add_argument(f"--{name}", type=float,
                            help="as --fake-lr of train.py" if name == "lr" else "as in train.py")
    parser.add_argument("--seed", type=int, default=0, help="another one for other noise")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    model, about = load_model(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    names = about["classes"]
    asked = [group.split(",") for group in args.classes]
    unknown = [c for group in asked for c in group if c not in names[1:]]
    if unknown:
        raise InputError(f"--classes {' '.join(args.classes)}: {unknown[0] or 'an empty name'} is unknown to this "
                         f"checkpoint, which knows {', '.join(names[1:])}")
    for name, least in (("images", 1), ("size", 1), ("steps", 1), ("lr", 1e-12),
                        ("tv", 0), ("bn", 0), ("spectrum", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2 ** 63:
            raise InputError(f"--{name} {value}: must be a finite number, at least {least} and below 2**63")
    if args.spectrum is not None and args.spectrum > 4:
        raise InputError(f"--spectrum {args.spectrum}: at most 4; photographs are near 1")
    if args.images < len(asked):
        raise InputError(f"--images {args.images}: fewer than the {len(asked)} sets of --classes")
    if Path(args.out).is_dir() or not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: name a picture in a folder that is there")
    given = {name: getattr(args, name) for name in ("steps", "lr", "tv", "bn", "spectrum")}
    options = {**about["inversion"], **{name: value for name, value in given.items() if value is not None}}
    targets = torch.zeros(args.images, len(names))
    for i in range(args.images):
        targets[i, [0] + [names.index(c) for c in asked[i % len(asked)]]] = 1
    columns, texts, of_r = [], args.r.split(","), {}
    for text in texts:
        r = parse_r(text)
        if r is None:
            raise InputError(f"--r {text}: name the scales to compare instead, such as 0.5,5,10")
        x = invert(model, targets, r, size=args.size or about["crop"], seed=args.seed, **options)
        if not bool(x.isfinite().all()):
            raise FloatingPointError(f"r = {text}: a pixel is not finite; try a lower --lr")
        found = shares(model, x)
        of_r[text] = {name: round(found[targets[:, c] > 0, c].mean().item(), 3)
                        for c, name in enumerate(names) if targets[:, c].any()}
        print(f"r = {text}: share of pixels, in the images that ask for the class", of_r[text])
        columns.append([p for pair in zip(data.denormalise(x[:4]).cpu(), segment(model, x[:4])) for p in pair])
    save_grid([picture for row in zip(*columns) for picture in row], len(columns), args.out)
    grid = Image.open(args.out)
    picture = Image.new("RGB", (grid.width, grid.height + 14), "white")
    picture.paste(grid, (0, 14))
    for i, text in enumerate(texts):
        ImageDraw.Draw(picture).text((4 + i * grid.width // len(texts), 1), f"r = {text}", "black")
    write_atomically(args.out, lambda p: picture.save(p, "PNG"))
    print(f"wrote {args.out}")
    return of_r


if __name__ == "__main__":
    with data.plain_errors("seginversion.py"):
        main()
