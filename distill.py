"""
Half-Real Half-Fake Distillation (paper, Sec. 3.3): the losses that train the new network.

    s_t, s_{t-1}  logits of the student (C_old + C_new channels) and of the teacher (C_old channels,
                  background first); p = softmax(s_{t-1}), q = softmax(s_t)
    q^            Probability Rearrange: q^_0 = q_0 + sum of the new classes, else q^_c = q_c
    y_merge       Label Merge: the new class where the image is labelled with one, else argmax_c p_c

    Eq. 3   l_kd  = -1/(H W) * sum_u sum_{c in C_old} p_uc log q^_uc
    Eq. 4   l_seg = -1/(H W) * sum_u log q_u[y_merge_u]
    Eq. 5   l     = lam * l_kd + l_seg

Both losses run over every pixel of the whole mini-batch, the real half and the fake half alike.
Fake images carry no labels (0 everywhere), so their y_merge is the teacher's prediction.
"""
import torch
import torch.nn.functional as F


def probability_rearrange(logits, num_old):
    """Fold the new classes into the background: student and teacher speak of the same classes.

    logits:  (B, C_t, H, W) student logits, background first, then the old, then the new classes
    num_old: C_old, the number of the teacher's channels, background included
    Returns log q^: (B, C_old, H, W) log-probabilities that sum to one over the old classes.
    """
    log_q = F.log_softmax(logits, dim=1)                                    # (B, C_t, H, W)
    background = torch.cat([log_q[:, :1], log_q[:, num_old:]], dim=1)       # (B, 1 + C_new, H, W)
    background = background.logsumexp(dim=1, keepdim=True)                  # (B, 1, H, W)
    return torch.cat([background, log_q[:, 1:num_old]], dim=1)              # (B, C_old, H, W)


def distillation_loss(logits, teacher_logits):
    """Eq. 3: cross-entropy of the rearranged student to the teacher's probabilities.

    Sum over the C_old classes, mean over images and pixels. (MiB divides by C_old as well: its
    weight of 10 is 10 / C_old on this scale.)

    logits: (B, C_t, H, W); teacher_logits: (B, C_old, H, W), treated as constant. Returns a scalar.
    """
    p = teacher_logits.detach().softmax(dim=1)
    log_q = probability_rearrange(logits, teacher_logits.shape[1])
    return -(p * log_q).sum(dim=1).mean()


def label_merge(teacher_logits, labels):
    """Complete the labels: new classes from the ground truth, everything else from the teacher.

    The paper takes the argmax of the teacher's probabilities with the labels' one-hot map beside
    them. That is this `where`, except that a teacher saturated at p = 1 would tie with the label.

    teacher_logits: (B, C_old, H, W); labels: (B, H, W) integer ids, new classes >= C_old, the
    rest 0. A 255 stays 255: no pseudo-label for pixels that are to be ignored.
    Returns (B, H, W) int64.
    """
    new = labels >= teacher_logits.shape[1]
    return torch.where(new, labels.long(), teacher_logits.argmax(dim=1))


def segmentation_loss(logits, merged):
    """Eq. 4: plain cross-entropy over all C_t classes, mean over the pixels that are not 255.

    logits: (B, C_t, H, W); merged: (B, H, W) integer ids. Returns a scalar; 0 if all is 255.
    """
    total = F.cross_entropy(logits, merged.long(), ignore_index=255, reduction="sum")
    return total / (merged != 255).sum().clamp(min=1)


def hrhf_loss(logits, teacher_logits, labels, lam=1.0):
    """Eq. 5 as named terms, weights applied: {"kd": lam * l_kd, "seg": l_seg}. Their sum is l.

    logits: (B, C_t, H, W); labels: (B, H, W); teacher_logits: (B, C_old, H, W), or None at step 0,
    which has l_seg alone.
    """
    if teacher_logits is None:
        return {"seg": segmentation_loss(logits, labels)}
    merged = label_merge(teacher_logits, labels)
    return {"kd": lam * distillation_loss(logits, teacher_logits),
            "seg": segmentation_loss(logits, merged)}
