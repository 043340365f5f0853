"""
The same numbers, cheaper: losses in bands of rows, and BatchNorm that measures what it normalises.

Both are engines around plain formulas, which stand in distill.py, methods.py and seginversion.py.

1. A loss is a mean over the pixels of upsampled logits (B, C, H, W). At 24 x 151 x 512 x 512 one
such tensor takes 3.8 GB, and a loss needs several. But the mean over a mini-batch is a weighted
sum of the means over its parts, and all that the network needs back is the gradient at its own
stride. So `in_bands` goes through it in bands of rows and takes each band's gradient at once:

    l = sum_k  w_k * l(band_k)              w_k: the band's share of the pixels
    dl/ds = sum_k  w_k * dl(band_k)/ds      s: logits (B, C, h, w) at the network's stride

2. SegInversion needs mean and variance of every BatchNorm layer's input, and a gradient through
them. `MeasuredBatchNorm2d` takes both from one kernel and folds their gradient into its own; on a
GPU `captured` replays the whole network.
"""
import contextlib
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------- 1. losses in bands

# Upsampled logits of a band (several small images, some rows of a large one), 4 bytes each: few
# enough for a CPU's cache, enough to keep a GPU busy.
ELEMENTS = {"cpu": 2 ** 20, "cuda": 2 ** 24}


def upsample_rows(logits, rows, H, W):
    """The rows `rows` (a slice) of logits (B, C, h, w) upsampled to (H, W), bilinearly, in float32.

    A matrix of bilinear weights down, interpolate across.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    one_hot = torch.eye(logits.shape[2], dtype=logits.dtype, device=logits.device)
    weights = F.interpolate(one_hot[None], H, mode="linear", align_corners=False)[0].T[rows]
    return F.interpolate(weights @ logits,                      # (rows, h) @ (B, C, h, w)
                         (len(weights), W), mode="bilinear", align_corners=False)


def float32(device):
    """No autocast inside: a matrix product in half precision would cost the gradient."""
    known = torch.amp.is_autocast_available(device.type)        # not for "meta"
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


class WithGradient(torch.autograd.Function):
    """A scalar `value` of x whose gradient to x is known already."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_value):
        gradient, = ctx.saved_tensors
        return (d_value * gradient).to(ctx.dtype), None, None


def bands(B, C, H, W, elements):
    """Pairs of slices, of images and of their rows, whose logits are at most `elements` numbers."""
    many, tall = max(1, elements // (C * H * W)), max(1, min(H, elements // (C * W)))
    return [(slice(first, first + many), slice(top, top + tall))
            for first in range(0, B, many) for top in range(0, H, tall)]


def in_bands(loss, logits, teacher_logits, labels, of_labelled=()):
    """`loss` of the upsampled logits: its value, its gradient to `logits`, and its terms.

    loss:           (logits (B, C_t, H, W), teacher_logits (B, C_old, H, W) or None,
                    labels (B, H, W)) -> named terms, each a mean over images and pixels
    logits:         (B, C_t, h, w) at the student's stride
    teacher_logits: (B, C_old, h, w) or None, treated as constant
    labels:         (B, H, W) ids
    of_labelled:    names of the terms that are means over the pixels that are not 255, of all
                    processes: DDP's mean of their gradients is then that of one process
    Returns (l, terms): the scalar l, their sum, to call backward() on, and the terms, detached.
    """
    (B, C), (H, W), device = logits.shape[:2], labels.shape[-2:], logits.device
    wanted = torch.is_grad_enabled() and logits.requires_grad
    # float32 all the way: a float16 gradient would underflow, as the scaler's factor comes only
    # in backward()
    exact = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    gradient, terms = torch.zeros_like(exact), {}
    all_labelled, ranks = (labels != 255).sum(), 1
    if of_labelled and dist.is_initialized():
        dist.all_reduce(all_labelled)
        ranks = dist.get_world_size()
    all_labelled = all_labelled.clamp(min=1) / ranks            # in a process, on average
    for images, rows in bands(B, C, H, W, ELEMENTS.get(device.type, ELEMENTS["cuda"])):
        s, y, t = exact[images].requires_grad_(wanted), labels[images, rows], None
        share, labelled = y.numel() / labels.numel(), (y != 255).sum() / all_labelled
        with float32(device):
            if teacher_logits is not None:
                t = upsample_rows(teacher_logits[images], rows, H, W)
            band = {name: (labelled if name in of_labelled else share) * term
                    for name, term in loss(upsample_rows(s, rows, H, W), t, y).items()}
            if wanted:
                gradient[images] += torch.autograd.grad(sum(band.values()), s)[0]
        terms = {name: terms.get(name, 0) + term.detach() for name, term in band.items()}
    l = sum(terms.values())
    return (WithGradient.apply(logits, l, gradient) if wanted else l), terms


# --------------------------------------------------------- 2. BatchNorm that measures its input

class MeasureAndNormalise(torch.autograd.Function):
    """BatchNorm2d in evaluation mode, and the mean and biased variance of what it is given.

        y = scale * (x - running_mean) + bias,      scale = weight / sqrt(running_var + eps)
        m, v: over the n = B H W values of x (B, C, H, W) that a channel has

    The gradients of y, m and v come together, affine in x. Only x gets one.

        dx = scale * dy + a * x + b,    a = 2/n * dv,    b = 1/n * dm - a * m

    Returns y (B, C, H, W), m and v (C,).
    """

    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, eps, scale):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.device.type in ("cpu", "cuda"):                    # BatchNorm's own kernel
            m, v = torch.batch_norm_update_stats(x32, None, None, 0.0)
        else:
            v, m = torch.var_mean(x32, dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, m, scale)
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps), m, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dm, dv):
        x, m, scale = ctx.saved_tensors
        n = x.numel() / x.shape[1]
        a = dv * (2 / n)
        b = torch.addcmul(dm / n, a, m, value=-1)
        a, b, scale = (c.view(1, -1, 1, 1) for c in (a, b, scale))
        return torch.addcmul(b, x, a).addcmul_(dy, scale), *[None] * 6


class MeasuredBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d in evaluation mode that keeps its latest input's statistics: m, v (C,).

    Its scale is set from outside: it stays as it is for many passes.
    """

    def forward(self, x):
        y, *self.statistics = MeasureAndNormalise.apply(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, self.scale)
        return y


def captured(network, x):
    """On a GPU a function as one CUDA graph each way, for many calls with images like x: a small
    network's kernels end before the host has asked for the next.

    network: a function (not a module, whose forward would be replaced), images -> tensors. Those
    are written anew by the next call, before which backward() must have been called.
    """
    if not x.is_cuda:
        return network
    gc.collect()                    # an old graph's memory; freed in a capture, it would end that
    with torch.cuda.device(x.device):
        return torch.cuda.make_graphed_callables(network, (torch.zeros_like(x).requires_grad_(),))
