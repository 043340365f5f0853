"""
Losses at the labels' resolution in little memory: an engine around the plain loss functions.

The losses of distill.py and baselines.py are means over the pixels of upsampled logits (B, C, H, W). At
24 x 151 x 512 x 512 one such tensor takes 3.8 GB, and a loss needs several. But the mean over a
mini-batch is a weighted sum of the means over its parts, and all that the network needs back is the
gradient at its own stride. So `chunked` goes through the mini-batch in bands of rows and takes each
band's gradient at once:

    l = sum_k  w_k * l(band_k)              w_k: the band's share of the pixels
    dl/ds = sum_k  w_k * dl(band_k)/ds      s: logits (B, C, h, w) at the network's stride
"""
import contextlib

import torch
import torch.nn.functional as F

# Upsampled logits of a band (several small images, some rows of a large one), 4 bytes each: few enough for a CPU's
# cache, enough to keep a GPU busy.
ELEMENTS = {"cpu": 2 ** 20, "cuda": 2 ** 24}


def upsample(logits, labels):
    """Bring logits (B, C, h, w) to the labels' size (B, H, W), bilinearly, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)


def upsample_rows(logits, rows, H, W):
    """The rows `rows` (a slice) of `upsample` to (H, W): a matrix of bilinear weights down, interpolate across."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    one_hot = torch.eye(logits.shape[2], dtype=logits.dtype, device=logits.device)
    weights = F.interpolate(one_hot[None], H, mode="linear", align_corners=False)[0].T[rows]       # (rows, h)
    return F.interpolate(weights @ logits, (len(weights), W), mode="bilinear", align_corners=False)


def float32(device):
    """No autocast inside, forward or backward: a matrix product in half precision would cost the gradient."""
    known = torch.amp.is_autocast_available(device.type)                        # not for "meta"
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


def chunked(loss, logits, teacher_logits, labels, of_labelled=()):
    """`loss` of the upsampled logits: its value, its gradient to `logits`, and its terms.

    loss:           (logits (B, C_t, H, W), teacher_logits (B, C_old, H, W) or None, labels (B, H, W)) ->
                    named terms, each a mean over images and pixels
    logits:         (B, C_t, h, w) at the student's stride
    teacher_logits: (B, C_old, h, w) or None, treated as constant
    labels:         (B, H, W) ids
    of_labelled:    names of the terms that are means over the pixels that are not 255, not over all
    Returns (l, terms): the scalar l, sum of the terms, to call backward() on, and the terms, detached.
    """
    (B, C, h, w), (H, W) = logits.shape, labels.shape[-2:]
    elements = ELEMENTS.get(logits.device.type, ELEMENTS["cuda"])
    many, tall = max(1, elements // (C * H * W)), max(1, min(H, elements // (C * W)))      # images, rows of a band
    wanted = torch.is_grad_enabled() and logits.requires_grad
    all_labelled = (labels != 255).sum().clamp(min=1)
    terms, gradients = {}, []
    for first in range(0, B, many):
        # float32 all the way: a float16 gradient would underflow, as the scaler's factor comes only in backward()
        s = logits[first:first + many].detach()
        s = s.to(torch.promote_types(s.dtype, torch.float32)).requires_grad_(wanted)
        gradients.append(torch.zeros_like(s))
        for top in range(0, H, tall):
            rows = slice(top, top + tall)
            y = labels[first:first + many, rows]
            share = {True: (y != 255).sum() / all_labelled, False: y.numel() / labels.numel()}
            with float32(logits.device):
                t = None if teacher_logits is None else upsample_rows(teacher_logits[first:first + many], rows, H, W)
                band = loss(upsample_rows(s, rows, H, W), t, y)
                band = {name: share[name in of_labelled] * term for name, term in band.items()}
                if wanted:
                    gradients[-1] += torch.autograd.grad(sum(band.values()), s)[0]
            terms = {name: terms.get(name, 0) + term.detach() for name, term in band.items()}
    l = sum(terms.values())
    return (WithGradient.apply(logits, l, torch.cat(gradients)) if wanted else l), terms
