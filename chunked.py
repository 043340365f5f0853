"""
Losses at the labels' resolution in the memory of one image: an engine around the plain loss functions.

The losses of distill.py and baselines.py are means over the pixels of upsampled logits (B, C, H, W). At
24 x 151 x 512 x 512 one such tensor takes 3.8 GB, and a loss needs several. But the mean over a
mini-batch is a weighted sum of the means over its parts, and all that the network needs back is the
gradient at its own stride. So `chunked` goes through the mini-batch a few images at a time and takes
each part's gradient at once:

    l = sum_k  w_k * l(part_k)                              w_k: the part's share of the pixels
    dl/ds = [w_1 * dl(part_1)/ds_1, w_2 * dl(part_2)/ds_2, ...]      s: logits (B, C, h, w)
"""
import torch
import torch.nn.functional as F

ELEMENTS = 2 ** 22      # of one part's upsampled logits, 16 MB in float32; at least one image all the same


def upsample(logits, labels):
    """Bring logits (B, C, h, w) to the labels' size (B, H, W), bilinearly, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)


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
    B, (H, W) = len(labels), labels.shape[-2:]
    size = max(1, ELEMENTS // (logits.shape[1] * H * W))                        # images in a part
    wanted = torch.is_grad_enabled() and logits.requires_grad
    labelled = (labels != 255).flatten(1).sum(1)                                # (B,) pixels
    terms, gradients = {}, []
    for start in range(0, B, size):
        part = slice(start, start + size)
        # float32: a float16 gradient would underflow, as the scaler's factor comes only in backward()
        s = logits[part].detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_(wanted)
        old = None if teacher_logits is None else upsample(teacher_logits[part], labels[part])
        values = loss(upsample(s, labels[part]), old, labels[part])
        w = {True: labelled[part].sum() / labelled.sum().clamp(min=1), False: len(s) / B}
        values = {name: w[name in of_labelled] * value for name, value in values.items()}
        if wanted:
            gradients += torch.autograd.grad(sum(values.values()), s)
        terms = {name: terms.get(name, 0) + value.detach() for name, value in values.items()}
    l = sum(terms.values())
    return (WithGradient.apply(logits, l, torch.cat(gradients)) if wanted else l), terms
