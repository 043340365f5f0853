"""
Scale-Aware Aggregation (paper, Sec. 3.2, Eq. 1): a segmentation map becomes one score per class.

    y_k = 1/r * log[ 1/(H W) * sum_ij exp(r * s_kij) ]

s is the map of class scores (logits, at the network's native stride), r > 0 the scale. A low r
averages: to raise y_k the whole map must rise, so the object that is asked for grows. A high r
takes the maximum: one good pixel is enough, so the object stays small. r -> 0 is exactly the mean
and r -> inf exactly the maximum: the rows AVG and MAX of Table 3.
"""
import torch


def scale_aware_aggregation(scores, r):
    """Pool class scores over the map with Eq. 1.

    scores: (B, C, H, W) logits
    r:      a number, or a tensor that broadcasts to (B, C): one scale per image and class.
            0 is the mean, inf the maximum. Keep a tensor r on the CPU: it is checked here, and
            on a GPU the check would wait for all work queued there.
    Returns (B, C), float32 (float64 for float64 scores). Stable for any |r * s|.
    Raises ValueError for a negative or nan r.
    """
    r = torch.as_tensor(r, dtype=torch.float64)
    if not bool((r >= 0).all()):
        raise ValueError(f"r must be >= 0 (0 is the mean, inf the maximum), got {r.tolist()}")
    B, C = scores.shape[:2]
    s = scores.flatten(2)                                           # (B, C, H*W)
    r = r.to(s.device, non_blocking=True).expand(B, C)
    is_mean, is_max = r < 1e-300, torch.isinf(r)                    # below, 1 / r may overflow
    finite_r = r.masked_fill(is_mean | is_max, 1.0)

    # exp(r * (s - top)) never overflows; log1p and expm1 keep what a small r leaves of it. float64,
    # because a large r leaves 1 / (H W) of log1p's argument; the map is small.
    s = s.double()
    top = s.detach().amax(2, keepdim=True)                          # (B, C, 1)
    mean_exp = torch.expm1(finite_r[..., None] * (s - top)).mean(2)  # its mean, less one
    y = top[..., 0] + torch.log1p(mean_exp) / finite_r              # (B, C)
    y = torch.where(is_mean, s.mean(2), y)
    y = torch.where(is_max, s.amax(2), y)
    return y.to(torch.promote_types(scores.dtype, torch.float32))
