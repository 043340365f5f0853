"""
The methods the paper compares with (Tables 1 and 7), as MiB's code runs them, and the table of them all.

The paper took their numbers from MiB (Cermelli et al., 2020), so formulas, reductions and weights here
are those of MiB's published code. C_old is the number of old outputs (background included), q the
student's softmax over all C_t outputs, p the teacher's over the old ones. Every mean is over all
images and pixels; a pixel labelled 255 counts with loss 0 (Eq. 4 in distill.py leaves it out instead).

    FT            CE
    LwF           CE + lam * knowledge_distillation
    LwF-MC        BCE to the labels + lam * C_old * BCE of the old outputs to the teacher's
    ILT           CE + 100 * knowledge_distillation + lam * mean squared difference of body features
    MiB           unbiased_cross_entropy + lam * unbiased_distillation, background init
    EWC, PI, RW   CE + lam * sum_i omega_i * (theta_i - theta_old_i)^2
    Joint         CE on all classes at once
"""
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from chunked import chunked
from distill import hrhf, probability_rearrange


# ------------------------------------------------------------------------------- the distillation family

def cross_entropy(logits, labels):
    """Plain cross-entropy over all C_t outputs, mean over all pixels, 255 counting as 0.

    logits: (B, C_t, H, W); labels: (B, H, W). Returns a scalar.
    """
    return F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="none").mean()


def knowledge_distillation(logits, teacher_logits):
    """LwF, ILT: -1/C_old * sum_{c in C_old} p_c log q'_c, q' the softmax over the old outputs alone.

    Mean over old classes, images and pixels. logits: (B, C_t, H, W); teacher_logits: (B, C_old, H, W).
    """
    p = teacher_logits.detach().softmax(dim=1)
    return -(p * logits[:, :p.shape[1]].log_softmax(dim=1)).mean()


def unbiased_cross_entropy(logits, labels, num_old):
    """MiB: background may be any old class, -log sum_{k in C_old} q_k; a new class is -log q_k.

    Mean over all pixels, 255 counting as 0. logits: (B, C_t, H, W); labels: (B, H, W), every id below
    num_old is background.
    """
    log_q = logits.log_softmax(dim=1)
    old = log_q[:, :num_old].logsumexp(dim=1, keepdim=True)                     # (B, 1, H, W)
    shifted = (labels.long() - num_old + 1).clamp(min=0)                        # 0 old, 1 .. C_new
    shifted = torch.where(labels == 255, 255, shifted)
    log_q = torch.cat([old, log_q[:, num_old:]], dim=1)                         # (B, 1 + C_new, H, W)
    return F.nll_loss(log_q, shifted, ignore_index=255, reduction="none").mean()


def unbiased_distillation(logits, teacher_logits):
    """MiB: the same cross-entropy as HRHF's Eq. 3, but mean over the C_old classes instead of their sum."""
    p = teacher_logits.detach().softmax(dim=1)
    return -(p * probability_rearrange(logits, p.shape[1])).mean()


# --------------------------- the terms of each row: (logits, teacher_logits, labels, lam) -> named terms
# At step 0 teacher_logits is None and the label's term stands alone.

def ft_loss(logits, teacher_logits, labels, lam):
    """Fine-tuning; also Joint, and the task's loss of EWC, PI and RW."""
    return {"ce": cross_entropy(logits, labels)}


def lwf_loss(logits, teacher_logits, labels, lam):
    terms = {"ce": cross_entropy(logits, labels)}
    if teacher_logits is not None:
        terms["kd"] = lam * knowledge_distillation(logits, teacher_logits)
    return terms


def lwf_mc_loss(logits, teacher_logits, labels, lam):
    """LwF-MC (iCaRL without exemplars):

    "bce": binary cross-entropy to the one-hot labels, sum over the C_t classes, mean over all pixels,
           255 counting as 0
    "kd":  lam * binary cross-entropy of the old outputs to the teacher's sigmoids, mean over pixels and
           classes, times C_old: a sum over classes as well
    """
    C_t = logits.shape[1]
    labels = labels.long()
    one_hot = F.one_hot(torch.where(labels == 255, C_t, labels), C_t + 1)[..., :C_t].movedim(-1, 1)
    bce = F.binary_cross_entropy_with_logits(logits, one_hot.to(logits.dtype), reduction="none").sum(dim=1)
    terms = {"bce": (bce * (labels != 255)).mean()}
    if teacher_logits is not None:
        C_old = teacher_logits.shape[1]
        target = teacher_logits.detach().sigmoid()
        terms["kd"] = lam * C_old * F.binary_cross_entropy_with_logits(logits[:, :C_old], target)
    return terms


def mib_loss(logits, teacher_logits, labels, lam):
    if teacher_logits is None:
        return {"ce": cross_entropy(logits, labels)}
    return {"ce": unbiased_cross_entropy(logits, labels, teacher_logits.shape[1]),
            "kd": lam * unbiased_distillation(logits, teacher_logits)}


# ------------------------ the methods: (student, teacher, batch, lam) -> loss, its named terms (detached)

def method(loss, student, teacher, batch, lam):
    """Any row whose terms are made of the two networks' logits; ILT is not."""
    images, labels = batch
    with torch.inference_mode():
        teacher_logits = teacher(images) if teacher else None
    return chunked(partial(loss, lam=lam), student(images), teacher_logits, labels)


def ilt(student, teacher, batch, lam=100.0):
    images, labels = batch
    logits, features = student(images, features=True)
    if teacher is None:
        return chunked(partial(ft_loss, lam=0), logits, None, labels)
    with torch.no_grad():                                   # the distance keeps them for its gradient
        teacher_logits, teacher_features = teacher(images, features=True)
    l, terms = chunked(partial(lwf_loss, lam=100), logits, teacher_logits, labels)
    distance = lam * F.mse_loss(features.float(), teacher_features.float())
    return l + distance, {**terms, "features": distance.detach()}


def ft(student, teacher, batch, lam):
    return method(ft_loss, student, None, batch, lam)       # it has no use for the teacher


lwf, lwf_mc, mib = (partial(method, loss) for loss in (lwf_loss, lwf_mc_loss, mib_loss))


# ----------------------------------------------------------------------------------- the penalty family

def normalise(omega):
    """Min-max per tensor: {name: tensor} with values in 0 .. 1."""
    return {name: (v - v.min()) / (v.max() - v.min() + 1e-8) for name, v in omega.items()}


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients(model):
    """The task loss's gradients. A float16 overflow (the scaler then skips the step) counts as 0."""
    return {name: p.grad.detach().nan_to_num(0, 0, 0) for name, p in model.named_parameters()}


class Importance:
    """sum_i omega_i * (theta_i - theta_old_i)^2 over the old network's parameters.

    A new object for every step: `teacher` is the old network, `state` the state_dict of its step's
    object (both None at step 0, where there is no penalty yet). update(model) is called after the
    backward of the task's loss alone and before the optimiser's step. Under DDP gradients are
    averaged by then, so every rank gathers the same.
    """

    def __init__(self, model, teacher=None, state=None):
        self.theta_old = {name: p.clone() for name, p in parameters(teacher or model).items()}
        self.begin(model, state)
        if state is None:
            self.omega = {}

    def penalty(self, model):
        """Unweighted; a scalar with gradient to the model's parameters."""
        old = [(p, name) for name, p in model.named_parameters() if name in self.omega]
        return sum((self.omega[name] * (p - self.theta_old[name]).square()).sum() for p, name in old)

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "omega"}

    def load_state_dict(self, state):
        device = next(iter(self.theta_old.values())).device
        for name, value in state.items():
            on_device = {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value
            setattr(self, name, on_device)


class EWC(Importance):
    """Elastic weight consolidation, online: F <- 0.9 g^2 + 0.1 F each iteration, F starts at ones.

    omega = F of the step before, min-max normalised per tensor.
    """

    def begin(self, model, state):
        self.fisher = {name: torch.ones_like(p) for name, p in parameters(model).items()}
        if state is not None:
            self.fisher.update({name: v.to(self.theta_old[name].device) for name, v in state["fisher"].items()})
            self.omega = normalise({name: self.fisher[name] for name in self.theta_old})

    def update(self, model):
        for name, g in gradients(model).items():
            self.fisher[name] = 0.9 * g.square() + 0.1 * self.fisher[name]


class PI(Importance):
    """Path integral (synaptic intelligence): delta += g * (theta_before - theta), over the iterations.

    A step's importance is relu(delta / ((theta_end - theta_start)^2 + 1e-20)); omega is their sum over
    the steps so far, min-max normalised per tensor. The gradient is that of the iteration after the
    move, as in MiB's code.
    """

    def begin(self, model, state):
        now = parameters(model)
        self.delta = {name: torch.zeros_like(p) for name, p in now.items()}
        self.start = {name: p.clone() for name, p in now.items()} | self.theta_old
        self.before = {}
        self.score = {}
        if state is not None:
            for name, end in self.theta_old.items():
                moved = (end - state["start"][name].to(end.device)).square() + 1e-20
                self.score[name] = (state["delta"][name].to(end.device) / moved).relu()
                if name in state["score"]:
                    self.score[name] = self.score[name] + state["score"][name].to(end.device)
            self.omega = normalise(self.score)

    def update(self, model):
        now = parameters(model)
        if self.before:
            for name, g in gradients(model).items():
                self.delta[name] = self.delta[name] + g * (self.before[name] - now[name])
        self.before = {name: p.clone() for name, p in now.items()}


class RW(Importance):
    """Riemannian walk: EWC's Fisher, plus every 10 iterations score += g * d / (0.5 * F * d^2 + 1e-8).

    d = theta_before - theta over those 10 iterations. A step's score is relu(score), averaged with
    the score of the steps before; omega = normalised F + normalised score.
    """

    def begin(self, model, state):
        EWC.begin(self, model, state)
        self.raw = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
        self.before, self.score, self.count = {}, {}, 0
        if state is not None:
            for name, old in self.theta_old.items():
                self.score[name] = state["raw"][name].to(old.device).relu()
                if name in state["score"]:
                    self.score[name] = 0.5 * (self.score[name] + state["score"][name].to(old.device))
            score = normalise(self.score)
            self.omega = {name: v + score[name] for name, v in self.omega.items()}

    def update(self, model):
        now, g = parameters(model), gradients(model)
        if self.count % 10 == 0:
            if self.before:
                for name in now:
                    d = self.before[name] - now[name]
                    self.raw[name] = self.raw[name] + g[name] * d / (0.5 * self.fisher[name] * d.square() + 1e-8)
            self.before = {name: p.clone() for name, p in now.items()}
        self.count += 1
        EWC.update(self, model)


# ------------------------------------------------------------------------------------------- the table

class Method(NamedTuple):
    """A row of the paper's tables: what train.py needs to run it."""
    loss: Callable                  # (student, teacher, batch, lam) -> loss, its named terms
    lam: float                      # weight of its term against forgetting, as in MiB's code or the paper
    init: str = "random"            # of new classifiers
    importance: type = None         # EWC, PI, RW: adds lam * penalty
    fakes: bool = False             # half of each mini-batch is fake
    offline: bool = False           # all classes in one step


METHODS = {                         # weights: MiB's argparser and README; HRHF: Sec. 4.2
    "ft": Method(ft, 0.0),
    "lwf": Method(lwf, 100.0),
    "lwf-mc": Method(lwf_mc, 10.0),
    "ilt": Method(ilt, 100.0),      # and 100 on the distillation
    "ewc": Method(ft, 500.0, importance=EWC),                   # PLOP's copy: 100
    "pi": Method(ft, 500.0, importance=PI),                     # PLOP's copy: 100
    "rw": Method(ft, 100.0, importance=RW),
    "mib": Method(mib, 10.0, init="background"),
    "hrhf": Method(hrhf, 1.0, init="background", fakes=True),
    "joint": Method(ft, 0.0, offline=True),
}
