"""
The ten rows of the paper's Tables 1 and 7, HRHF among them: losses, importances, and METHODS.

The paper took the other nine's numbers from MiB (Cermelli et al., 2020), so their formulas,
reductions and weights are those of MiB's published code. C_old is the number of old outputs
(background included), q the student's softmax over all C_t outputs, p the teacher's over the old
ones. Every mean is over all images and pixels; a pixel labelled 255 counts with loss 0 (HRHF's
Eq. 4 leaves it out instead).

    FT            CE
    LwF           CE + lam * knowledge_distillation
    LwF-MC        BCE to the labels + lam * C_old * BCE of the old outputs to the teacher's
    ILT           CE + 100 * knowledge_distillation + lam * mean squared difference of body features
    MiB           unbiased_cross_entropy + lam * unbiased_distillation, background init
    EWC, PI, RW   CE + lam * sum_i omega_i * (theta_i - theta_old_i)^2
    HRHF          Eq. 5 (distill.py), background init, half of each mini-batch fake
    Joint         CE on all classes at once

A method of your own is a function like mib_loss and a line in METHODS.
"""
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from distill import hrhf_loss, probability_rearrange
from fast import in_bands


# --------------------------------------------------------------------- the distillation family

def cross_entropy(logits, labels):
    """Plain cross-entropy over all C_t outputs, mean over all pixels, 255 counting as 0.

    logits: (B, C_t, H, W); labels: (B, H, W). Returns a scalar.
    """
    return F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="none").mean()


def knowledge_distillation(logits, teacher_logits):
    """LwF, ILT: -1/C_old * sum_{c in C_old} p_c log q'_c, q' the softmax over old outputs alone.

    Mean over old classes, images and pixels.
    logits: (B, C_t, H, W); teacher_logits: (B, C_old, H, W). Returns a scalar.
    """
    p = teacher_logits.detach().softmax(dim=1)
    return -(p * logits[:, :p.shape[1]].log_softmax(dim=1)).mean()


def unbiased_cross_entropy(logits, labels, num_old):
    """MiB: background may be any old class, -log sum_{k in C_old} q_k; a new class is -log q_k.

    Mean over all pixels, 255 counting as 0. Returns a scalar.
    logits: (B, C_t, H, W); labels: (B, H, W), every id below num_old is background.
    """
    log_q = logits.log_softmax(dim=1)
    old = log_q[:, :num_old].logsumexp(dim=1, keepdim=True)                 # (B, 1, H, W)
    shifted = (labels.long() - num_old + 1).clamp(min=0)                    # 0 old, 1 .. C_new
    shifted = torch.where(labels == 255, 255, shifted)
    log_q = torch.cat([old, log_q[:, num_old:]], dim=1)                     # (B, 1 + C_new, H, W)
    return F.nll_loss(log_q, shifted, ignore_index=255, reduction="none").mean()


def unbiased_distillation(logits, teacher_logits):
    """MiB: HRHF's Eq. 3, but mean over the C_old classes instead of their sum. Returns a scalar."""
    p = teacher_logits.detach().softmax(dim=1)
    return -(p * probability_rearrange(logits, p.shape[1])).mean()


# ----------------- terms of each row: (logits, teacher_logits, labels, lam) -> named terms
# logits (B, C_t, H, W); teacher_logits (B, C_old, H, W), or None at step 0, where the label's term
# stands alone; labels (B, H, W) uint8. Every term is a mean over images and pixels, lam applied: it
# is computed in bands of rows (fast.py), so a sum, or a loss of the whole image, would be wrong.
# HRHF's are in distill.py.

def ft_loss(logits, teacher_logits, labels, lam):
    """Fine-tuning; also Joint, and the task's loss of EWC, PI and RW."""
    return {"ce": cross_entropy(logits, labels)}


def lwf_loss(logits, teacher_logits, labels, lam):
    """Cross-entropy and knowledge distillation over the old outputs."""
    terms = {"ce": cross_entropy(logits, labels)}
    if teacher_logits is not None:
        terms["kd"] = lam * knowledge_distillation(logits, teacher_logits)
    return terms


def lwf_mc_loss(logits, teacher_logits, labels, lam):
    """LwF-MC (iCaRL without exemplars):

    "bce": binary cross-entropy to the one-hot labels, sum over the C_t classes, mean over all
           pixels, 255 counting as 0
    "kd":  lam * binary cross-entropy of the old outputs to the teacher's sigmoids, mean over pixels
           and classes, times C_old: a sum over classes as well
    """
    C_t = logits.shape[1]
    labels = labels.long()
    one_hot = F.one_hot(torch.where(labels == 255, C_t, labels), C_t + 1)[..., :C_t].movedim(-1, 1)
    bce = F.binary_cross_entropy_with_logits(logits, one_hot.to(logits.dtype), reduction="none")
    bce = bce.sum(dim=1)                                    # (B, H, W)
    terms = {"bce": (bce * (labels != 255)).mean()}
    if teacher_logits is not None:
        C_old = teacher_logits.shape[1]
        target = teacher_logits.detach().sigmoid()
        kd = F.binary_cross_entropy_with_logits(logits[:, :C_old], target)
        terms["kd"] = lam * C_old * kd
    return terms


def mib_loss(logits, teacher_logits, labels, lam):
    """Both terms with the background standing for every class that has no label of its own."""
    if teacher_logits is None:
        return {"ce": cross_entropy(logits, labels)}
    return {"ce": unbiased_cross_entropy(logits, labels, teacher_logits.shape[1]),
            "kd": lam * unbiased_distillation(logits, teacher_logits)}


# -------------------------------------------------------------------------- the penalty family

def min_max(omega):
    """{name: tensor}, each tensor scaled to 0 .. 1."""
    return {name: (v - v.min()) / (v.max() - v.min() + 1e-8) for name, v in omega.items()}


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients(model):
    """The task loss's gradients; 0 for a float16 overflow, whose step the scaler skips."""
    return {name: p.grad.detach().nan_to_num(0, 0, 0) for name, p in model.named_parameters()}


def on_device(state, device):
    """A state_dict of an Importance, its dicts of tensors on the device."""
    return {name: {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value
            for name, value in state.items()}


class Importance:
    """sum_i omega_i * (theta_i - theta_old_i)^2 over the old network's parameters.

    A new object for every step: `teacher` is the old network, `state` the state_dict of its step's
    object (both None at step 0, where omega is empty). A kind of it has two methods of its own:

    begin(now, state)   start gathering at parameters `now` {name: tensor}; set omega from the step
                        before's state, if there is one
    update(model)       gather from an iteration: the model's parameters and their gradients, after
                        the backward of the task's loss alone and before the optimiser's step.
                        Under DDP gradients are averaged by then: every rank gathers the same
    """

    def __init__(self, model, teacher=None, state=None):
        """model: the new network of the step, whose parameters begin(now, state) starts from."""
        self.theta_old = {name: p.clone() for name, p in parameters(teacher or model).items()}
        self.device = next(iter(self.theta_old.values())).device
        self.omega = {}
        self.begin(parameters(model), state and on_device(state, self.device))

    def penalty(self, model):
        """Unweighted; a scalar with gradient to the model's parameters."""
        return sum((self.omega[name] * (p - self.theta_old[name]).square()).sum()
                   for name, p in model.named_parameters() if name in self.omega)

    def state_dict(self):
        return {name: v for name, v in vars(self).items() if name not in ("omega", "device")}

    def load_state_dict(self, state):
        vars(self).update(on_device(state, self.device))


class EWC(Importance):
    """Elastic weight consolidation, online: F <- 0.9 g^2 + 0.1 F each iteration, F starts at ones.

    omega = F of the step before, min-max normalised per tensor.
    """

    def begin(self, now, state):
        self.fisher = {name: torch.ones_like(p) for name, p in now.items()}
        if state:
            self.fisher |= state["fisher"]
            self.omega = min_max({name: self.fisher[name] for name in self.theta_old})

    def update(self, model):
        for name, g in gradients(model).items():
            self.fisher[name] = 0.9 * g.square() + 0.1 * self.fisher[name]


class PI(Importance):
    """Path integral (synaptic intelligence): delta += g * (theta_before - theta), each iteration.

    A step's importance is relu(delta / ((theta_end - theta_start)^2 + 1e-20)); omega is their sum
    over the steps so far, min-max normalised per tensor. The gradient is that of the iteration
    after the move, as in MiB's code.
    """

    def begin(self, now, state):
        self.delta = {name: torch.zeros_like(p) for name, p in now.items()}
        self.start = {name: p.clone() for name, p in now.items()} | self.theta_old
        self.before, self.score = {}, {}
        if state:
            for name, end in self.theta_old.items():
                moved = (end - state["start"][name]).square() + 1e-20
                score = (state["delta"][name] / moved).relu()
                self.score[name] = score + state["score"].get(name, 0)
            self.omega = min_max(self.score)

    def update(self, model):
        now = parameters(model)
        if self.before:
            for name, g in gradients(model).items():
                self.delta[name] = self.delta[name] + g * (self.before[name] - now[name])
        self.before = {name: p.clone() for name, p in now.items()}


class RW(EWC):
    """Riemannian walk: EWC's F; every 10 iterations score += g * d / (0.5 * F * d^2 + 1e-8).

    d = theta_before - theta over those 10 iterations. A step's score is relu(score), averaged with
    the score of the steps before; omega = normalised F + normalised score.
    """

    def begin(self, now, state):
        super().begin(now, state)
        self.raw = {name: torch.zeros_like(p) for name, p in now.items()}
        self.before, self.score, self.count = {}, {}, 0
        if state:
            new = {name: state["raw"][name].relu() for name in self.theta_old}
            self.score = {name: 0.5 * (v + state["score"][name]) if name in state["score"] else v
                          for name, v in new.items()}
            score = min_max(self.score)
            self.omega = {name: v + score[name] for name, v in self.omega.items()}

    def update(self, model):
        now, g = parameters(model), gradients(model)
        if self.count % 10 == 0:
            for name, before in self.before.items():
                d = before - now[name]
                way = 0.5 * self.fisher[name] * d.square() + 1e-8
                self.raw[name] = self.raw[name] + g[name] * d / way
            self.before = {name: p.clone() for name, p in now.items()}
        self.count += 1
        super().update(model)


# ----------------------------------------------------------------------------------- the table

class Objective:
    """What a method minimises in one learning step. The training loop knows methods by this alone:

        l, terms = objective.loss(student, images, labels)
        l.backward()
        terms |= objective.after_backward(student)
    """

    def __init__(self, method, teacher, lam, importance=None):
        self.terms, self.of_labelled = partial(method.terms, lam=lam), method.of_labelled
        self.lam = lam
        self.teacher = teacher if method.uses_teacher else None
        self.importance = importance

    def loss(self, student, images, labels):
        """The scalar l and its named terms, detached; images (B, 3, H, W), labels (B, H, W)."""
        with torch.inference_mode():
            teacher_logits = None if self.teacher is None else self.teacher(images)
        return in_bands(self.terms, student(images), teacher_logits, labels, self.of_labelled)

    def after_backward(self, student):
        """More named terms, whose gradients are added to those of the loss, which are there."""
        if self.importance is None:
            return {}
        self.importance.update(student)
        if not self.importance.omega:                       # step 0
            return {}
        penalty = self.lam * self.importance.penalty(student)
        penalty.backward()
        return {"penalty": penalty.detach()}

    def state_dict(self):
        """What an interrupted step, and the next one, need of this one."""
        return self.importance and self.importance.state_dict()

    def load_state_dict(self, state):
        if self.importance is not None:
            self.importance.load_state_dict(state)


class FeatureObjective(Objective):
    """Adds lam * mean squared difference of the bodies' features to the terms: ILT's."""

    def loss(self, student, images, labels):
        if self.teacher is None:
            return super().loss(student, images, labels)
        logits, features = student(images, features=True)
        with torch.no_grad():                   # not inference mode: a gradient depends on them
            teacher_logits, teacher_features = self.teacher(images, features=True)
        l, terms = in_bands(self.terms, logits, teacher_logits, labels, self.of_labelled)
        distance = self.lam * F.mse_loss(features.float(), teacher_features.float())
        return l + distance, {**terms, "features": distance.detach()}


class Method(NamedTuple):
    """A row of the paper's tables: what train.py needs to run it."""
    terms: Callable             # (logits, teacher_logits, labels, lam) -> named terms, see above
    lam: float                  # weight against forgetting, as in MiB's code or the paper
    init: str = "random"        # of new classifiers, or "background"
    fakes: bool = False         # half of each mini-batch is fake
    joint: bool = False         # all classes in one step
    uses_teacher: bool = True   # the terms look at the teacher's logits
    of_labelled: tuple = ()     # names of terms that are means over pixels that are not 255 alone
    importance: type = None     # EWC, PI, RW: adds lam * penalty
    objective: type = Objective
    own_step0: bool = False     # cannot build upon another method's steps

    def objective_of(self, student, teacher, lam, state=None):
        """The Objective of a step.

        student, teacher: the new network and the old one (None at step 0)
        lam:              its weight
        state:            the state_dict() of the step before (None at step 0)
        """
        importance = self.importance and self.importance(student, teacher, state)
        return self.objective(self, teacher, lam, importance)


METHODS = {                     # weights: MiB's argparser and README; HRHF: Sec. 4.2
    "ft": Method(ft_loss, 0.0, uses_teacher=False),
    "lwf": Method(lwf_loss, 100.0),
    "lwf-mc": Method(lwf_mc_loss, 10.0, own_step0=True),
    "ilt": Method(lambda s, t, y, lam: lwf_loss(s, t, y, 100.0), 100.0, objective=FeatureObjective),
    # PLOP's copy has 100 for EWC and PI
    "ewc": Method(ft_loss, 500.0, uses_teacher=False, importance=EWC, own_step0=True),
    "pi": Method(ft_loss, 500.0, uses_teacher=False, importance=PI, own_step0=True),
    "rw": Method(ft_loss, 100.0, uses_teacher=False, importance=RW, own_step0=True),
    "mib": Method(mib_loss, 10.0, init="background"),
    "hrhf": Method(hrhf_loss, 1.0, init="background", fakes=True, of_labelled=("seg",)),
    "joint": Method(ft_loss, 0.0, uses_teacher=False, joint=True),
}
