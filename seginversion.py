"""
SegInversion (paper, Sec. 3.2): images of the old classes, drawn out of the old network itself.

    Eq. 2   min_x  l_cls(y^(x), y) + R(x)
            l_cls  softmax cross-entropy of the aggregated scores y^ (saa.py) to the asked classes,
                   target 1/n for each of an image's n classes, background always among them
            R(x)   tv * total_variation(x) + l2 * rms(x) + bn * BatchNormMatching: the image prior
                   and the feature statistics of DeepInversion (Yin et al., 2020), from its formulas

    x = invert(model, targets, r, sizes=[512])

A folder full of such images, and the paper's Figure 3, are made in fakes.py.
"""
import contextlib
import gc
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from data import MEAN, STD
from fast import MeasuredBatchNorm2d, captured, float32
from saa import scale_aware_aggregation


# ------------------------------------------------------------------------------ terms of Eq. 2

def classification_loss(scores, targets):
    """Softmax cross-entropy (B,) of scores (B, C) to targets (B, C) that sum to one per image."""
    return -(targets * F.log_softmax(scores, dim=1)).sum(dim=1)


def total_variation(x):
    """Roughness of images (B, 3, H, W): root mean square of the differences between neighbours.

    Over the whole batch, as published: a mean of one root per image would let a few images be all
    noise. Summed over four directions (down, right, both diagonals). Returns a scalar.
    """
    pairs = [(x[:, :, 1:], x[:, :, :-1]), (x[..., 1:], x[..., :-1]),
             (x[:, :, 1:, 1:], x[:, :, :-1, :-1]), (x[:, :, 1:, :-1], x[:, :, :-1, 1:])]
    return sum(torch.linalg.vector_norm(a - b) / math.sqrt(a.numel()) for a, b in pairs)


def rms(x):
    """Root mean square of each image of (B, 3, H, W), mean over the batch. Gradient 0 at x = 0."""
    return (torch.linalg.vector_norm(x, dim=(1, 2, 3)) / math.sqrt(x[0].numel())).mean()


class BatchNormMatching:
    """How far the statistics of a batch are from those that every BatchNorm layer remembers.

        sum_l  w_l * ( || mean_l(x) - running_mean_l ||_2  +  || var_l(x) - running_var_l ||_2 )

    over the layers' inputs, mean and biased variance over (B, H, W); w_l is `first` for the first
    layer and 1 for the others, divided by their sum. Context manager: inside, the layers are
    MeasuredBatchNorm2d (fast.py), in evaluation mode; at exit they are what they were.

        with BatchNormMatching(model) as matching:
            logits, statistics = matching(x)
            loss = matching.loss(statistics)            # of x; or, throughout,
            loss = matching.loss(statistics, "a", 4)    # of these 4 images and of all other parts
                                                        # as they were when last seen
    """

    def __init__(self, model, first=10.0):
        self.model, self.first = model, first
        self.layers = [m for m in model.modules()
                       if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.parts = {}                     # name -> images, and statistics (2, all channels)
        self.graphs = {}                    # shape -> forward() as a CUDA graph

    def __enter__(self):
        scales = [(m.running_var + m.eps).rsqrt() * m.weight for m in self.layers]
        self.remembered = together([(m.running_mean, m.running_var) for m in self.layers])
        L, device = len(self.layers), self.remembered.device
        widths = torch.tensor([m.num_features for m in self.layers], dtype=torch.int64)
        self.layer_of = torch.arange(L).repeat_interleave(widths).to(device)    # of every channel
        self.sums = (self.layer_of[:, None] == torch.arange(L, device=device)).to(self.remembered)
        w = torch.tensor([self.first] + [1.0] * L)[:L].to(self.remembered)
        self.weights = (w / w.sum())[self.layer_of]
        self.classes = [type(layer) for layer in self.layers]
        for layer, layer.scale in zip(self.layers, scales):
            layer.__class__ = MeasuredBatchNorm2d
        return self

    def __exit__(self, *_):
        for layer, kind in zip(self.layers, self.classes):
            layer.__class__ = kind
            for name in ("scale", "statistics"):
                vars(layer).pop(name, None)
        if self.graphs:                     # a forked loader that frees a CUDA graph dies of it
            self.graphs = {}
            gc.collect()

    def __call__(self, x):
        """Logits of images, and the statistics (2, all channels) of what every layer was given."""
        return self.graphs.get(x.shape, self.forward)(x)

    def forward(self, x):
        logits = self.model(x)
        return logits, together([vars(layer).pop("statistics") for layer in self.layers])

    def capture(self, parts):
        """Make graphs for images like these: fast.captured."""
        self.graphs = {}
        for x in {x.shape: x for x in parts}.values():
            self.graphs[x.shape] = captured(self.forward, x)

    def loss(self, statistics, name=None, B=1):
        """The distance of statistics of B images, which take the place of the part of that name; a
        scalar that carries gradient to the input.

        With other parts the gradient is the distance's times (all images / B): it stands beside
        losses that are means over B images, and weighs as it does beside means over all.
        """
        self.parts.pop(name, None)
        number, of_all = merged([(B, statistics), *self.parts.values()])
        self.parts[name] = B, statistics.detach().clone()   # a CUDA graph writes them anew
        # all layers at once: ||far|| = far . unit, and unit is its gradient
        far = of_all - self.remembered
        with torch.no_grad(), float32(far.device):
            norms = (far.square() @ self.sums).sqrt()                       # (2, L)
            unit = far / norms.clamp(min=1e-30)[:, self.layer_of]
        distance = (self.weights * unit * far).sum()
        return distance + (number / B - 1) * (distance - distance.detach())


def together(statistics):
    """[(mean, variance) of a layer's channels] -> (2, all channels)."""
    if not statistics:
        return torch.zeros(2, 0)
    return torch.stack([torch.cat(of_layers) for of_layers in zip(*statistics)])


def merged(parts):
    """[(images, their mean and variance (2, n))] -> the same of all images together."""
    number = sum(B for B, _ in parts)
    mean = sum(B / number * s[0] for B, s in parts)                 # (n,)
    return number, torch.stack([mean, sum(
        B / number * (s[1] + (s[0] - mean) ** 2) for B, s in parts)])


# -------------------------------------------------------------------- the optimisation of pixels

def coloured(x, spectrum):
    """Images (..., H, W), the amplitude of every frequency f divided by f ** spectrum.

    f in cycles per pixel; the constant part counts as the lowest other frequency, 1 / max(H, W).
    Photographs have a spectrum near 1; 0 leaves x as it is.
    """
    if not spectrum:
        return x
    H, W = x.shape[-2:]
    f = torch.hypot(torch.fft.fftfreq(H, device=x.device)[:, None],
                    torch.fft.rfftfreq(W, device=x.device))
    return torch.fft.irfft2(torch.fft.rfft2(x) / f.clamp(min=1 / max(H, W)) ** spectrum, s=(H, W))


def noise(B, H, W, spectrum, generator):
    """Where an inversion starts: (B, 3, H, W) with standard deviation 1."""
    x = coloured(torch.randn(B, 3, H, W, generator=generator), spectrum)
    return x / x.std() if spectrum else x


def random_view(x, generator):
    """x (B, 3, H, W), rolled and, half of the time, flipped: one draw for the whole batch.

    Shifts of up to 30 pixels, or a sixth of the side if that is less: a small one would stay
    within a cell of the network's stride.
    """
    reach = [min(30, side // 6) for side in x.shape[2:]]
    shift = [int(torch.randint(-d, d + 1, (), generator=generator)) for d in reach]
    view = torch.roll(x, shift, dims=(2, 3))
    return view.flip(3) if torch.rand((), generator=generator) < 0.5 else view


def warmup_cosine(i, steps):
    """The rate at step i of `steps`: linear warm-up over a tenth (at most 100), a cosine to 0."""
    warmup = min(100, max(1, steps // 10))
    return min((i + 1) / warmup,
               0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / max(1, steps - warmup)))


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


def sides(size):
    """H, W."""
    return (size, size) if isinstance(size, int) else size


def resized(x, size):
    """Images (..., H, W) at another size, bilinearly."""
    return v2.functional.resize(x, list(sides(size))) if x.shape[-2:] != sides(size) else x


@torch.no_grad()
def statistics_of(model, parts, size):
    """Of images at that size, in parts (B, 3, H, W): their number, and mean and variance of every
    BatchNorm layer's input, (2, all channels)."""
    with frozen(model), BatchNormMatching(model) as matching:
        for k, x in enumerate(parts):
            matching.loss(matching(resized(x, size))[1], k, len(x))
    return merged(matching.parts.values())


def normalise_targets(targets):
    """(B, C) classes to show -> (B, C) float32 that sum to one per image."""
    if targets.dim() != 2 or not bool((targets.sum(1) > 0).all()):
        raise ValueError("targets must be (B, C) with at least one class per image, "
                         f"got {tuple(targets.shape)}")
    return targets.float() / targets.float().sum(1, keepdim=True)


def stages(sizes, steps):
    """Which step is made at which size, coarse to fine: the steps are shared out evenly, and the
    last is always made."""
    return [sizes[-1 - (steps - 1 - i) * len(sizes) // steps] for i in range(steps)]


def invert(model, targets, r, *, sizes, steps=1000, part=None, lr=0.25, seed=0,
           tv=0.355, l2=0.0089, bn=1.16, spectrum=0.0, others=None, on_step=None):
    """Optimise noise into images that the network takes for the asked classes (Eq. 2).

    model:   a segmentation network, images (B, 3, H, W) -> logits (B, C, h, w). It is left as it
             was found: weights and statistics bit for bit, training flags and requires_grad too.
    targets: (B, C) bool or float, the classes to show in each image (normalised to sum to one)
    r:       Eq. 1's scale, a number or a CPU tensor that broadcasts to (B, C)
    sizes:   H = W of the images, or (H, W), from coarse to fine. The paper's is one, [512]; ours
             begins at small ones, whose steps are cheap, and enlarges what has become.
    steps, lr, seed: of Adam with betas (0.5, 0.9); the steps are shared out evenly over the sizes,
             under one schedule. Noise, shifts and flips come from `seed` alone.
    part:    how many images a forward pass holds, if not all B: less memory. R(x)'s statistics are
             those of all B, the other parts' as they were in their latest pass.
    tv, l2, bn: weights of R(x). DeepInversion's published 1e-4, 1e-5 and 0.01 are of norms and a
             sum; of our means, which keep their meaning at another size, batch or network, they are
             1e-4 * sqrt(16*3*512*512), 1e-5 * sqrt(3*512*512) and 0.01 * (10 + 106 layers).
    spectrum: ours. Of the noise, and of the gradient that Adam sees. Adam gives every pixel a step
             of one size, so that noise grows as fast as objects do; 1 lets large shapes come first.
    others:  ours. {size: statistics_of() images of other classes}, which stand beside x's own
    on_step: called as on_step(i, terms) after each pass of step i with the named, detached terms
    Returns (B, 3, H, W) in the network's normalised space, clamped to the range of real images (for
    steps=0 the noise as it is drawn).
    Raises ValueError for targets of the wrong shape, or an image without a target.
    """
    device, targets = next(model.parameters()).device, normalise_targets(targets)
    generator = torch.Generator().manual_seed(seed)
    x = noise(len(targets), *sides(sizes[0]), spectrum, generator).to(device)
    low, high = (torch.tensor([(v - m) / s for m, s in zip(MEAN, STD)], device=device).view(3, 1, 1)
                 for v in (0, 1))
    part = part or len(targets)
    r = torch.atleast_2d(torch.as_tensor(r, dtype=torch.float64)).expand(len(targets), -1)
    parts, order, size = x.split(part), stages(sizes, steps), None
    targets, scales = targets.to(device).split(part), r.split(part)

    def objective(view, k):
        """The terms of Eq. 2 for part k."""
        logits, statistics = matching(view)
        scores = scale_aware_aggregation(logits, scales[k])                     # (B, C)
        if scores.shape != targets[k].shape:
            raise ValueError(f"targets are {tuple(targets[k].shape)}, "
                             f"but the network scores {tuple(scores.shape)}")
        return {"cls": classification_loss(scores, targets[k]).mean(),
                "tv": tv * total_variation(view), "l2": l2 * rms(view),
                "bn": bn * matching.loss(statistics, k, len(view))}

    # deterministic: the same image every time on one machine
    with frozen(model), BatchNormMatching(model) as matching, \
            torch.backends.cudnn.flags(enabled=True, deterministic=True,
                                       allow_tf32=torch.backends.cudnn.allow_tf32):
        for (i, now), k in itertools.product(enumerate(order), range(len(parts))):
            if now != size:
                size, parts = now, [resized(x.detach(), now).clone() for x in parts]
                optimizer = torch.optim.Adam([x.requires_grad_() for x in parts], lr=lr,
                                             betas=(0.5, 0.9))
                matching.parts = {"others": others[size]} if others else {}
                matching.capture(parts if order.count(size) >= 20 else [])     # costs a few passes
            x = parts[k]
            terms = objective(random_view(x, generator), k)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            x.grad = coloured(x.grad, spectrum)
            optimizer.param_groups[0]["lr"] = lr * warmup_cosine(i, steps)
            optimizer.step()                                # of x alone: others have no gradient
            x.detach().clamp_(low, high)
            terms = {name: term.detach() for name, term in terms.items()}   # frees autograd's graph
            if on_step:
                on_step(i, terms)
    return torch.cat(parts).detach()
