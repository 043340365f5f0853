"""
pytest            # every formula against an independent oracle, then the whole command line

No downloads. Sizes are tiny; the code under test is the code that runs at full size. Tests marked
`cuda` are skipped where there is no GPU; all others run on the CPU, wherever they run.
"""
import base64
import contextlib
import copy
import errno
import gc
import hashlib
import html
import inspect
import io
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import weakref
import xml.etree.ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import bench
import convert
import data
import distill
import eval as evaluation
import fakes
import fast
import methods
import model
import photographs
import pictures
import protocol
import report
import reproduce
import run as run_module
import seginversion
import tables
import train
from run import InputError, Run, World
from saa import scale_aware_aggregation

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS))))
torch.cuda.is_available = lambda: False
os.environ["CUDA_VISIBLE_DEVICES"] = ""                     # for the processes that tests start
bench.DEVICE = "cpu"
HERE = Path(__file__).parent
# real data, where a checkout has it beside it
SHARED = HERE.parent / "shared"
real_data = pytest.mark.skipif(not SHARED.is_dir(),
                               reason="no folder of real data beside the project")
@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def logits(*shape, scale=3.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


# ---------------------------------------------------------------------- what the tests share

def tiny(classes=(3, 1), seed=0):
    torch.manual_seed(seed)
    return model.DeepLabV3("tiny", list(classes))


def make_folder(root, train=6, val=4):
    """A data set in VOC's layout: one coloured rectangle of a class an image, in turn."""
    random = np.random.RandomState(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("background\ncat\ndog\ncow\n")
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}{i}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n\n")
        for i, name in enumerate(names):
            image = random.randint(0, 255, (40, 36, 3), np.uint8)
            mask, c = np.zeros((40, 36), np.uint8), 1 + i % 3
            mask[8:24, 8:30] = c
            mask[7, 8:30] = 255
            image[mask == c] = np.array(data.palette()[c])
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg")
            Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
    return root


COMMON = ("--dataset folder --task 1-1 --backbone tiny --pretrained none --crop 32 --batch-size 4 "
          "--fake-steps 2 --num-fakes 8 --fake-batch 4 --workers 0")
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, three steps of one class with fakes, and its data."""
    root = tmp_path_factory.mktemp("run")
    make_folder(root / "data", train=24, val=8)
    train.main(f"{COMMON} --data-root {root}/data --epochs 2 --out {root}/run".split())
    return root


def run_script(*command, **environment):
    """A script in its own process, as a user starts it. Returns (exit code, stdout, stderr)."""
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout, done.stderr


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
def train_on(finished, out, flags):
    """train.py with COMMON and more flags, on the data of `finished`."""
    train.main(f"{COMMON} --data-root {finished}/data {flags} --out {out}".split())


def same_weights(a, b):
    x, y = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    return all(torch.equal(x[k], y[k]) for k in x) and x.keys() == y.keys()


def stop_at(monkeypatch, calls_at, *functions):
    """Interrupts (module, name) functions, and ("METHODS", row)'s terms, at their k-th call of all:
    calls_at holds (name, k)."""
    def wrapped(name, real):
        calls = []
        def stopping(*args, **kwargs):
            calls.append(1)
            if (name, len(calls)) in calls_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return stopping
    for module, name in functions:
        if module == "METHODS":
            row = methods.METHODS[name]
            monkeypatch.setitem(methods.METHODS, name, row._replace(terms=wrapped(name, row.terms)))
        else:
            monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))


def spy(monkeypatch, module, name, keep=lambda *_, **__: None):
    """The list of what keep() has of the arguments of a function, call by call, from now on."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name,
                        lambda *a, **k: (calls.append(keep(*a, **k)), real(*a, **k))[1])
    return calls


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def make_fakes(folder, **options):
    return fakes.synthesize(tiny((4,)), folder, 10,
                            **{**dict(sizes=[32], batch_size=4, seed=5, steps=2), **options})


def one_hot(*classes, C=4):
    return F.one_hot(torch.tensor(classes), C).bool()


# ------------------------------------------------------------------------------------ saa.py, Eq. 1

def test_saa_is_equation_1_in_a_naive_loop_value_and_gradient():
    s, r = logits(2, 3, 4, 5), torch.tensor([[0.5, 1e-5, 5], [10, 20, 0.1]])
    naive = torch.stack([torch.stack([
        sum(torch.exp(r[b, k] * s[b, k, i, j]) for i in range(4)
            for j in range(5)).div(20).log() / r[b, k]
        for k in range(3)]) for b in range(2)])
    y = scale_aware_aggregation(s, r)
    assert y.shape == (2, 3)
    torch.testing.assert_close(y, naive)
    weights = torch.randn(2, 3, dtype=torch.float64)
    mine, = torch.autograd.grad((y * weights).sum(), s)
    theirs, = torch.autograd.grad((naive * weights).sum(), s)
    torch.testing.assert_close(mine, theirs)


def test_saa_of_two_pixels_computed_by_hand():
    s = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)
    assert scale_aware_aggregation(s, 1).item() == pytest.approx(math.log((1 + 3) / 2))
    assert scale_aware_aggregation(s, 2).item() == pytest.approx(math.log((1 + 9) / 2) / 2)


def test_saa_of_one_high_pixel_of_many_in_float32_is_its_score_less_log_hw_over_r():
    s = torch.zeros(1, 1, 256, 256)
    s[..., 7, 9] = 5
    expected = 5 - math.log(256 * 256) / 20
    assert scale_aware_aggregation(s, 20).item() == pytest.approx(expected, abs=1e-6)


def test_saa_at_r_0_is_the_mean_and_at_inf_the_maximum_also_mixed_in_one_tensor():
    s = logits(2, 3, 4, 5)
    torch.testing.assert_close(scale_aware_aggregation(s, 0), s.mean((2, 3)))
    torch.testing.assert_close(scale_aware_aggregation(s, math.inf), s.amax((2, 3)))
    mixed = scale_aware_aggregation(s, torch.tensor([[0.0, math.inf, 5.0]]))
    torch.testing.assert_close(mixed[:, 0], s[:, 0].mean((1, 2)))
    torch.testing.assert_close(mixed[:, 1], s[:, 1].amax((1, 2)))
    torch.testing.assert_close(mixed[:, 2:], scale_aware_aggregation(s[:, 2:], 5))
    gradient, = torch.autograd.grad(mixed.sum(), s)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("r", [5e-324, 1e-310, 1e-300, 1e-20, 1e-12, 1e-8, 1e-7])
def test_saa_tends_to_the_mean_for_small_r_value_and_gradient(r):
    s = (torch.randn(2, 3, 32, 32) * 10 + 5).requires_grad_()
    y = scale_aware_aggregation(s, r)
    torch.testing.assert_close(y, s.mean((2, 3)), atol=3e-5, rtol=0)
    y.sum().backward()
    torch.testing.assert_close(s.grad, torch.full_like(s, 1 / 1024))


def test_saa_at_a_huge_r_is_the_maximum():
    s = (torch.randn(1, 2, 8, 8) * 100).requires_grad_()
    y = scale_aware_aggregation(s, 1e308)
    torch.testing.assert_close(y, s.amax((2, 3)))
    y.sum().backward()
    torch.testing.assert_close(s.grad, (s == s.amax((2, 3), keepdim=True)).float())


@pytest.mark.parametrize("r", [-1, -math.inf, math.nan, torch.tensor([[1.0, -0.1]])])
def test_saa_refuses_a_negative_r(r):
    with pytest.raises(ValueError, match="r must be >= 0"):
        scale_aware_aggregation(torch.zeros(1, 2, 3, 3), r)


# --------------------------------------------------------------------------- seginversion.py, Eq. 2

def test_total_variation_is_the_rms_difference_in_four_directions_value_and_gradient():
    x = logits(2, 3, 5, 4)
    naive = 0
    for dy, dx in ((1, 0), (0, 1), (1, 1), (1, -1)):        # one root over the batch of two
        differences = [(image[:, i + dy, j + dx] - image[:, i, j]).square() for image in x
                       for i in range(5) for j in range(4)
                       if 0 <= i + dy < 5 and 0 <= j + dx < 4]
        naive = naive + torch.stack(differences).mean().sqrt()
    tv = seginversion.total_variation(x)
    torch.testing.assert_close(tv, naive)
    mine, = torch.autograd.grad(tv, x, retain_graph=True)
    theirs, = torch.autograd.grad(naive, x)
    torch.testing.assert_close(mine, theirs)


def test_the_image_priors_of_flat_and_black_images_are_zero_with_a_zero_gradient():
    for prior, value in ((seginversion.total_variation, 1.0), (seginversion.rms, 0.0)):
        x = torch.full((2, 3, 6, 6), value, requires_grad=True)
        loss = prior(x)
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all()
    assert seginversion.rms(torch.full((2, 3, 4, 4), -2.0)).item() == pytest.approx(2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_matching_is_the_weighted_mean_of_the_distances_of_all_layers(memory_format):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1),
                        nn.BatchNorm2d(5)).eval().double()
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    x = logits(3, 3, 6, 7)
    direction = torch.randn(3, 5, 4, 5, dtype=torch.float64)
    with seginversion.BatchNormMatching(net.to(memory_format=memory_format).requires_grad_(False),
                                        first=10) as matching:
        output, statistics = matching(x)
        loss = matching.loss(statistics)
    mixed, = torch.autograd.grad(3 * loss + (direction * output).sum(), x, retain_graph=True)
    torch.testing.assert_close(output, net(x))
    distances, h = [], x
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            flat = h.transpose(0, 1).flatten(1)
            mean = flat.sum(1) / flat.shape[1]
            var = (flat - mean[:, None]).square().sum(1) / flat.shape[1]
            distances.append((mean - layer.running_mean).square().sum().sqrt()
                             + (var - layer.running_var).square().sum().sqrt())
        h = layer(h)
    naive = (10 * distances[0] + distances[1]) / 11
    torch.testing.assert_close(loss, naive)
    mine, = torch.autograd.grad(loss, x, retain_graph=True)
    theirs, = torch.autograd.grad(naive, x, retain_graph=True)
    torch.testing.assert_close(mine, theirs)
    theirs, = torch.autograd.grad(3 * naive + (direction * net(x)).sum(), x)
    torch.testing.assert_close(mixed, theirs)
    assert type(net[1]) is type(net[4]) is nn.BatchNorm2d and not hasattr(net[1], "scale")


def test_batch_norm_matching_is_zero_at_equal_statistics_and_an_error_leaves_no_trace():
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    # sums without rounding
    x = torch.randint(4, (4, 3, 8, 8)).float().requires_grad_()
    x.data[:2] = 3 - x.data[2:]                             # mean 1.5
    net[0].running_mean.fill_(1.5)
    net[0].running_var.copy_((x.detach() - 1.5).square().mean((0, 2, 3)))
    with seginversion.BatchNormMatching(net) as matching:
        loss = matching.loss(matching(x)[1])
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()
    with pytest.raises(RuntimeError), seginversion.BatchNormMatching(net):
        raise RuntimeError
    with pytest.raises(TypeError), seginversion.BatchNormMatching(
            nn.Sequential(net[0], nn.BatchNorm2d(3, affine=False))):
        pass
    assert type(net[0]) is nn.BatchNorm2d and vars(net[0]).keys() == vars(nn.BatchNorm2d(3)).keys()


def test_statistics_in_parts_are_those_of_all_images_value_and_gradient():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1),
                        nn.BatchNorm2d(5)).eval().double().requires_grad_(False)
    net[4].running_mean.normal_()
    x = logits(5, 3, 6, 7)
    with seginversion.BatchNormMatching(net) as matching:
        whole = matching.loss(matching(x)[1])
    gradient, = torch.autograd.grad(whole, x)
    parts = [part.detach().requires_grad_() for part in x.split([2, 2, 1])]
    others = {7: seginversion.statistics_of(net, x.detach()[2:].split(2), (6, 7))}
    with seginversion.BatchNormMatching(net) as matching:
        for k in (0, 1, 2, 1, 0):                           # in any order, once all were seen
            loss = matching.loss(matching(parts[k])[1], k, len(parts[k]))
            if k < 2 and len(matching.parts) == 3:
                mine, = torch.autograd.grad(loss, parts[k])
                torch.testing.assert_close(loss, whole)
                torch.testing.assert_close(mine, 5 / 2 * gradient.split([2, 2, 1])[k])
        matching.parts = {"others": others[7]}
        torch.testing.assert_close(matching.loss(matching(parts[0])[1], 0, 2), whole)
    assert vars(net[1]).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_invert_in_parts_is_invert_of_all_where_nothing_but_the_statistics_joins_them(monkeypatch):
    monkeypatch.setattr(seginversion, "random_view", lambda x, generator: x)
    net, r = tiny((4,)), torch.tensor([[0.5, 1, 5, 10]] * 2 + [[20, 0, math.inf, 1]] * 2)
    make = lambda part, **weights: seginversion.invert(
        net, one_hot(1, 2, 3, 1), r, sizes=[32], steps=3, part=part, **weights)
    with torch.no_grad():
        net.classifiers[0].weight.mul_(200)                 # gradients far above Adam's epsilon
    priors = dict(tv=0, l2=0, bn=0)
    torch.testing.assert_close(make(2, **priors), make(None, **priors), atol=0.01, rtol=0)
    others = {32: seginversion.statistics_of(net, [torch.randn(9, 3, 32, 32)], 32)}
    assert not torch.equal(make(None, bn=1.0), make(None, bn=1.0, others=others))


def test_invert_captures_each_size_and_outlives_tensors_that_the_next_pass_writes_anew(monkeypatch):
    net, seen, graphs = tiny((4,)), [], []
    make = lambda steps: seginversion.invert(net, one_hot(1, 2, 3, 1, 2), 5.0, sizes=[16, 32],
                                             steps=steps, part=2)
    plain = make(40)

    def captured(network, x):                               # as a CUDA graph does
        seen.append(tuple(x.shape))
        last = []

        def replay(view):
            for tensor in last:
                tensor.fill_(math.nan)
            outputs = network(view)
            last[:] = [tensor.detach() for tensor in outputs]
            return outputs
        replay.itself = replay                              # only collected, as a graph is
        graphs.append(weakref.ref(replay))
        return replay
    monkeypatch.setattr(seginversion, "captured", captured)
    assert torch.equal(make(40), plain) and not any(graph() for graph in graphs)
    assert seen == [(2, 3, 16, 16), (1, 3, 16, 16), (2, 3, 32, 32), (1, 3, 32, 32)]
    make(38)                                                # 19 a size: a capture does not pay
    assert len(seen) == 4


def test_invert_enlarges_what_has_become_and_shares_its_steps_out_over_the_sizes(monkeypatch):
    assert seginversion.stages([8, 16, 32], 7) == [8, 8, 16, 16, 32, 32, 32]
    assert seginversion.stages([8, 16, 32], 2) == [16, 32]
    views, net = [], tiny((4,)).requires_grad_(False)
    monkeypatch.setattr(seginversion, "random_view",
                        lambda x, generator: (views.append(x.detach().clone()), x)[1])
    x = seginversion.invert(net, one_hot(1, 2), 5.0, sizes=[16, (24, 32), 64], steps=6)
    assert [tuple(v.shape[2:]) for v in views] == [(16, 16)] * 2 + [(24, 32)] * 2 + [(64, 64)] * 2
    assert x.shape == (2, 3, 64, 64)
    small = F.interpolate(views[1], (24, 32), mode="bilinear", align_corners=False)
    assert (views[2] - small).abs().mean() < 0.5 * (views[2] - views[2].flip(3)).abs().mean()


def test_invert_leaves_the_network_as_it_was():
    net = tiny((4,)).train()
    net.body[0].eval()
    next(net.parameters()).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = torch.get_rng_state()
    x = seginversion.invert(net, one_hot(1, 2), 5.0, sizes=[32], steps=3)
    assert torch.equal(torch.get_rng_state(), state)        # nor is the global random state touched
    with pytest.raises(ValueError, match="the network scores"):
        seginversion.invert(net, one_hot(1, 2, C=7), 5.0, sizes=[32], steps=3)
    assert ([m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()]) == flags
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert not any(isinstance(m, seginversion.MeasuredBatchNorm2d) for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert x.shape == (2, 3, 32, 32) and not x.requires_grad


def test_invert_raises_the_asked_class_and_stays_inside_the_range_of_images(monkeypatch):
    net, seen = tiny((4,)), []
    # an untrained network takes a shifted image for another
    monkeypatch.setattr(torch, "roll", lambda x, *_, **__: x)
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(8, 3, 32, 32))                  # statistics to match
        net.classifiers[0].weight.mul_(20)
    x = seginversion.invert(net, one_hot(1, 2, 3, 3), 1.0, sizes=[(32, 48)], steps=60, tv=0.1,
                            bn=0.1, on_step=lambda i, terms: seen.append(terms))
    assert x.shape == (4, 3, 32, 48) and len(seen) == 60
    assert list(seen[0]) == ["cls", "tv", "l2", "bn"]
    totals = [sum(terms.values()).item() for terms in seen]
    # over flips and shifts
    assert np.mean(totals[-20:]) < 0.7 * np.mean(totals[:5])
    net.eval()
    assert scale_aware_aggregation(net(x), 1.0).argmax(1).tolist() == [1, 2, 3, 3]
    mean, std = torch.tensor(data.MEAN).view(3, 1, 1), torch.tensor(data.STD).view(3, 1, 1)
    pixels = x * std + mean
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5


def test_invert_depends_on_its_seed_alone_and_takes_float_targets_and_a_matrix_of_r():
    net = tiny((4,))
    r = torch.tensor([[0.5, 1, 5, 10], [20, 0, math.inf, 1]])
    make = lambda seed, targets: seginversion.invert(net, targets, r, sizes=[32], steps=4,
                                                     seed=seed)
    x = make(0, one_hot(1, 2))
    torch.manual_seed(99)
    assert torch.equal(x, make(0, one_hot(1, 2)))
    assert torch.equal(x, make(0, 5.0 * one_hot(1, 2)))     # targets are normalised
    assert not torch.equal(x, make(1, one_hot(1, 2)))
    with pytest.raises(ValueError, match="at least one class"):
        make(0, torch.zeros(2, 4))


def test_classification_loss_is_softmax_cross_entropy_to_shared_targets():
    scores, targets = logits(3, 5), torch.tensor([[0, 1.0, 0, 0, 0], [0.5, 0, 0, 0.5, 0],
                                                  [0, 0, 1 / 3, 1 / 3, 1 / 3]]).double()
    torch.testing.assert_close(seginversion.classification_loss(scores, targets).mean(),
                               F.cross_entropy(scores, targets))


def test_invert_uses_adam_with_warm_up_and_cosine_on_shifted_and_flipped_views(
        monkeypatch):
    made, rates, views, net = [], [], [], tiny((4,))
    class Adam(torch.optim.Adam):
        def __init__(self, parameters, **options):
            made.append(options)
            super().__init__(parameters, **options)
        def step(self):
            # and no step: the views show the noise alone
            rates.append(self.param_groups[0]["lr"])
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    net.register_forward_pre_hook(lambda _, inputs: views.append(inputs[0].detach().clone()))
    seginversion.invert(net, one_hot(1), 1.0, sizes=[32], steps=40, spectrum=0)
    assert made == [{"lr": 0.25, "betas": (0.5, 0.9)}]
    assert rates[:5] == pytest.approx([0.25 / 4, 0.5 / 4, 0.75 / 4, 0.25, 0.25])
    assert rates[22] == pytest.approx(0.125) and rates[-1] < 0.002
    assert rates[4:] == sorted(rates[4:], reverse=True)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(data.MEAN).view(3, 1, 1), torch.tensor(data.STD).view(3, 1, 1)
    clamped = noise.clamp(-mean / std, (1 - mean) / std)
    found = set()
    for view in views[1:]:                                  # a sixth of 32: up to 5 pixels
        seen = [view, view.flip(3)]
        found |= {(flip, dy, dx) for flip in (0, 1) for dy in range(-6, 7) for dx in range(-6, 7)
                  if torch.allclose(seen[flip], clamped.roll((dy, dx), (2, 3)), atol=1e-5)}
    assert len(found) > 20 and {flip for flip, _, _ in found} == {0, 1}
    assert {abs(d) for _, *shift in found for d in shift} == set(range(6))
    shifts = spy(monkeypatch, torch, "roll", lambda x, shift, dims: map(abs, shift))
    seginversion.invert(net, one_hot(1), 1.0, sizes=[(8, 256)], steps=60)
    down, across = map(max, zip(*shifts))
    assert down == 1 and 25 < across <= 30                  # never more than 30


@pytest.mark.parametrize("spectrum", [0, 0.5, 1, 2])
def test_a_coloured_image_has_every_frequency_divided_by_a_power_of_it(spectrum):
    x = torch.randn(2, 3, 6, 9)
    amplitudes = np.fft.fft2(x.double().numpy())
    for i in range(6):
        for j in range(9):
            # cycles per pixel
            f = math.sqrt(min(i, 6 - i) ** 2 / 36 + min(j, 9 - j) ** 2 / 81)
            amplitudes[:, :, i, j] /= max(f, 1 / 9) ** spectrum
    torch.testing.assert_close(seginversion.coloured(x, spectrum),
                               torch.from_numpy(np.fft.ifft2(amplitudes).real).float())


def test_inversion_starts_from_coloured_noise_and_adam_sees_the_coloured_gradient(monkeypatch):
    seen, real, net = [], seginversion.coloured, tiny((4,))
    class Adam(torch.optim.Adam):
        def step(self):
            seen.append((self.param_groups[0]["params"][0].detach().clone(),
                         self.param_groups[0]["params"][0].grad.clone()))
            super().step()
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    calls = spy(monkeypatch, seginversion, "coloured", lambda x, spectrum: (x.clone(), spectrum))
    seginversion.invert(net, one_hot(1), 1.0, sizes=[32], steps=3, spectrum=1.0)
    assert len(calls) == 4 and {spectrum for _, spectrum in calls} == {1.0}
    noise = real(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 1.0)
    torch.testing.assert_close(seen[0][0], noise / noise.std())
    for (gradient, _), (_, given) in zip(calls[1:], seen):
        torch.testing.assert_close(given, real(gradient, 1.0))


def test_voc_and_ade_have_deepinversions_weights_and_plain_adam_folder_and_shapes_ours():
    # its norms are over the batch, its sum over 107 layers, the first 10 times
    N = 16 * 3 * 512 * 512
    defaults = {k: p.default for k,
                p in inspect.signature(seginversion.invert).parameters.items()}
    assert defaults["tv"] == pytest.approx(1e-4 * math.sqrt(N), rel=2e-3)
    assert defaults["bn"] == pytest.approx(0.01 * (107 + 9), rel=1e-3)
    # norm of each image
    assert defaults["l2"] == pytest.approx(1e-5 * math.sqrt(N / 16), rel=5e-3)
    of = lambda name: train.parse(["--dataset", name, "--task", "4-1"])
    for name in ("voc", "ade"):
        args = of(name)
        assert (args.fake_batch, args.crop, args.fake_steps, args.fake_lr) == (16, 512, 1000, 0.25)
        assert train.inversion(args) == {"sizes": [512], **{
            k: defaults[k] for k in ("steps", "lr", "tv", "bn", "spectrum")}}
        assert args.spectrum == 0
    assert (of("folder").spectrum, of("folder").tv, of("folder").bn) == (1, 0.3, 10)
    assert (of("shapes").spectrum, of("shapes").tv, of("shapes").bn) == (1, 2, 3)


# --------------------------------------------------------------------------- distill.py, Eq. 3 to 5

def test_probability_rearrange_adds_the_new_classes_to_the_background():
    s = logits(2, 7, 3, 3)
    q, log_q = s.softmax(1), distill.probability_rearrange(s, 4)
    expected = torch.cat([q[:, :1] + q[:, 4:].sum(1, keepdim=True), q[:, 1:4]], 1)
    torch.testing.assert_close(log_q.exp(), expected)
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(2, 3, 3, dtype=torch.float64))
    weights = torch.randn_like(expected)
    mine, = torch.autograd.grad((log_q * weights).sum(), s)
    theirs, = torch.autograd.grad((expected.log() * weights).sum(), s)
    torch.testing.assert_close(mine, theirs)


def test_probability_rearrange_without_new_classes_is_log_softmax_and_survives_saturation():
    s = logits(1, 4, 2, 2)
    torch.testing.assert_close(distill.probability_rearrange(s, 4), s.log_softmax(1))
    s = torch.tensor([1e4, -1e4, 0.0, -1e4]).view(1, 4, 1, 1).requires_grad_()
    log_q = distill.probability_rearrange(s, 2)
    assert log_q.isfinite().all()
    log_q.sum().backward()
    assert s.grad.isfinite().all()


def test_distillation_is_equation_3_in_a_naive_loop_value_and_gradient():
    student, teacher = logits(2, 5, 3, 4), logits(2, 3, 3, 4)
    q, p, total = student.softmax(1), teacher.softmax(1), 0
    for b in range(2):
        for i in range(3):
            for j in range(4):
                total = total - p[b, 0, i, j] * (q[b, 0, i, j] + q[b, 3, i, j]
                                                 + q[b, 4, i, j]).log()
                total = total - sum(p[b, c, i, j] * q[b, c, i, j].log() for c in (1, 2))
    loss = distill.distillation_loss(student, teacher)
    # sum over classes, mean over 2 x 3 x 4 pixels
    torch.testing.assert_close(loss, total / 24)
    mine, = torch.autograd.grad(loss, student, retain_graph=True)
    theirs, = torch.autograd.grad(total / 24, student)
    torch.testing.assert_close(mine, theirs)


def test_distillation_of_one_pixel_computed_by_hand():
    teacher = torch.tensor([0.50, 0.50]).log().view(1, 2, 1, 1)
    student = torch.tensor([0.20, 0.25, 0.55]).log().view(1, 3, 1, 1)      # background becomes 0.75
    expected = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    assert distill.distillation_loss(student, teacher).item() == pytest.approx(expected)


def test_label_merge_takes_new_labels_and_else_the_teacher_pixel_by_pixel():
    # saturated where the label is new: p = 1 does not win
    teacher = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 1e4, 0],
                            [0, 0, 5]]).T.reshape(1, 3, 1, 5)
    # an old id has no say either
    labels = torch.tensor([[[0, 0, 1, 3, 255]]], dtype=torch.uint8)
    merged = distill.label_merge(teacher, labels)
    assert merged.tolist() == [[[0, 1, 2, 3, 255]]] and merged.dtype == torch.int64


def test_segmentation_loss_is_equation_4_and_leaves_void_out():
    s = logits(2, 5, 3, 4)
    labels = torch.randint(5, (2, 3, 4))
    torch.testing.assert_close(distill.segmentation_loss(s, labels), F.cross_entropy(s, labels))
    labels[0, 0] = 255
    loss = distill.segmentation_loss(s, labels.to(torch.uint8))
    picked = [-s.log_softmax(1)[b, labels[b, i, j], i, j] for b in range(2) for i in range(3)
              for j in range(4)
              if labels[b, i, j] != 255]
    assert len(picked) == 20
    torch.testing.assert_close(loss, sum(picked) / 20)
    gradient, = torch.autograd.grad(loss, s)
    assert (gradient[0, :, 0] == 0).all() and (gradient[0, :, 1] != 0).all()
    assert distill.segmentation_loss(s, torch.full_like(labels, 255)) == 0


def test_hrhf_loss_is_equation_5():
    student, teacher = logits(2, 4, 3, 3), logits(2, 3, 3, 3)
    labels = torch.randint(2, (2, 3, 3)) * 3
    terms = distill.hrhf_loss(student, teacher, labels, lam=2.5)
    merged = torch.where(labels == 3, 3, teacher.argmax(1))
    assert list(terms) == ["kd", "seg"]
    torch.testing.assert_close(terms["kd"], 2.5 * distill.distillation_loss(student, teacher))
    torch.testing.assert_close(terms["seg"], F.cross_entropy(student, merged))
    sum(terms.values()).backward()
    assert teacher.grad is None and student.grad is not None


# --------------------------------------------------------------------------------------- methods.py

def test_an_objective_upsamples_to_the_labels_and_is_plain_cross_entropy_at_step_0():
    student, teacher = nn.Conv2d(3, 4, 1, stride=4), nn.Conv2d(3, 3, 1, stride=4)
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(4, (2, 16, 16), dtype=torch.uint8)
    up = lambda s: F.interpolate(s, (16, 16), mode="bilinear", align_corners=False)
    loss, terms = methods.METHODS["hrhf"].objective_of(student, None,
                                                       1.0).loss(student, images, labels)
    torch.testing.assert_close(terms, {"seg": F.cross_entropy(up(student(images)), labels.long())})
    assert loss == terms["seg"]
    plain = distill.hrhf_loss(up(student(images)), up(teacher(images)), labels, 3.0)
    expected = torch.autograd.grad(sum(plain.values()), student.parameters())
    loss, terms = methods.METHODS["hrhf"].objective_of(student, teacher,
                                                       3.0).loss(student, images, labels)
    torch.testing.assert_close(terms, plain)
    torch.testing.assert_close(loss, sum(plain.values()))
    # the teacher's inference mode does not get in the way
    loss.backward()
    torch.testing.assert_close([p.grad for p in student.parameters()], list(expected))
    assert teacher.weight.grad is None


def naive_losses(s, t, labels):
    """Every baseline's loss in plain loops over pixels. s, t: (B, C, H, W) float64."""
    B, C_t, H, W = s.shape
    C_old, sums = t.shape[1], dict.fromkeys(("ce", "kd", "uce", "ukd", "bce", "bkd"), 0)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                v, w, y = s[b, :, i, j], t[b, :, i, j], int(labels[b, i, j])
                q, p = v.exp() / v.exp().sum(), w.exp() / w.exp().sum()
                cut = v[:C_old].exp() / v[:C_old].exp().sum()
                folded = torch.cat([q[:1] + q[C_old:].sum(), q[1:C_old]])
                sums["kd"] = sums["kd"] - (p * cut.log()).sum() / C_old
                sums["ukd"] = sums["ukd"] - (p * folded.log()).sum() / C_old
                g, h = 1 / (1 + (-v).exp()), 1 / (1 + (-w).exp())
                sums["bkd"] = sums["bkd"] - (h * g[:C_old].log()
                                             + (1 - h) * (1 - g[:C_old]).log()).sum()
                if y != 255:
                    sums["ce"] = sums["ce"] - q[y].log()
                    sums["uce"] = sums["uce"] - (q[:C_old].sum() if y < C_old else q[y]).log()
                    hot = torch.arange(C_t) == y
                    sums["bce"] = sums["bce"] - torch.where(hot, g, 1 - g).log().sum()
    return {name: torch.as_tensor(value, dtype=torch.float64) / (B * H * W) for name,
            value in sums.items()}


@pytest.mark.parametrize("C_old, C_new", [(16, 1), (16, 5), (101, 10), (3, 2)])
@pytest.mark.parametrize("labelling", ["mixed", "with void", "all void", "no new class"])
def test_the_baselines_losses_are_their_formulas_in_a_naive_loop_value_and_gradient(
        C_old, C_new, labelling):
    s, t = logits(2, C_old + C_new, 3, 2), logits(2, C_old, 3, 2)
    labels = torch.zeros(2, 3, 2, dtype=torch.uint8)
    labels[0, 0, 0] = 1                                     # an old id
    if labelling != "no new class":
        labels[:, 1:] = torch.randint(C_old, C_old + C_new, (2, 2, 2))
    if labelling == "with void":
        labels[0, 2] = 255
    elif labelling == "all void":
        labels[:] = 255
    naive = naive_losses(s, t.detach(), labels)
    mc = methods.lwf_mc_loss(s, t, labels, 1.0)
    mine = {"ce": methods.cross_entropy(s, labels), "kd": methods.knowledge_distillation(s, t),
            "uce": methods.unbiased_cross_entropy(s, labels, C_old),
            "ukd": methods.unbiased_distillation(s, t),
            "bce": mc["bce"], "bkd": mc["kd"]}
    for name, loss in mine.items():
        torch.testing.assert_close(loss, naive[name], msg=lambda m: f"{name}: {m}")
        if loss.detach() == 0:
            continue
        torch.testing.assert_close(torch.autograd.grad(loss, s, retain_graph=True)[0],
                                   torch.autograd.grad(naive[name], s, retain_graph=True)[0])
    assert t.grad is None and not any(torch.autograd.grad(sum(mine.values()), t, allow_unused=True))


class TwoHeads(nn.Module):
    """A network whose logits and features are one 1x1 convolution each."""

    def __init__(self, C):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, C, 1)

    def forward(self, x, features=False):
        body = self.body(x)
        return (self.head(body), body) if features else self.head(body)


def state_of(method, model):
    return method.objective_of(model, None, method.lam).state_dict()


def test_every_method_weighs_its_terms_as_published():
    student, teacher = TwoHeads(5), TwoHeads(3)
    x, labels = torch.randn(2, 3, 4, 4), torch.randint(3, 5, (2, 4, 4), dtype=torch.uint8)
    s, f = student(x, features=True)
    t, g = (v.detach() for v in teacher(x, features=True))
    ce = F.cross_entropy(s, labels.long())
    kd = -(t.softmax(1) * s[:, :3].log_softmax(1)).sum(1).mean() / 3
    bce = F.binary_cross_entropy_with_logits(s, F.one_hot(labels.long(), 5).movedim(-1, 1).float(),
                                             reduction="sum") / 32
    bkd = F.binary_cross_entropy_with_logits(s[:, :3], t.sigmoid(), reduction="sum") / 32
    expected = {
        "ft": {"ce": ce}, "ewc": {"ce": ce}, "pi": {"ce": ce}, "rw": {"ce": ce},
        "joint": {"ce": ce},
        "lwf": {"ce": ce, "kd": 100 * kd},
        "lwf-mc": {"bce": bce, "kd": 10 * bkd},
        "ilt": {"ce": ce, "kd": 100 * kd, "features": 100 * (f - g).square().mean()},
        "mib": {"ce": methods.unbiased_cross_entropy(s, labels, 3),
                "kd": 10 * distill.distillation_loss(s, t) / 3},
        "hrhf": distill.hrhf_loss(s, t, labels, 1.0),
    }
    assert expected.keys() == methods.METHODS.keys()
    for name, terms in expected.items():
        method = methods.METHODS[name]
        objective = method.objective_of(student, teacher, method.lam, state_of(method, teacher))
        loss, seen = objective.loss(student, x, labels)
        torch.testing.assert_close(seen, {k: term.detach() for k, term in terms.items()},
                                   msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(torch.autograd.grad(loss, student.parameters(),
                                                       allow_unused=True),
                                   torch.autograd.grad(sum(terms.values()), student.parameters(),
                                                       retain_graph=True))
        # step 0: the task's loss alone
        loss, first = method.objective_of(student, None, method.lam).loss(student, x, labels)
        assert loss == sum(first.values())
        torch.testing.assert_close(first, {"hrhf": {"seg": ce},
                                           "lwf-mc": {"bce": bce}}.get(name, {"ce": ce}))
    assert all(p.grad is None for p in teacher.parameters())
    weights = {name: (m.lam, m.init, m.importance, m.fakes, m.joint) for name,
               m in methods.METHODS.items()}
    assert weights["ewc"] == (500, "random", methods.EWC, False, False)
    assert weights["pi"] == (500, "random", methods.PI, False, False)
    assert weights["rw"] == (100, "random", methods.RW, False, False)
    assert weights["mib"][1] == weights["hrhf"][1] == "background" and weights["hrhf"][3]
    assert weights["joint"][4]


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_the_teacher_runs_once_without_gradients_and_only_for_the_methods_that_need_it(name):
    student, teacher, seen = TwoHeads(5), TwoHeads(3), []
    teacher.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(),
                                                          torch.is_inference_mode_enabled())))
    method = methods.METHODS[name]
    objective = method.objective_of(student, teacher, method.lam,
                                        state_of(method, teacher))
    objective.loss(student, torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))
    assert seen == {"ilt": [(False, False)],
                    **dict.fromkeys(("lwf", "lwf-mc", "mib", "hrhf"),
                                    [(False, True)])}.get(name, [])


def walk(model, importance, iterations):
    """Update `importance` over random gradients and moves: (parameters, gradients) before each."""
    history = []
    for _ in range(iterations):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        importance.update(model)
        history.append([(p.detach().clone(), p.grad.clone()) for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad + 0.05
    return history


def min_max(v):
    return (v - v.min()) / (v.max() - v.min() + 1e-8)


@pytest.mark.parametrize("rule", ["EWC", "PI", "RW"])
def test_the_importances_are_their_published_recursions_over_three_steps_value_and_gradient(rule):
    Rule = getattr(methods, rule)
    model = nn.Linear(3, 2).double()
    names = [name for name, _ in model.named_parameters()]
    first = Rule(model)
    assert not first.omega
    starts, fishers, scores = [], [torch.ones_like(p) for p in model.parameters()], [0, 0]
    objects = [first]
    for step in range(3):
        importance = objects[-1]
        starts = [p.detach().clone() for p in model.parameters()]
        history = walk(model, importance, 23)
        state = copy.deepcopy(importance.state_dict())
        objects.append(Rule(model, model, state))
        for k, name in enumerate(names):
            theta, g = zip(*[h[k] for h in history])
            end, delta, raw, F_ = dict(model.named_parameters())[name].detach(), 0, 0, fishers[k]
            for i in range(23):
                if i > 0:
                    delta = delta + g[i] * (theta[i - 1] - theta[i])
                if i in (10, 20):
                    d = theta[i - 10] - theta[i]
                    raw = raw + g[i] * d / (0.5 * F_ * d ** 2 + 1e-8)
                F_ = 0.9 * g[i] ** 2 + 0.1 * F_
            fishers[k] = F_
            if rule == "EWC":
                omega = min_max(F_)
            elif rule == "PI":
                scores[k] = scores[k] + (delta / ((end - starts[k]) ** 2 + 1e-20)).clamp(min=0)
                omega = min_max(scores[k])
            else:
                # normalising hides its scale
                torch.testing.assert_close(state["raw"][name], raw)
                new = raw.clamp(min=0)
                scores[k] = new if step == 0 else 0.5 * (new + scores[k])
                omega = min_max(F_) + min_max(scores[k])
            torch.testing.assert_close(objects[-1].omega[name], omega,
                                       msg=lambda m: f"step {step} {name}: {m}")
    last = objects[-1]
    assert last.penalty(model).item() == 0
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    penalty = last.penalty(model)
    torch.testing.assert_close(penalty, sum((last.omega[n] * (p.detach() - old[n]) ** 2).sum()
                                            for n, p in model.named_parameters()))
    for name, p in model.named_parameters():
        gradient, = torch.autograd.grad(penalty, p, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * last.omega[name] * (p.detach() - old[name]))


@pytest.mark.parametrize("rule", ["EWC", "PI", "RW"])
def test_an_importance_goes_on_from_its_state_and_lets_new_classifiers_free(rule):
    Rule = getattr(methods, rule)
    teacher = tiny((3,))
    teacher_state = Rule(teacher).state_dict()
    student = copy.deepcopy(teacher)
    student.add_classes(2, "random")
    whole, parts = (Rule(student, teacher, teacher_state) for _ in range(2))
    assert whole.omega.keys() == dict(teacher.named_parameters()).keys()
    twin = copy.deepcopy(student)
    torch.manual_seed(1)
    walk(student, whole, 14)
    torch.manual_seed(1)
    walk(twin, parts, 7)
    resumed = Rule(twin, teacher, teacher_state)
    resumed.load_state_dict(copy.deepcopy(parts.state_dict()))
    walk(twin, resumed, 7)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_an_overflow_of_float16_gathers_no_importance():
    net = nn.Linear(2, 1)
    rule = methods.EWC(net)
    for p, value in zip(net.parameters(), (math.inf, math.nan)):
        p.grad = torch.full_like(p, value)
    rule.update(net)                                        # F <- 0.9 * 0 + 0.1 * 1
    assert all((F == 0.1).all() for F in rule.fisher.values())


def test_train_py_knows_no_method_by_name():
    quoted = re.findall(r'"([\w-]+)"', (HERE / "train.py").read_text()
                        + (HERE / "run.py").read_text())
    assert set(quoted) & set(methods.METHODS) == {"hrhf"}   # the default of --method


# ------------------------------------------------------------------------------------------ fast.py

ROWS = {name: (methods.METHODS[name].terms, methods.METHODS[name].of_labelled)
        for name in ("hrhf", "ft", "lwf", "lwf-mc", "mib")}
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("elements, bands", [
    (6 * 11 * 5, [(1, 5), (1, 5), (1, 5), (1, 1)] * 5),     # rows of an image
    (1, [(1, 1)] * 80),
    (6 * 11 * 16 * 2 + 5, [(2, 16), (2, 16), (1, 16)]),     # whole images
    (10 ** 6, [(5, 16)])])
@pytest.mark.parametrize("first_step", [False, True])
def test_a_loss_in_bands_is_the_plain_loss_of_the_whole_batch_value_terms_and_gradient(
        row, elements, bands, first_step, monkeypatch):
    loss, of_labelled = ROWS[row]
    s, t = logits(5, 6, 4, 3), None if first_step else logits(5, 4, 4, 3)
    labels = torch.randint(4, 6, (5, 16, 11), dtype=torch.uint8)
    # bands with unequal shares of labelled pixels, some with none
    labels[0, :9] = labels[3] = 255
    labels[1, 4:] = 0
    monkeypatch.setitem(fast.ELEMENTS, "cpu", elements)
    seen = []
    def watched(logits, teacher_logits, labels, lam=3.0):
        seen.append((len(logits), logits.shape[2]))
        return loss(logits, teacher_logits, labels, lam)
    total, terms = fast.in_bands(watched, s, t, labels, of_labelled)
    assert seen == bands
    up = lambda x: x if x is None else F.interpolate(x, (16, 11), mode="bilinear")
    plain = loss(up(s), up(t), labels, 3.0)
    torch.testing.assert_close(terms, {name: term.detach() for name, term in plain.items()})
    torch.testing.assert_close(total, sum(plain.values()))
    mine, = torch.autograd.grad(7 * total, s)
    theirs, = torch.autograd.grad(7 * sum(plain.values()), s)
    torch.testing.assert_close(mine, theirs)
    assert not any(term.requires_grad for term in terms.values())
    with torch.no_grad():
        total, terms = fast.in_bands(watched, s, t, labels, of_labelled)
        assert not total.requires_grad and total == sum(terms.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS)
def test_autocast_costs_the_bands_gradient_nothing_however_small_a_pixels_weight(
        row, dtype, monkeypatch):
    loss, of_labelled = ROWS[row]
    s, t = logits(2, 6, 4, 4).detach().float().requires_grad_(), logits(2, 4, 4, 4).detach().float()
    labels = torch.randint(4, 6, (2, 64, 64), dtype=torch.uint8)
    scaled = lambda s, t, y: {name: 2.0 ** -18 * term for name, term in loss(s, t, y, 1.0).items()}
    monkeypatch.setitem(fast.ELEMENTS, "cpu", 6 * 64 * 10)
    with torch.autocast("cpu", dtype):
        total, _ = fast.in_bands(scaled, s, t, labels, of_labelled)
    mine, = torch.autograd.grad(total, s)
    theirs, = torch.autograd.grad(sum(scaled(model.upsample(s, labels), model.upsample(t, labels),
                                             labels).values()), s)
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_bands_of_a_batch_that_is_ignored_altogether_have_a_loss_of_0():
    s = logits(2, 3, 2, 2)
    total, _ = fast.in_bands(lambda s, t, y: {"seg": distill.segmentation_loss(s, y)}, s, None,
                               torch.full((2, 8, 8), 255, dtype=torch.uint8), ["seg"])
    total.backward()
    assert total == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("H, W, h, w",
                         [(16, 11, 4, 3), (512, 512, 32, 32), (7, 9, 7, 9), (5, 5, 8, 8)])
def test_rows_of_the_upsampled_logits_are_interpolates_rows(H, W, h, w):
    s = logits(2, 3, h, w).detach()
    whole = F.interpolate(s, (H, W), mode="bilinear")
    for rows in (slice(0, 1), slice(H // 3, H // 3 + 2), slice(H - 2, H + 9)):
        torch.testing.assert_close(fast.upsample_rows(s, rows, H, W), whole[:, :, rows])
        torch.testing.assert_close(fast.upsample_rows(s.bfloat16(), rows, H, W),
                                   F.interpolate(s.bfloat16().float(), (H, W),
                                                 mode="bilinear")[:, :, rows])


def test_a_float16_gradient_meets_the_scaler_before_it_can_underflow():
    s, t = logits(3, 5, 2, 2).detach().half().requires_grad_(), logits(3, 4, 2, 2).detach().half()
    labels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    tiny_loss = lambda s, t, labels: {"kd": 1e-7 * distill.distillation_loss(s, t)}
    total, _ = fast.in_bands(tiny_loss, s, t, labels)
    (2.0 ** 16 * total).backward()
    exact = s.detach().float().requires_grad_()
    (2.0 ** 16 * tiny_loss(model.upsample(exact, labels), model.upsample(t, labels),
                           labels)["kd"]).backward()
    assert s.grad.dtype == torch.float16
    torch.testing.assert_close(s.grad.float(), exact.grad, rtol=0.01, atol=1e-7)


# ----------------------------------------------------------------------------------------- model.py

@pytest.mark.parametrize("backbone, stride, norms", [
    ("resnet101", 16, 107), ("resnet50", 16, 56), ("resnet18", 16, 23), ("mobilenet_v2", 16, 54),
    ("tiny", 8, 7)])
def test_backbones_have_their_stride_channels_and_number_of_batch_norms(backbone, stride, norms):
    net = model.DeepLabV3(backbone, [16, 1, 2]).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 19, 64 // stride, 96 // stride)
    # MiB's ResNet-101: 107
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == norms
    assert net.classes_per_step == [16, 1, 2]


@pytest.mark.parametrize("backbone", ["resnet101", "resnet18", "mobilenet_v2"])
def test_every_3x3_convolution_after_stride_16_is_dilated_and_the_aspp_has_rates_6_12_18(backbone):
    net = model.DeepLabV3(backbone, [2])
    stage = net.body[-1] if backbone != "mobilenet_v2" else net.body[14:18]
    convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == {"resnet101": 3, "resnet18": 4, "mobilenet_v2": 4}[backbone]
    assert all(c.dilation == c.padding == (2, 2) and c.stride == (1, 1) for c in convs)
    assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
    assert backbone == "mobilenet_v2" or not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert [b.dilation[0] for b in net.head.branches] == [1, 6, 12, 18]
    assert net.head.out[0].num_features == 256
    # Xavier normal with the leaky ReLU's gain
    branch = net.head.branches[1].weight
    fans = (branch.shape[0] + branch.shape[1]) * 9
    gain = math.sqrt(2 / (1 + 0.01 ** 2))
    assert branch.std().item() == pytest.approx(gain * math.sqrt(2 / fans), rel=0.02)
    assert branch.abs().max() > 3 * branch.std()            # a uniform's ends at 1.7


def test_aspp_is_its_definition_written_out():
    aspp = model.ASPP(5, 4, (1, 2, 3)).eval()
    x = torch.randn(2, 5, 7, 9)
    lrelu = lambda t: F.leaky_relu(t, 0.01)
    (norm1, _), merge = aspp.merge[0], aspp.merge[1]
    reduce, (norm2, _), expand = aspp.pool
    branches = [F.conv2d(x, aspp.branches[0].weight)] + [
        F.conv2d(x, b.weight, padding=d, dilation=d) for b, d in zip(aspp.branches[1:], (1, 2, 3))]
    y = F.conv2d(lrelu(norm1(torch.cat(branches, 1))), merge.weight)
    pooled = F.conv2d(lrelu(norm2(F.conv2d(x.mean((2, 3), keepdim=True), reduce.weight))),
                      expand.weight)
    torch.testing.assert_close(aspp(x), lrelu(aspp.out[0](y + pooled)))


def test_aspp_pools_globally_in_training_and_over_32_cells_in_evaluation():
    aspp = model.ASPP(2, 2, (1, 2, 3))
    with torch.no_grad():
        for branch in aspp.branches:
            branch.weight.zero_()                           # leaves the pooled branch alone
        for conv in (aspp.pool[0], aspp.pool[2]):
            conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    x = torch.rand(2, 2, 40, 36) + torch.arange(40.0).view(40, 1)
    out = aspp.eval()(x)
    # (9, 5): padded by 31 rows and columns, 15 first
    windows = F.avg_pool2d(x, 32, 1)
    torch.testing.assert_close(out[:, :, 15:24, 15:20], windows / (1 + 1e-5), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[:, :, 0, 0], windows[:, :, 0, 0] / (1 + 1e-5), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[:, :, -1, -1], windows[:, :, -1, -1] / (1 + 1e-5), rtol=1e-4,
                               atol=0)
    flat = aspp.train()(x)
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))


def test_student_equal_to_teacher_with_background_init_gives_the_teachers_probabilities_back():
    teacher = tiny((16,)).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.classifiers[0].bias.normal_()
        teacher.classifiers[0].bias.copy_(student.classifiers[0].bias)
    student.add_classes(5, "background")
    x = torch.randn(2, 3, 32, 32)
    s, t = student(x), teacher(x).detach()
    assert s.shape[1] == 21
    torch.testing.assert_close(distill.probability_rearrange(s, 16).exp(), t.softmax(1))
    torch.testing.assert_close(s.softmax(1)[:, 16:],
                               (t.softmax(1)[:, :1] / 6).expand(-1, 5, -1, -1))
    gradients = torch.autograd.grad(distill.distillation_loss(s, t), list(student.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-6


def test_random_init_leaves_the_old_outputs_alone_and_an_unknown_init_is_refused():
    net = tiny((4,)).eval()
    x = torch.randn(1, 3, 32, 32)
    before = net(x)
    net.add_classes(2, init="random")
    torch.testing.assert_close(net(x)[:, :4], before)
    assert net.classes_per_step == [4, 2]
    with pytest.raises(InputError, match="zeros"):
        net.add_classes(1, init="zeros")


def mapillary_file(path, net, rename=()):
    """A file like Mapillary's: its names, DDP's prefix, signed norm weights, no head or counter."""
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        if match := re.match(r"layer(\d)\.(\d+)\.(.*)", key):
            layer, block, rest = match.groups()
            rest = rest.replace("downsample.0", "proj_conv").replace("downsample.1", "proj_bn") \
                if rest.startswith("downsample") else "convs." + rest
            name = f"mod{int(layer) + 1}.block{int(block) + 1}.{rest}"
        else:
            name = "mod1." + key
        state["module." + name] = value
    state["module.classifier.fc.weight"] = torch.zeros(1000, 512)
    for old, new in rename:
        state[new] = state.pop(old)
    torch.save({"state_dict": state}, path)


def test_a_mapillary_checkpoint_loads_with_its_prefix_stripped_and_absolute_norm_weights(tmp_path):
    net = torchvision.models.resnet50()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    mapillary_file(tmp_path / "iabn.pth.tar", net)
    loaded = model.DeepLabV3("resnet50", [2], str(tmp_path / "iabn.pth.tar")).body
    torch.testing.assert_close(loaded[0].weight, net.conv1.weight, rtol=0, atol=0)
    torch.testing.assert_close(loaded[1].weight, net.bn1.weight.abs() + 1e-5, rtol=0, atol=0)
    torch.testing.assert_close(loaded[1].bias, net.bn1.bias, rtol=0, atol=0)
    block = loaded[6][0]                                    # layer3.0
    torch.testing.assert_close(block.conv2.weight, net.layer3[0].conv2.weight, rtol=0, atol=0)
    torch.testing.assert_close(block.bn3.weight, net.layer3[0].bn3.weight.abs() + 1e-5)
    torch.testing.assert_close(block.downsample[0].weight, net.layer3[0].downsample[0].weight,
                               rtol=0, atol=0)
    torch.testing.assert_close(block.downsample[1].weight, net.layer3[0].downsample[1].weight.abs()
                               + 1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_a_torchvision_file_loads_bit_for_bit(tmp_path, backbone):
    net = torchvision.models.get_model(backbone)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    body = model.DeepLabV3(backbone, [2], str(tmp_path / "w.pth")).body
    theirs = [v for k, v in net.state_dict().items()
              if not k.startswith(("fc.", "classifier.", "features.18."))]
    for mine, his in zip(body.state_dict().values(), theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=0)


def test_an_incompatible_weights_file_names_the_first_missing_and_unexpected_key(tmp_path):
    path = tmp_path / "bad.pth.tar"
    mapillary_file(path, torchvision.models.resnet50(),
                   rename=[("module.mod1.conv1.weight", "module.mod1.conv9.weight")])
    with pytest.raises(InputError,
                       match="bad.pth.tar.*1 missing, first conv1.weight; "
                             "1 unexpected, first conv9.weight"):
        model.DeepLabV3("resnet50", [2], str(path))
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(InputError, match="missing, first .*; .* of another shape"):
        model.DeepLabV3("resnet50", [2], str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a PyTorch weights file"):
        model.DeepLabV3("resnet50", [2], str(path))
    with pytest.raises(InputError, match="no such file"):
        model.DeepLabV3("resnet50", [2], str(tmp_path / "absent.pth"))
    with pytest.raises(InputError, match="tiny"):
        model.DeepLabV3("tiny", [2], "imagenet")
    with pytest.raises(InputError, match="unknown backbone"):
        model.DeepLabV3("vgg", [2])


# what a checkpoint says of its run
ABOUT = {"crop": 32, "method": "hrhf", "objective": None, "seconds": {},
         "inversion": {"sizes": [32], "steps": 2, "lr": 1.0, "tv": 1e12, "bn": 0, "spectrum": 0}}


def test_a_checkpoint_comes_back_bit_for_bit_without_escape_codes_in_its_names(tmp_path):
    net = tiny((4, 2))
    net(torch.randn(4, 3, 32, 32))                          # moves the running statistics
    model.save_model(net, tmp_path / "c.pth", classes=["a"] * 5 + ["b\x1b[31m"], **ABOUT)
    back, about = model.load_model(tmp_path / "c.pth")
    assert about["classes"][-1] == "b[31m"
    assert back.classes_per_step == [4, 2] and about["crop"] == 32 and not back.training
    for mine, his in zip(back.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(mine, his)
    with pytest.raises(InputError, match="c.pth: its crop differs from this command's"):
        model.load_model(tmp_path / "c.pth", expected={"crop": 64})


def test_a_checkpoint_with_a_changed_byte_or_without_what_it_must_say_is_refused(tmp_path):
    net, path = tiny((4, 2)), tmp_path / "c.pth"
    refused = lambda: pytest.raises(InputError,
                                    match="c.pth: damaged, or no file of train.py; remove it")
    model.save_model(net, path, classes=["a"] * 6, **ABOUT)
    whole = path.read_bytes()
    positions = np.random.RandomState(0).randint(0, len(whole), 60)
    weights = net.state_dict()
    for position in positions:                              # silently wrong weights: never
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1:])
        try:
            back, _ = model.load_model(path)
        except InputError:
            continue
        assert all(torch.equal(v, weights[k]) for k, v in back.state_dict().items())
    i = len(whole) // 2                                     # amid the weights
    path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:])
    with refused():
        model.load_model(path)
    for damaged in (whole[:-100], b"PK", b""):
        path.write_bytes(damaged)
        with refused():
            model.load_model(path)
    for missing in ("classes", *ABOUT):
        about = {"classes": ["a"] * 6, **ABOUT}
        del about[missing]
        model.save_model(net, path, **about)
        with refused():
            model.load_model(path)
    odd = [{"classes": ["a"] * 7}, {"method": ["hrhf"]},        # not as many as outputs
           *({"inversion": {**ABOUT["inversion"], **wrong}} for wrong in (
               {"steps": 2.5}, {"seed": 1}, {"sizes": 32}, {"lr": math.nan}, {"tv": 2e12}))]
    for wrong in odd:
        model.save_model(net, path, **{"classes": ["a"] * 6, **ABOUT, **wrong})
        with refused():
            model.load_model(path)
    with torch.no_grad():
        net.classifiers[0].bias[0] = math.inf
    model.save_model(net, path, classes=["a"] * 6, **ABOUT)
    with refused():
        model.load_model(path)
    for value in ([1, 2], {"model": 3}):
        torch.save(value, path)
        with refused():
            model.load_model(path)


def test_weights_whose_name_has_their_digest_are_checked_against_it(tmp_path):
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "w.pth").rename(tmp_path / f"w-{digest}.pth")
    model.DeepLabV3("resnet18", [2], str(tmp_path / f"w-{digest}.pth"))
    (tmp_path / f"w-{digest}.pth").rename(tmp_path / "w-01234567.pth")
    with pytest.raises(InputError, match="its digest is not the one in its name"):
        model.DeepLabV3("resnet18", [2], str(tmp_path / "w-01234567.pth"))


def test_networks_are_channels_last_from_the_start_and_after_loading(tmp_path):
    net = tiny((3,))
    model.save_model(net, tmp_path / "net.pth", classes=["a"] * 3, **ABOUT)
    for net in (net, model.load_model(tmp_path / "net.pth")[0]):
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters()
                   if p.dim() == 4)
        assert net(torch.randn(2, 3, 16, 16)).is_contiguous(memory_format=torch.channels_last)


def test_autocast_is_bfloat16_on_the_cpu_and_the_loss_terms_stay_float32():
    cpu = torch.device("cpu")
    net, teacher = tiny((3, 1)), tiny((3,)).eval()
    batch = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
    with run_module.autocast(cpu, True):
        assert net(batch[0]).dtype == torch.bfloat16
        objective = methods.METHODS["hrhf"].objective_of(net, teacher, 1.0)
        assert all(term.dtype == torch.float32 for term in objective.loss(net, *batch)[1].values())
    with run_module.autocast(cpu, False):
        assert net(batch[0]).dtype == torch.float32


# -------------------------------------------------------------------------------------- protocol.py

def test_task_steps():
    assert protocol.task_steps("15-1", 20) == [list(range(1, 16)), [16], [17], [18], [19], [20]]
    assert protocol.task_steps("19-1", 20) == [list(range(1, 20)), [20]]
    assert protocol.task_steps("50-50", 150)[1:] == [list(range(51, 101)), list(range(101, 151))]
    assert protocol.task_steps("4-3", 6) == [[1, 2, 3, 4], [5, 6]]
    assert protocol.task_steps("offline", 3) == [[1, 2, 3]]
    for num_classes in (6, 20, 150):
        for task in ("3-1", "2-2", "4-3"):
            assert sum(protocol.task_steps(task, num_classes),
                       []) == list(range(1, num_classes + 1))
    for task in ("15", "a-b", "0-1", "15-0", "20-1", "15-1-1", ""):
        with pytest.raises(InputError, match="--task"):
            protocol.task_steps(task, 20)


def test_split_indices_by_hand():
    labels = [[0, 1], [0, 2, 255], [0, 1, 3], [0, 3], [0], [2, 3], [1, 2]]
    steps = [[1], [2], [3]]
    assert protocol.split_indices(labels, steps, 0, "overlapped") == [0, 2, 6]
    assert protocol.split_indices(labels, steps, 0, "disjoint") == [0]
    assert protocol.split_indices(labels, steps, 1, "overlapped") == [1, 5, 6]
    assert protocol.split_indices(labels, steps, 1, "disjoint") == [1, 6]
    for setting in ("disjoint", "overlapped"):
        assert protocol.split_indices(labels, steps, 2, setting) == [2, 3, 5]
    with pytest.raises(InputError, match="setting"):
        protocol.split_indices(labels, steps, 0, "both")


@real_data
@pytest.mark.parametrize("task, setting, sizes", [
    ("19-1", "overlapped", [10410, 548]), ("19-1", "disjoint", [10034, 548]),
    ("15-5", "overlapped", [9568, 2145]), ("15-5", "disjoint", [8437, 2145]),
    ("15-1", "overlapped", [9568, 487, 299, 491, 500, 548]),
    ("15-1", "disjoint", [8437, 378, 299, 420, 500, 548])])
def test_voc_split_sizes_at_full_scale_are_those_of_mib(task, setting, sizes):
    labels = list(json.loads((SHARED / "oracles/voc_train_aug_labels.json").read_text()).values())
    steps = protocol.task_steps(task, 20)
    splits = [protocol.split_indices(labels, steps, t, setting) for t in range(len(steps))]
    assert [len(s) for s in splits] == sizes
    assert all(s == sorted(set(s)) for s in splits)
    if setting == "disjoint":
        assert sorted(sum(splits, [])) == list(range(10582))


@real_data
def test_ade_splits_at_full_scale():
    labels = list(json.loads((SHARED / "oracles/ade_train_labels.json").read_text()).values())
    for task, sizes in [("100-50", [20192, 9390]),
                        ("100-10", [20192, 1710, 2294, 2747, 4279, 2844]),
                        ("50-50", [20177, 13186, 9390])]:
        steps = protocol.task_steps(task, 150)
        assert [len(protocol.split_indices(labels, steps, t, "overlapped"))
                for t in range(len(steps))] == sizes
        parts = protocol.partition_indices(labels, steps)
        assert sorted(sum(parts, [])) == [i for i, ids in enumerate(labels) if set(ids) - {0}]
        assert len(sum(parts, [])) == 20196
        # 41: also the rarest class's number in MiB's lists
        for t, part in enumerate(parts):
            assert min(sum(c in labels[i] for i in part) for c in steps[t]) >= 41
    folder = SHARED / "oracles/mib-ade/100-10"
    assert [len(protocol.read_split(folder, t, 20210))
            for t in range(6)] == [13452, 1130, 1200, 1366, 1550, 1498]


def test_partition_gives_every_image_to_one_step_by_the_highest_bid():
    # N = {1: 2, 2: 2, 3: 1}, total 5. Image 0: class 1 bids 122.5, class 3 bids 120 + 5: step 1.
    # Image 1: class 1 bids 122.5: step 0. Image 2: class 2 bids 122.5: step 0. Image 3: nothing.
    labels, steps = [[0, 1, 3], [1], [2, 255], [0], [2]], [[1, 2], [3]]
    assert protocol.partition_indices(labels, steps) == [[1, 2, 4], [0]]
    # N = {1: 2, 2: 3}, total 5. Image 0: 122.5 against 121.67, class 1; 2 got nothing by that.
    # Image 1: class 2. Image 2: class 1 has half of its images, 62.5, class 2 a third, 81.67.
    labels, steps = [[1, 2], [2], [1, 2]], [[1], [2]]
    assert protocol.partition_indices(labels, steps) == [[0], [1, 2]]
    # N = {1: 4, 2: 2, 3: 104}, total 110. Image 2: class 1, a quarter full, bids 90 + 27.5;
    # class 2, half full, 60 + 55. A weight of 100 would give it to class 2.
    labels = [[1], [2], [1, 2], [1], [1], *[[3]] * 104]
    assert protocol.partition_indices(labels, [[1], [2], [3]])[0] == [0, 2, 3, 4]


def test_read_split_takes_mibs_files_and_names_what_is_wrong(tmp_path):
    np.save(tmp_path / "train-0.npy", np.array([4, 2, 9]))
    assert protocol.read_split(tmp_path, 0, 10) == [2, 4, 9]
    with pytest.raises(InputError, match="train-0.npy must hold indices from 0 to 8"):
        protocol.read_split(tmp_path, 0, 9)
    for content in (None, b"PK\3\4rest", b"\x93NUMPY\1\0\x20\0{'descr': ", b"",
                    b"\x93NUMPY\1\0\x4e\0{'descr': '<i8', 'fortran_order': False, "
                    b"'shape': (999999999999,), }      \n"):
        if content is not None:
            (tmp_path / "train-1.npy").write_bytes(content)
        with pytest.raises(InputError, match="--split-dir: cannot read .*train-1.npy"):
            protocol.read_split(tmp_path, 1, 10)


@pytest.mark.parametrize("split, step, options, expected", [
    #                                   id:  0   1   2   3    4   5   255
    ("train", 0, {},                       [0,  1,  2,  0,   0,  0,   0]),
    ("train", 1, {},                       [0,  0,  0,  3,   0,  0,   0]),
    ("train", 2, {},                       [0,  0,  0,  0,   4,  5,   0]),
    ("train", 1, {"void": "ignore"},       [0,  0,  0,  3,   0,  0, 255]),
    ("test", 0, {},                        [0,  1,  2, 255, 255, 255, 255]),
    ("test", 1, {},                        [0,  1,  2,  3, 255, 255, 255]),
    ("test", 2, {},                        [0,  1,  2,  3,   4,  5, 255]),
    ("train", 1, {"score_background": False}, [0, 0, 0, 3,   0,  0,   0]),      # ADE
    ("test", 1, {"score_background": False},  [255, 1, 2, 3, 255, 255, 255]),
])
def test_label_map_row_by_row(split, step, options, expected):
    table = protocol.label_map([[1, 2], [3], [4, 5]], step, split, **options)
    assert table.shape == (256,) and table.dtype == torch.uint8
    assert table[[0, 1, 2, 3, 4, 5, 255]].tolist() == expected


def test_label_map_numbers_channels_in_the_order_of_learning():
    assert protocol.label_map([[3, 1], [2]], 1, "test")[:4].tolist() == [0, 2, 3, 1]


def test_joint_learns_all_classes_on_all_split_lists(tmp_path):
    for k, indices in enumerate(([0, 3], [1], [2, 5])):
        np.save(tmp_path / f"train-{k}.npy", np.array(indices))
    lists = protocol.training_indices([[1]] * 6, [[1], [2], [3]], "disjoint", split_dir=tmp_path)
    assert lists == [[0, 3], [1], [2, 5]]
    assert protocol.training_indices([[1]] * 6, [[1], [2], [3]], "disjoint", split_dir=tmp_path,
                                     joint=True) == [[0, 1, 2, 3, 5]]
    assert protocol.training_indices([[1], [0, 3], [0], [1, 2]], [[1], [2], [3]], "disjoint",
                                     joint=True) == [[0, 1, 3]]


def test_an_order_deals_the_classes_and_every_class_is_in_it_once(tmp_path):
    classes = ["background", "cat", "dog", "cow", "hen"]
    (tmp_path / "order.txt").write_text("hen\n3\ncat\n2\n")
    for text in ("4,3,1,2", "hen, cow,1,dog", str(tmp_path / "order.txt")):
        order = protocol.parse_order(text, classes)
        assert order == [4, 3, 1, 2]
    assert protocol.task_steps("2-1", 4, order) == [[4, 3], [1], [2]]
    assert protocol.task_steps("offline", 4, order) == [[4, 3, 1, 2]]
    many = [str(i) for i in range(151)]
    assert protocol.parse_order(",".join(many[:0:-1]), many) == list(range(150, 0, -1))     # ADE
    with pytest.raises(InputError, match="a class has another's id for a name"):
        protocol.parse_order("2,1", ["background", "2", "1"])
    for text, what in (("4,3,1", "dog is missing"), ("4,3,1,1", "1 is unknown or there twice"),
                       ("4,3,1,cat", "a class is there twice|dog is missing"),
                       ("4,3,1,0", "0 is unknown"), ("4,3,1,pig", "pig is unknown"),
                       ("", "cat is missing")):
        with pytest.raises(InputError, match=f"--order: ({what})"):
            protocol.parse_order(text, classes)


# ------------------------------------------------------------------------------------------ data.py

def test_shapes_are_the_same_pixels_on_every_machine_and_hold_20_classes():
    shapes = data.Shapes("val")
    image, mask = shapes.read(0)
    digest = hashlib.sha256(b"".join(np.asarray(part).tobytes() for i in range(20)
                                     for part in shapes.read(i))).hexdigest()
    assert image.size == mask.size == (64, 64) and image.mode == "RGB"
    assert len(shapes.classes) == 21 and len(set(shapes.classes)) == 21
    assert {c for ids in shapes.labels() for c in ids} == set(range(21))
    assert digest.startswith("db7450e1df426a1a")


def test_a_folder_in_voc_layout_is_read_scanned_and_cached(tmp_path, monkeypatch):
    root = make_folder(tmp_path)
    train_set = data.load("folder", root, "train")
    assert train_set.classes == ["background", "cat", "dog", "cow"] and len(train_set) == 6
    assert train_set.labels() == [[0, c, 255] for c in (1, 2, 3, 1, 2, 3)]
    # a second look does not open a single mask
    with monkeypatch.context() as m:
        m.setattr(data, "scan_pair", None)
        assert data.load("folder", root, "train").labels() == train_set.labels()
    Image.new("L", (36, 40), 3).save(root / "SegmentationClass/train0.png")
    # a changed mask is seen
    assert data.load("folder", root, "train").labels()[0] == [3]
    listing = root / "ImageSets/Segmentation/train.txt"
    listing.write_text("train5\n")
    assert data.load("folder", root, "train").labels() == [[0, 3, 255]]        # and a changed list
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    with pytest.raises(InputError, match="mask id 3 is outside"):              # and fewer classes
        data.load("folder", root, "train").labels()


def test_a_scan_leaves_warnings_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cpus", lambda: 8)            # threads share the filters
    before = list(warnings.filters)
    data.load("folder", make_folder(tmp_path, train=40), "train").scan()
    assert warnings.filters == before


def test_voc_is_read_by_its_lists_and_two_columns_ask_for_no_other_folder(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    make_folder(root)
    (root / "SegmentationClassAug").symlink_to(root / "SegmentationClass")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("train1\ntrain2")
    voc = data.load("voc", tmp_path, "train")
    assert voc.labels() == [[0, 2, 255], [0, 3, 255]] and len(voc.classes) == 21
    (root / "SegmentationClassAug").unlink()
    (root / "SegmentationClass").rename(root / "masks")
    (root / "ImageSets/Segmentation/val.txt").write_text("/JPEGImages/val0.jpg /masks/val0.png\n")
    assert data.load("voc", tmp_path, "val").labels() == [[0, 1, 255]]


def test_ade_is_read_in_sorted_order_with_its_class_names(tmp_path):
    for part in ("images/training", "annotations/training"):
        (tmp_path / "ADEChallengeData2016" / part).mkdir(parents=True)
    for name, c in (("b", 150), ("a", 7)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"ADEChallengeData2016/images/training/{name}.jpg")
        Image.new("L", (8, 8),
                  c).save(tmp_path / f"ADEChallengeData2016/annotations/training/{name}.png")
    (tmp_path / "ADEChallengeData2016/images/training/._a.jpg").write_bytes(b"x")      # hidden
    ade = data.load("ade", tmp_path, "train")
    assert ade.labels() == [[7], [150]] and len(ade.classes) == 151
    (tmp_path / "ADEChallengeData2016/objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n"
        + "".join(f"{i}\t0.1\t1\t1\tname{i}, other\n" for i in range(1, 151)))
    assert data.load("ade", tmp_path, "train").classes[7] == "name7"


def test_prepare_voc_merges_voc_and_sbd_and_keeps_the_test_images_out(tmp_path):
    io = pytest.importorskip("scipy.io", reason="SBD's .mat masks need scipy")
    voc, sbd = make_folder(tmp_path / "VOCdevkit/VOC2012", train=2, val=2), tmp_path / "sbd"
    (sbd / "cls").mkdir(parents=True), (sbd / "img").mkdir()
    for part, names in (("train", ["train0", "extra"]), ("val", ["val0", "more"])):
        (sbd / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.new("RGB", (36, 40)).save(sbd / f"img/{name}.jpg")
            io.savemat(sbd / f"cls/{name}.mat",
                       {"GTcls": {"Segmentation": np.full((40, 36), 7, np.uint8)}})
    data.prepare_voc(tmp_path)
    listing = (voc / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    assert listing == ["extra", "more", "train0", "train1"]                    # not val0
    masks = {p.stem: np.asarray(Image.open(p)) for p in (voc / "SegmentationClassAug").iterdir()}
    assert sorted(masks) == listing
    assert (masks["extra"] == 7).all() and (masks["more"] == 7).all()
    # VOC's own wins
    assert (masks["train0"] == np.asarray(Image.open(voc / "SegmentationClass/train0.png"))).all()
    assert Image.open(voc / "SegmentationClassAug/extra.png").mode == "P"


@pytest.mark.parametrize("breakage, sentence", [
    (lambda root: Image.new("L", (5, 5)).save(root / "SegmentationClass/train2.png"),
     "train2.png: the mask is 5 x 5 pixels, but its image .*train2.jpg is 36 x 40"),
    (lambda root: Image.new("L", (36, 40), 4).save(root / "SegmentationClass/val1.png"),
     "val1.png: mask id 4 is outside the classes 0 to 3"),
    (lambda root: Image.new("RGB", (36, 40), (1, 2, 3)).save(root / "SegmentationClass/train1.png"),
     "train1.png: the mask has mode RGB"),
    (lambda root: (root / "SegmentationClass/train1.png").write_bytes(b"x"),
     "train1.png: not a readable mask"),
    # the header reads, the pixels do not
    (lambda root: os.truncate(path := root / "JPEGImages/train3.jpg", path.stat().st_size // 2),
     "train3.jpg: not a readable image"),
    (lambda root: (Image.new("I;16", (36, 40)).save(root / "JPEGImages/train0.png"),
                   (root / "JPEGImages/train0.jpg").unlink()),
     "train0.png: the image has more than 8 bits"),
    (lambda root: (root / "ImageSets/Segmentation/val.txt").unlink(), "val.txt: not found"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("\n"),
     "train.txt: empty"),
    (lambda root: (root / "classes.txt").unlink(), "classes.txt: not found"),
    (lambda root: (root / "classes.txt").write_text("background\ncat\ncat\n"),
     "classes.txt: expected 2 to 255 different names"),
    (lambda root: (root / "JPEGImages/train0.png").write_bytes(b""),
     "train0.jpg and train0.png are both there"),
    (lambda root: (root / "SegmentationClass/val0.bmp").write_bytes(b""),
     "val0.bmp and val0.png are both there"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("/a/../../b.jpg /c/d.png"),
     "train.txt: /a/../../b.jpg leads out of"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text("train0\nno\x1b[31msuch"),
     r"no\[31msuch: is in .*train.txt, but no picture in .*JPEGImages"),
    (lambda root: [Image.new("L", (36, 40), 255).save(p)
                   for p in (root / "SegmentationClass").iterdir()],
     "all masks hold 0 and 255 alone, and 255 is void"),
])
def test_bad_data_ends_before_a_run_with_one_sentence_that_names_the_file(
        tmp_path, breakage, sentence):
    breakage(make_folder(tmp_path / "data"))
    with pytest.raises(InputError, match=sentence):
        train.main(f"{COMMON} --data-root {tmp_path}/data --out {tmp_path}/run".split())
    assert not (tmp_path / "run").exists()


def test_train_transform_moves_image_and_mask_together_test_transform_is_resize_and_crop():
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 50:90] = 1
    def view_of(mask, transform):
        class One:
            def read(self, i):
                return Image.fromarray(np.stack([mask * 255] * 3, -1)), Image.fromarray(mask)
        return data.View(One(), [0], torch.arange(256, dtype=torch.uint8), transform)
    view, places = view_of(mask, data.train_transform(48)), set()
    for seed in range(8):
        x, y = view[0, seed]
        assert x.shape == (3, 48, 48) and y.shape == (48, 48) and y.dtype == torch.uint8
        assert x.dtype == torch.float32
        assert type(x) is torch.Tensor and type(y) is torch.Tensor
        bright = data.denormalise(x)[0] > 127
        # bilinear against nearest differ at the rim
        assert (bright == (y == 1)).float().mean() > 0.93
        places.add(tuple(y.flatten().tolist()))
        # the seed decides alone
        torch.testing.assert_close(x, view[0, seed][0], rtol=0, atol=0)
    assert len(places) == 8
    left, right = np.zeros((48, 48), np.uint8), []
    left[:, :24] = 1
    halves = view_of(left, data.train_transform(48))
    for seed in range(20):
        y = halves[0, seed][1].float()
        right.append(bool(y[:, 24:].mean() > y[:, :24].mean()))
    assert 3 < sum(right) < 17                              # flipped about half the time
    x, y = view_of(mask, data.test_transform(45))[0, 0]
    assert y.shape == (45, 45)
    # at half size: rows 15-30, columns 18-38
    assert y[15:30, 18:37].float().mean() > 0.95 and y.sum() < 21 * 16


def test_normalisation_is_imagenets_and_denormalise_undoes_it():
    pixels = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    x = data.normalised(pixels)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x, (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.equal(data.denormalise(x), pixels)


def test_fakes_follow_the_real_images_in_a_view_with_background_labels(tmp_path):
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "f.png")
    view = data.View(data.Shapes("val"), [3], protocol.label_map([[1]], 0, "train"),
                     data.train_transform(16), [tmp_path / "f.png"])
    image, target = view[1, 5]
    assert target.sum() == 0 and torch.equal(data.denormalise(image),
                                             torch.tensor([255, 0, 0], dtype=torch.uint8)
                                             .view(3, 1, 1).expand(3, 16, 16))


def test_train_batches_hold_the_asked_proportion_and_show_every_image_equally_often():
    batches = list(data.train_batches(10, 4, 5, 3, iterations=8, seed=1))
    real = [p for batch in batches for p, _ in batch if p < 10]
    fake = [p for batch in batches for p, _ in batch if p >= 10]
    assert all(sum(p < 10 for p, _ in batch) == 5 and len(batch) == 8 for batch in batches)
    assert sorted(real) == sorted(list(range(10)) * 4)
    assert sorted(fake) == sorted([10, 11, 12, 13] * 6)
    # every crop its own seed
    assert len({s for batch in batches for _, s in batch}) == 64
    assert batches != list(data.train_batches(10, 4, 5, 3, iterations=8, seed=2))
    batch, = data.train_batches(12, 12, 12, 12, iterations=1, seed=1)
    # fakes have an order of their own
    assert [p for p, _ in batch[:12]] != [p - 12 for p, _ in batch[12:]]


def test_train_batches_go_on_where_they_stopped_and_ranks_share_them():
    whole = list(data.train_batches(10, 4, 4, 4, iterations=6, seed=1))
    assert list(data.train_batches(10, 4, 4, 4, iterations=6, seed=1, start=2)) == whole[2:]
    ranks = [list(data.train_batches(10, 4, 4, 4, iterations=6, seed=1, rank=r, world=2))
             for r in (0, 1)]
    for batch, a, b in zip(whole, *ranks):
        assert sorted(a + b) == sorted(batch) and len(a) == len(b)
        assert sum(p < 10 for p, _ in a) == 2               # half real, half fake on each
    # fewer images than the batch
    assert len(list(data.train_batches(2, 0, 6, 0, iterations=3, seed=1))) == 3


def test_the_palette_is_vocs():
    assert data.palette()[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128],
        [224, 224, 192]]


@real_data
@pytest.mark.parametrize("dataset, task, classes", [("voc", "15-1", 21), ("ade", "100-50", 151)])
def test_the_official_layouts_load_from_real_files(tmp_path, dataset, task, classes):
    for name in ("VOCdevkit/VOC2012", "ADEChallengeData2016"):
        for source in (SHARED / "data" / name).iterdir():
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            # so that the scan's cache stays out of there
            (tmp_path / name / source.name).symlink_to(source)
    real = data.load(dataset, tmp_path, "train")
    assert len(real.classes) == classes and {"voc": 183, "ade": 2}[dataset] == len(real)
    assert all(0 <= c < classes or c == 255 for ids in real.labels() for c in ids)
    image, target = data.View(real, [0], protocol.label_map(protocol.task_steps(task, classes - 1),
                                                            0, "train"),
                              data.train_transform(64))[0, 0]
    assert image.shape == (3, 64, 64) and target.max() < classes


@pytest.mark.parametrize("lines", [
    "train0\ntrain1", "train0.jpg\r\ntrain1.png\r\n", "train0\ntrain1\ntrain0\n",
    "/JPEGImages/train0.jpg /SegmentationClass/train0.png\n"
    "/JPEGImages/train1.jpg\t/SegmentationClass/train1.png",
    "JPEGImages/train0.jpg    SegmentationClass/train0.png\n"
    "JPEGImages/train1.jpg SegmentationClass/train1.png"])
def test_lists_are_read_in_all_their_forms(tmp_path, lines, capsys):
    root = make_folder(tmp_path)
    (root / "ImageSets/Segmentation/train.txt").write_bytes(lines.encode())
    dataset = data.load("folder", root, "train")
    assert [(i.name, m.name) for i, m in zip(dataset.images, dataset.masks)] == [
        ("train0.jpg", "train0.png"), ("train1.jpg", "train1.png")]
    assert ("1 lines are repeated" in capsys.readouterr().err) == (lines.count("train0\n") == 2)


def test_names_with_blanks_capitals_a_bom_escape_codes_and_another_unicode_form_are_read(tmp_path):
    root = make_folder(tmp_path)
    listing = root / "ImageSets/Segmentation/train.txt"
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (root / folder / f"train0.{ending}").rename(root / folder / f"a cow.{ending.upper()}")
        (root / folder / f"train1.{ending}").rename(root / folder / f"M\u00fcnchen.{ending}")
    (root / "JPEGImages/a cow.xml").write_text("<boxes/>")
    (root / "classes.txt").write_text("background\ncat\x1b[31m\ndog\ncow\n")
    listing.write_bytes("\ufeffa cow\r\nMu\u0308nchen\r\n".encode())
    dataset = data.load("folder", root, "train")
    assert dataset.labels() == [[0, 1, 255], [0, 2, 255]] and dataset.classes[1] == "cat[31m"
    listing.write_text("/JPEGImages/a cow.JPG /SegmentationClass/a cow.PNG\n")
    assert data.load("folder", root, "train").labels() == [[0, 1, 255]]


def test_a_damaged_cache_of_labels_is_made_again(tmp_path):
    dataset = data.load("folder", make_folder(tmp_path), "train")
    labels, digest, text = dataset.labels(), dataset.digest, dataset.cache.read_text()
    signed = lambda scan: json.dumps({"key": json.loads(text)["key"], "scan": scan,
                                      "sha256": run_module.sha256(json.dumps(scan))})
    for damaged in (text.replace("[0, 1, 255]", "[0, 2, 255]", 1), text[:50], "[" * 100_000, "",
                    signed([]), signed([[["a"], "b"]] * len(dataset)), signed([1] * len(dataset))):
        dataset.cache.write_text(damaged)
        assert dataset.labels() == labels and dataset.digest == digest


def test_a_file_replaced_by_one_of_its_size_and_time_is_scanned_again(tmp_path):
    dataset = data.load("folder", make_folder(tmp_path), "train")
    labels, mask = dataset.labels(), dataset.masks[0].with_suffix(".bmp")
    dataset.masks[0] = mask
    for ids in ([0, 1], [0, 2]):
        Image.fromarray(np.array(ids, np.uint8).repeat(20 * 36).reshape(40, 36)).save(mask)
        os.utime(mask, ns=(10 ** 18, 10 ** 18))
        assert dataset.labels() == [ids, *labels[1:]]


# -------------------------------------------------------------------------------------- pictures.py

def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(rows, bits=8, palette=None):
    """A PNG of grey numbers or palette indices, `bits` each, written by hand."""
    lines = b""
    for row in rows:
        text = "".join(f"{v:0{bits}b}" for v in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + bytes(int(text[i:i + 8], 2) for i in range(0, len(text), 8))
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(sum(palette, ()))) if palette else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + colours
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [None, [(0, 0, 0), (9, 60, 200)]])
def test_a_mask_holds_the_ids_that_it_stores_in_any_number_of_bits(tmp_path, bits, palette):
    rows = [[0, 1, 1], [1, 0, 1]] if palette or bits == 1 else [[0, 1, 2 ** bits - 1], [1, 0, 2]]
    (tmp_path / "m.png").write_bytes(png(rows, bits, palette))
    assert np.array(pictures.read_mask(tmp_path / "m.png")).tolist() == rows


@pytest.mark.parametrize("colours, ids, sentence", [
    ([(0, 0, 0), (4, 4, 4)], [0, 1], r"index 1 has the grey of id 4, \(4, 4, 4\)"),
    ([(0, 0, 0), (255, 255, 255)], [0, 1], "index 1 has the grey of id 255"),
    ([(0, 0, 0), (0, 128, 0)], [0, 1], "index 1 has VOC's colour of id 2"),
    ([(224, 224, 192), (128, 0, 0)], [0, 1], "index 0 has VOC's colour of id 255"),
    ([(0, 0, 0), (0, 128, 0)], [0, 0], None),               # not used
    ([(0, 0, 0), (128, 0, 0), (0, 128, 0)], [0, 2], None),  # VOC's own
    ([(0, 0, 0), (1, 1, 1), (2, 2, 2)], [1, 2], None),      # grey's own
    ([(3, 7, 1), (90, 80, 70)], [0, 1], None),              # somebody's colours
    ([(0, 0, 0), (30, 30, 30)], [0, 1], None),              # no valid id's grey
])
def test_a_palette_that_a_program_has_renumbered_is_refused(tmp_path, colours, ids, sentence):
    (tmp_path / "m.png").write_bytes(png([ids], 8, colours))
    if sentence is None:
        assert np.array(pictures.read_mask(tmp_path / "m.png", 20)).tolist() == [ids]
    else:
        with pytest.raises(InputError, match=f"m.png: {sentence}.* save the ids as 8-bit grey"):
            pictures.read_mask(tmp_path / "m.png", 20)


def test_a_coloured_mask_that_pillow_made_a_palette_for_is_refused(tmp_path):
    ids = Image.fromarray(np.array([[0, 1]], np.uint8))
    ids.putpalette(data.palette().tobytes())
    ids.convert("RGB").convert("P").save(tmp_path / "m.png")
    with pytest.raises(InputError, match="m.png: has Pillow's palette for coloured pictures"):
        pictures.read_mask(tmp_path / "m.png")


def test_a_mask_must_be_lossless_and_of_one_channel_or_three_equal_ones(tmp_path):
    ids = Image.fromarray(np.array([[0, 3], [1, 255]], np.uint8))
    Image.merge("RGB", [ids] * 3).save(tmp_path / "equal.png")
    ids.save(tmp_path / "ids.tif")
    ids.save(tmp_path / "ids.bmp")
    for name in ("equal.png", "ids.tif", "ids.bmp"):
        assert np.array(pictures.read_mask(tmp_path / name)).tolist() == [[0, 3], [1, 255]]
    ids.save(tmp_path / "j.jpg")
    (tmp_path / "j.png").write_bytes((tmp_path / "j.jpg").read_bytes())        # by what it is
    ids.save(tmp_path / "w.webp")
    ids.save(tmp_path / "t.tif", compression="jpeg")
    for name in ("j.jpg", "j.png", "w.webp", "t.tif"):
        with pytest.raises(InputError, match=f"{name}: a mask must be lossless"):
            pictures.read_mask(tmp_path / name)
    Image.new("LA", (2, 2)).save(tmp_path / "la.png")
    with pytest.raises(InputError, match="la.png: the mask has mode LA"):
        pictures.read_mask(tmp_path / "la.png")


def test_a_flipped_byte_in_a_png_is_found_by_the_scan(tmp_path):
    root = make_folder(tmp_path, train=1, val=1)
    for name in ("SegmentationClass/train0.png", "JPEGImages/train0.png"):
        if name.startswith("J"):
            (root / "JPEGImages/train0.jpg").unlink()
            Image.new("RGB", (36, 40), (9, 99, 50)).save(root / name)
        whole = (root / name).read_bytes()
        for position in range(41, len(whole) - 16, 7):      # pixels, their checksum included
            flipped = whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1:]
            (root / name).write_bytes(flipped)
            with pytest.raises(InputError, match="train0.png: not a readable"):
                data.load("folder", root, "train").labels()
        (root / name).write_bytes(whole)


def test_a_mask_of_16_bits_is_refused_also_as_three_equal_channels(tmp_path):
    pixels = b"".join(b"\0" + b"\0\1\0\1\0\1" * 2 for _ in range(2))       # id 1 in 16 bits
    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                                     + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))
    with pytest.raises(InputError, match="m.png: the mask has mode"):
        pictures.read_mask(tmp_path / "m.png")


def test_exif_orientation_turns_pictures_wherever_they_are_read(tmp_path):
    root = make_folder(tmp_path, train=1, val=1)
    exif = Image.Exif()
    exif[0x0112] = 6                                        # stored lying, to be shown upright
    image = Image.open(root / "JPEGImages/train0.jpg")
    image.rotate(90, expand=True).save(root / "JPEGImages/train0.jpg", exif=exif, quality=95)
    dataset = data.load("folder", root, "train")
    assert dataset.labels() == [[0, 1, 255]]                # the sizes fit only when it is turned
    turned, mask = (np.array(part).astype(float) for part in dataset.read(0))
    inside = np.abs(turned - data.palette()[1]).sum(2)[mask == 1]
    # the class's colour, where the mask has it
    assert inside.mean() < 60


def test_hostile_metadata_and_pipes_are_one_sentence_or_read(tmp_path):
    big = zlib.compress(b"a" * 80_000_000)
    whole = png([[0, 1]])
    for name, body in ((b"zTXt", b"k\0\0" + big), (b"iTXt", b"k\0\1\0\0\0" + big),
                       (b"iCCP", b"k\0\0" + big)):
        (tmp_path / "m.png").write_bytes(whole[:33] + chunk(name, body) + whole[33:])
        try:
            assert np.array(pictures.read_mask(tmp_path / "m.png")).tolist() == [[0, 1]]
        except InputError as error:
            assert "m.png: not a readable mask" in str(error)
    os.mkfifo(tmp_path / "pipe.png")
    for read in (pictures.read_image, pictures.read_mask, model.load_model,
                 lambda path: run_module.read_json(path, {})):
        with pytest.raises(InputError, match="pipe.png: not a regular file"):
            read(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="null byte"):
        pictures.read_image("a\0b.png")


# -------------------------------------------------------------------------------- your own pictures

def test_check_says_all_that_is_wrong_at_once_and_what_every_step_would_see(tmp_path, capsys):
    root = make_folder(tmp_path, train=24, val=6)
    flags = f"check --data-root {root} --task 1-1 --crop 32 --batch-size 4 --num-fakes 8".split()
    data.main(flags)
    out = capsys.readouterr().out
    masks = [np.array(Image.open(root / f"SegmentationClass/train{i}.png")) for i in range(24)]
    share = 100 * sum((m == 1).sum() for m in masks) / sum((m < 4).sum() for m in masks)
    assert f"| cat | 8 | {share:.2f} | 2 |" in out
    assert "| 0 | cat | 8 | 60 | 0 |" in out and "| 1 | dog | 8 | 120 | 16 |" in out
    assert "warning: step 0, 1, 2: under 300 iterations few classes are learned: --min-iters 300" \
        in out and "enlarged" not in out
    data.main([*flags, "--min-iters", "300"])
    out = capsys.readouterr().out
    assert "| 0 | cat | 8 | 300 | 0 |" in out and "few classes are learned" not in out
    Image.new("L", (36, 40), 2).save(root / "SegmentationClass/val0.png")       # the only cats
    Image.new("L", (36, 40), 2).save(root / "SegmentationClass/val3.png")
    data.main([*flags, "--crop", "64"])
    out = capsys.readouterr().out
    assert "warning: 24 of 24 training images are smaller than --crop 64" in out
    small = np.zeros((40, 36), np.uint8)
    small[:10, :10] = 1                                     # 100 pixels; 44 at --crop 24
    for i in range(0, 24, 3):
        Image.fromarray(small).save(root / f"SegmentationClass/train{i}.png")
    data.main([*flags, "--crop", "24"])
    assert "cat has fewer than 64 pixels in half of its images" in capsys.readouterr().out
    (root / "classes.txt").write_text("background\ncat\ndog\ncow\nbear\nhen\n")
    Image.new("L", (36, 40), 4).save(root / "SegmentationClass/val0.png")
    Image.new("L", (36, 40)).save(root / "SegmentationClass/train0.png")
    with open(root / "ImageSets/Segmentation/val.txt", "a") as listing:
        listing.write("train1\ntrain2\n")
    data.main(["check", "--data-root", str(root), *"--task 2-1 --crop 32 --max-iters 2".split()])
    out = capsys.readouterr().out
    assert "warning: bear is in no training image" in out and "bear is in no test" not in out
    assert "hen is in no training image" in out and "hen is in no test image: it has no" in out
    assert "2 images are in both lists" in out and "1 training images are in no step" in out
    assert "few classes are learned" not in out             # --max-iters asked for it
    for i in (1, 4, 7):
        Image.new("L", (36, 40), 9).save(root / f"SegmentationClass/train{i}.png")
    (root / "JPEGImages/train2.jpg").write_bytes(b"x")
    (root / "SegmentationClass/train5.png").unlink()
    (root / "JPEGImages/val1.jpg").unlink()
    (root / "SegmentationClass/train8.png").write_bytes(b"x")
    (root / "SegmentationClass/train11.png").write_bytes(b"x")
    with pytest.raises(InputError, match="8 things wrong, see above"):
        data.main(flags)
    out = capsys.readouterr().out
    assert re.search(r"1 x is in .*train.txt, but no picture in .*SegmentationClass: train5", out)
    assert re.search(r"1 x is in .*val.txt, but no picture in .*JPEGImages: val1\n", out)
    assert re.search(r"2 x not a readable mask .* file 'it'\): .*train11.png, .*train8.png", out)
    assert "| cat |" in out
    assert re.search(r"3 x mask id 9 is outside the classes 0 to 5 .*train1.png, .*train7.png", out)
    assert re.search(r"1 x not a readable image .*train2.jpg", out)


def test_masks_in_colours_become_ids_and_an_unknown_colour_is_listed(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    colours = np.array([[0, 0, 0], [10, 20, 30], [200, 0, 1], [9, 9, 9]], np.uint8)
    ids = {f"{n}": np.random.RandomState(n).randint(0, 4, (6, 5)) for n in range(6)}
    for name, mask in ids.items():
        Image.new("RGB", (5, 6)).save(tmp_path / f"photos/{name}.jpg")
        Image.fromarray(colours[mask]).save(tmp_path / f"masks/{name}.png")
    names = tmp_path / "colours.txt"
    names.write_text("background 0 0 0\nwild boar 10 20 30\nsky 200,0,1\nvoid 9 9 9\n")
    command = ["convert", f"{tmp_path}/masks", "--images", f"{tmp_path}/photos", "--names",
               f"{names}", "--out"]
    data.main([*command, f"{tmp_path}/out"])
    assert "6 pictures of 3 classes, each fifth for testing" in capsys.readouterr().out
    train_set, val = (data.load("folder", tmp_path / "out", split) for split in ("train", "val"))
    assert train_set.classes == ["background", "wild boar", "sky"] and len(val) == 1
    for dataset in (train_set, val):
        for i in range(len(dataset)):
            expected = np.where(ids[dataset.images[i].stem] == 3, 255, ids[dataset.images[i].stem])
            assert np.array_equal(np.array(dataset.read(i)[1]), expected)
    with pytest.raises(InputError, match="out: is there and not empty"):
        data.main([*command, f"{tmp_path}/out"])
    names.write_text("background 0 0 0\nboar 10 20 30\n")
    Image.new("RGB", (5, 6)).save(tmp_path / "photos/alone.jpg")
    Image.new("RGBA", (5, 6)).save(tmp_path / "masks/0.png")
    Image.new("RGB", (6, 5)).save(tmp_path / "masks/1.png")
    capsys.readouterr()
    with pytest.raises(InputError, match="11 things cannot be converted, see above; nothing is"):
        data.main([*command, f"{tmp_path}/new"])
    out = capsys.readouterr().out
    assert re.search(r"4 x the colour \(200, 0, 1\) is unknown: .*/2.png, .*, \.\.\.\n", out)
    assert "4 x the colour (9, 9, 9) is unknown" in out and "1 x the mask is transparent" in out
    assert f"1 x is a picture in {tmp_path}/photos alone: alone" in out
    assert "colours are unknown; is it a photograph" not in out
    assert "1 x its annotation is for a picture of another size" in out and "1.jpg" in out
    assert not (tmp_path / "new").exists()
    noisy = np.random.RandomState(0).randint(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(noisy).save(tmp_path / "masks/2.png")
    with pytest.raises(InputError, match="11 things"):
        data.main([*command, f"{tmp_path}/new"])
    assert "colours are unknown; is it a photograph, or a JPEG" in capsys.readouterr().out
    for text, sentence in (("a 1 2\n", "line 1: expected"), ("a 1 2 3\nb 1 2 3", "line 2: b")):
        names.write_text(text)
        with pytest.raises(InputError, match=sentence):
            data.main([*command, f"{tmp_path}/new"])


def test_labelmes_polygons_become_ids_by_name(tmp_path):
    for k, name in enumerate("ab"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.jpg")
        square = {"label": "cow" if k else "ant", "shape_type": "polygon",
                  "points": [[2, 1], [9, 1], [9, 5], [2, 5]]}
        box = {"label": "__ignore__", "shape_type": "rectangle", "points": [[12, 0], [15, 3]]}
        record = {"imagePath": f"{name}.jpg", "shapes": [square, box]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    convert.convert(tmp_path, tmp_path / "out")
    assert (tmp_path / "out/classes.txt").read_text() == "background\nant\ncow\n"
    for k, name in enumerate("ab"):
        ids = np.array(pictures.read_mask(tmp_path / f"out/SegmentationClass/{name}.png"))
        assert ids.shape == (10, 20) and (ids[1:6, 2:10] == k + 1).all()
        assert (ids[:4, 12:16] == 255).all() and (ids > 0).sum() == 5 * 8 + 4 * 4
    (tmp_path / "files/deep").mkdir(parents=True)           # away from the photographs
    for k, name in enumerate("ab"):
        (tmp_path / f"{name}.json").rename(tmp_path / "files" / ("deep" * k) / f"{name}.json")
    convert.convert(tmp_path / "files", tmp_path / "again", images=tmp_path)
    for name in "ab":
        path = f"SegmentationClass/{name}.png"
        assert (tmp_path / "again" / path).read_bytes() == (tmp_path / "out" / path).read_bytes()


def test_cocos_polygons_and_both_kinds_of_run_lengths_become_ids_of_one_class_a_name(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 3)).save(tmp_path / f"{name}.jpg")
    mask = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]], bool)
    counts = [2, 5, 4, 1]                                   # column by column, zeros first
    assert np.repeat([0, 1] * 2, counts).tolist() == mask.T.flatten().tolist()
    names = {90: "co\nw", 5: "background", 3: "ant", 6: "ant "}
    record = {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
              "categories": [{"id": k, "name": name} for k, name in names.items()],
              "annotations": [{"image_id": 7, "category_id": k, "segmentation": outline}
                              for k, outline in (
                                  (6, {"size": [3, 4], "counts": "01;"}),      # a corner
                                  (3, {"size": [3, 4], "counts": counts}),
                                  (90, [[0, 0, 3, 0, 3, 2, 0, 2]]))]}
    (tmp_path / "c.json").write_text(json.dumps(record))
    convert.convert(tmp_path / "c.json", tmp_path / "out", images=tmp_path)
    assert (tmp_path / "out/classes.txt").read_text() == "background\ncow\nant\n"
    ids = np.array(pictures.read_mask(tmp_path / "out/SegmentationClass/a.png"))
    mask[0, 0] = True
    assert np.array_equal(ids, np.where(mask, 2, 1))        # the small ones lie on top


def labelme_file(**shape):
    square = {"label": "ant", "points": [[2, 1], [9, 1], [9, 5]], **shape}
    return {"imagePath": "a.jpg", "shapes": [square]}


def coco_file(**annotation):
    square = {"id": 5, "image_id": 7, "category_id": 3, "segmentation": [[0, 0, 3, 0, 3, 2]]}
    return {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
            "categories": [{"id": 3, "name": "ant"}], "annotations": [{**square, **annotation}]}


@pytest.mark.parametrize("record, sentence", [
    (labelme_file(shape_type="linestrip"), "a shape is of kind linestrip"),
    (labelme_file(points=[[2, 1], [9, 1]]), "an outline has fewer than 3 points"),
    (labelme_file(points=[[2, 1], [9, math.nan], [3, 3]]), "an outline leads to infinity"),
    (labelme_file(points=[2, 1, 9, 1]), "an outline is no list of points"),
    (labelme_file(points=[[2, 1], [9, 10 ** 400], [3, 3]]), "an outline is no list of points"),
    (labelme_file(points=[[60, 60], [70, 60], [70, 70]]), "an object has no pixel inside its"),
    (labelme_file(label=None), "a shape has no label"),
    ({**labelme_file(), "imageWidth": 40, "imageHeight": 20}, "for a picture of another size"),
    ({**labelme_file(), "imagePath": "none.jpg"}, "none.jpg"),
    ({"imagePath": "a.jpg"}, "not labelme's (KeyError('shapes'))"),
    (coco_file(segmentation=[]), "has no segmentation; a box alone is no mask: object 5"),
    (coco_file(image_id=9), "is of an image or a category that is not there: object 5"),
    (coco_file(category_id=9), "is of an image or a category that is not there: object 5"),
    (coco_file(segmentation=[[0, 0, 3, 0, 3]]), "an odd number of coordinates: object 5"),
    (coco_file(segmentation=[[0, 0, 3, 0]]), "fewer than 3 points, so no area: object 5"),
    (coco_file(segmentation=[7]), "its segmentation is not COCO's"),
    (coco_file(segmentation={"size": [10, 20], "counts": [3, 4]}),
     "its run lengths are not as many pixels as the picture has: object 5"),
    (coco_file(segmentation={"size": [20, 10], "counts": [200]}),
     "its run lengths are of a picture of another size: object 5"),
    ({**coco_file(), "images": [{"id": 7, "file_name": "a.jpg", "width": 10, "height": 20}]},
     "for a picture of another size"),
    ({**coco_file(), "images": [{"id": k, "file_name": "a.jpg"} for k in (7, 8)]},
     "is annotated twice"),
    ({**coco_file(), "images": [{"id": 7, "file_name": name} for name in ("a.jpg", "b.jpg")]},
     "an id that is there twice among the images: 7"),
    ({**coco_file(), "categories": [{"id": 3, "name": name} for name in "xy"]},
     "an id that is there twice among the categories: 3"),
])
def test_what_an_annotation_would_lose_is_told_and_nothing_is_written(
        tmp_path, capsys, record, sentence):
    for name in "ab":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "a.json").write_text(json.dumps(record))
    source = tmp_path / "a.json" if "images" in record else tmp_path
    with pytest.raises(InputError, match="1 thing cannot be converted"):
        convert.convert(source, tmp_path / "new", images=tmp_path)
    assert sentence in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_a_rectangle_has_two_corners_or_four_and_an_outline_of_a_hidden_name_is_refused(tmp_path):
    box = [[2, 1], [9, 1], [9, 5], [2, 5]]
    for points in (box[::2], box[::-2], box):
        outline = convert.labelme_outline({"points": points, "shape_type": "rectangle"}, "x")
        assert {tuple(point) for point in outline} == {tuple(point) for point in box}
    for name in (" a", ".b", "c"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name[-1]}.json").write_text(
            json.dumps({**labelme_file(), "imagePath": f"{name}.jpg"}))
    with pytest.raises(InputError, match="2 things cannot be converted"):
        convert.convert(tmp_path, tmp_path / "new")


def test_what_keeps_a_folder_from_being_made_leaves_nothing_behind(tmp_path, monkeypatch):
    names = [f"n{k}" for k in range(255)]
    with pytest.raises(InputError, match="256 classes, at most 255"):
        convert.numbered(names)
    assert convert.numbered(["Background", "cow", "VOID"]) == (
        ["background", "cow"], {"Background": 0, "cow": 1, "VOID": 255})
    for name in "ab":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**labelme_file(), "imagePath": f"{name}.jpg"}))
    (tmp_path / "new").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "new")
    convert.convert(tmp_path, ".")                          # an empty folder is taken
    assert (tmp_path / "new/classes.txt").read_text() == "background\nant\n"
    with pytest.raises(InputError, match="an argument is empty"):
        data.parse(["convert", "x", "--out", ""])


def test_cocos_compressed_run_lengths_come_back_from_a_naive_encoder():
    def encoded(counts):
        text = ""
        for i, count in enumerate(counts):
            x = count - (counts[i - 2] if i > 2 else 0)
            while True:
                bits, x = x & 31, x >> 5
                more = x != (-1 if bits & 16 else 0)
                text += chr(48 + bits + 32 * more)
                if not more:
                    break
        return text
    for counts in ([0, 1, 0], [5, 70000, 3, 2, 900, 16, 15, 31, 32, 1], [1023] * 7):
        assert convert.run_lengths(encoded(counts)) == counts


# ----------------------------------------------------------------------------------------- fakes.py

@pytest.mark.parametrize("num_images, num_classes, most",
                         [(64, 15, 3), (7, 4, 3), (50, 2, 3), (9, 1, 3), (33, 20, 1)])
def test_every_old_class_is_asked_for_equally_often(num_images, num_classes, most):
    targets = fakes.balanced_targets(num_images, range(1, num_classes + 1), seed=3, most=most)
    assert len(targets) == num_images
    assert all(1 <= len(t) <= min(most, num_classes) and t == sorted(set(t)) for t in targets)
    counts = np.bincount(sum(targets, []), minlength=num_classes + 1)[1:]
    assert counts.max() - counts.min() <= 1 and len(counts) == num_classes
    if num_images > 20 and most > 1 and num_classes > 2:
        assert {len(t) for t in targets} == {1, 2, 3}


def test_synthesize_asks_for_background_everywhere_and_draws_r_per_image_and_class(
        tmp_path, monkeypatch):
    asked = spy(monkeypatch, fakes, "invert", lambda net, targets, r, **options: (targets, r))
    make_fakes(tmp_path)
    targets, r = (torch.cat(parts) for parts in zip(*asked))
    assert targets.shape == r.shape == (10, 4) and (targets[:, 0] == 1).all()
    assert ((targets[:, 1:].sum(1) >= 1) & (targets[:, 1:].sum(1) <= 3)).all()
    assert set(r.flatten().tolist()) == set(fakes.R_CHOICES)
    assert all(len(set(row.tolist())) > 1 for row in r[:3])
    assert all(len(set(c.tolist())) > 1 for c in r[:4].T)
    asked.clear()
    make_fakes(tmp_path / "max", r="max")
    assert all(torch.isinf(r).all() for _, r in asked)
    asked.clear()
    for seed in range(3):
        make_fakes(tmp_path / f"random-image-{seed}", r="random-image", seed=seed)
    r = torch.cat([r for _, r in asked])
    assert r.shape == (30, 4) and (r == r[:, :1]).all()
    assert set(r[:, 0].tolist()) == set(fakes.R_CHOICES)
    assert all(len(set(batch[:, 0].tolist())) > 1 for _, batch in asked if len(batch) == 4)
    line = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[3])
    net = tiny((4,)).eval()                                 # what is found is found in the file
    x = data.normalised(fakes.read_pixels(tmp_path / "00003.png")[None])
    share = F.one_hot(net(x).argmax(1), 4).float().mean((0, 1, 2))
    assert line["found"] == pytest.approx(share[line["classes"]].tolist())


def test_synthesize_takes_a_height_and_a_width_and_finds_its_folder_again(tmp_path):
    for _ in range(2):
        path = make_fakes(tmp_path, sizes=[(32, 48)])[0]
    assert Image.open(path).size == (48, 32)


def test_synthesize_fills_a_folder_and_a_manifest_that_says_what_is_in_it(tmp_path):
    paths = make_fakes(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"]
            for line in lines] == [p.name for p in paths] == [f"{i:05d}.png" for i in range(10)]
    assert sorted(p.name
                  for p in tmp_path.iterdir()) == sorted([p.name for p in paths]
                                                         + ["manifest.jsonl", "plan.json"])
    for line in lines:
        assert line["classes"][0] == 0 and 1 <= len(line["classes"]) - 1 <= 3
        assert len(line["r"]) == len(line["found"]) == len(line["classes"])
        assert all(float(r) in fakes.R_CHOICES for r in line["r"])
        assert len({line["seed"] for line in lines}) == 3       # one a batch
    assert all(Image.open(p).size == (32, 32) for p in paths)


def test_synthesize_goes_on_at_the_first_missing_batch_to_the_same_manifest_and_images(
        tmp_path, monkeypatch):
    whole = make_fakes(tmp_path / "whole")
    stop_at(monkeypatch, {("invert", 3)}, (fakes, "invert"))
    calls = spy(monkeypatch, fakes, "invert")
    with pytest.raises(KeyboardInterrupt):
        make_fakes(tmp_path / "parts")
    assert not (tmp_path / "parts/manifest.jsonl").exists()
    parts = make_fakes(tmp_path / "parts")
    # batches 0, 1, the broken 2, and 2 again
    assert len(calls) == 4
    make_fakes(tmp_path / "parts")
    assert len(calls) == 4                                  # nothing left to do
    texts = [(tmp_path / name / "manifest.jsonl").read_text() for name in ("parts", "whole")]
    assert texts[0] == texts[1]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts))


def test_synthesize_refuses_a_folder_of_other_fakes(tmp_path):
    make_fakes(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(steps\)"):
        make_fakes(tmp_path, steps=3)
    with pytest.raises(InputError, match=r"other settings \(model\)"):
        fakes.synthesize(tiny((4,), seed=1), tmp_path, 10, sizes=[32], batch_size=4, seed=5,
                         steps=2)


def test_synthesize_stops_on_a_loss_that_is_not_finite(tmp_path):
    net = tiny((4,))
    with torch.no_grad():
        net.body[0][0].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="batch 0"):
        fakes.synthesize(net, tmp_path, 4, sizes=[32], steps=2)


def test_parse_r():
    assert [fakes.parse_r(t) for t in ("random", "random-image", "avg", "max", "0.5",
                                       "20")] == [None, None, 0, math.inf, 0.5, 20]


def test_noise_fakes_are_where_the_inversion_starts(tmp_path):
    net = tiny((4,))
    path, = fakes.synthesize(net, tmp_path, 1, sizes=[32], steps=0, spectrum=0, seed=7)
    seed = json.loads((tmp_path / "manifest.jsonl").read_text())["seed"]
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(data.denormalise(noise)[0],
                       torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0))


def test_figure_3_is_drawn_with_its_checkpoints_settings_and_an_unknown_class_is_named(
        finished, tmp_path, monkeypatch):
    command = ["--checkpoint", f"{finished}/run/step-2.pth", "--out", f"{tmp_path}/figure.png",
               "--images", "4"]
    options = spy(monkeypatch, fakes, "invert", lambda *_, **given: given)
    fakes.main([*command, "--classes", "cat,cow", "--r", "0.5,5,max"])
    of_run = {"steps": 2, "lr": 0.25, "tv": 0.3, "bn": 10.0, "spectrum": 1.0,
              "sizes": [16, 32], "seed": 0}
    assert options == [of_run] * 3
    assert Image.open(tmp_path / "figure.png").size == (3 * 34 + 2, 8 * 34 + 2 + 14)
    with pytest.raises(InputError,
                       match="--classes cat,zebra: zebra is unknown to this checkpoint, "
                                         "which knows cat, dog, cow"):
        fakes.main([*command, "--classes", "cat,zebra"])
    for flag in ("--images 0", "--seed -1", f"--seed {2 ** 64}", f"--out {tmp_path}",
                 f"--out {tmp_path}/no/f.png", "--r random", "--r -1"):
        with pytest.raises(InputError, match=flag.split()[0]):
            fakes.main([*command, "--classes", "cat", *flag.split()])
    with pytest.raises(InputError, match="nowhere.pth: No such file"):
        fakes.main(["--checkpoint", "nowhere.pth", "--classes", "cat"])


def test_figure_3_deals_sets_of_classes_to_the_images_and_measures_a_class_where_it_was_asked_for(
        tmp_path, monkeypatch):
    made, invert, names = [], fakes.invert, ["background", "cat", "dog", "cow"]
    model = torch.nn.Conv2d(3, 4, 1).requires_grad_(False)
    model.weight.copy_(torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(fakes, "load_model",
                        lambda *_: (model, {"classes": names, "crop": 12,
                                            "inversion": {"steps": 2, "sizes": [12]}}))
    def watched(model, targets, *args, **options):
        made.append((targets, invert(model, targets, *args, **options)))
        return made[-1][1]
    monkeypatch.setattr(fakes, "invert", watched)
    command = ["--checkpoint", "any.pth", "--out", f"{tmp_path}/figure.png", "--r", "0.5,5",
               "--classes", "cow", "cat,dog"]
    shares = fakes.main([*command, "--images", "5"])
    asked = [[1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 1]]
    for (targets, x), found in zip(made, shares.values(), strict=True):
        assert targets.tolist() == asked and len(set(found.values())) == 4
        for c, name in enumerate(names):
            share = [(model(x[i:i + 1]).argmax(1) == c).float().mean().item() for i in range(5)
                     if asked[i][c]]
            assert found[name] == pytest.approx(sum(share) / len(share), abs=6e-4)
    with pytest.raises(InputError, match="--images 1: fewer than the 2 sets of --classes"):
        fakes.main([*command, "--images", "1"])
    monkeypatch.setattr(fakes, "invert", lambda *a, **k: torch.full((5, 3, 12, 12), math.nan))
    with pytest.raises(FloatingPointError, match="r = 0.5: a pixel is not finite"):
        fakes.main([*command, "--images", "5"])


def test_fakes_are_judged_class_by_class_as_in_a_naive_count(tmp_path, capsys):
    class Stripes(nn.Module):
        """Class k where the red channel says so, with probability 0.7, else background."""
        def __init__(self, order):
            super().__init__()
            self.order, self.weight = order, nn.Parameter(torch.zeros(1))
        def forward(self, x):
            red = ((x[:, 0] * data.STD[0] + data.MEAN[0]) * 255 / 40).round().long()
            p = torch.full((len(x), 3, *x.shape[2:]), 0.15)
            return p.scatter_(1, torch.tensor(self.order)[red][:, None], 0.7).log()
    picture = lambda *columns: Image.fromarray(
        np.repeat(np.array(columns, np.uint8)[None, :, None] * 40, 3, 2).repeat(4, 0))
    for name, columns in (("0", (1, 1, 0, 0)), ("1", (2, 0, 0, 0)), ("2", (1, 0, 0, 0))):
        picture(*columns).save(tmp_path / f"{name}.png")
    asked = {"0.png": [0, 1], "1.png": [0, 1, 2], "2.png": [0, 1]}
    lines = [{"file": name, "classes": classes,
              "sha256": run_module.sha256((tmp_path / name).read_bytes())}
             for name, classes in asked.items()]
    lines = [{**line, "line": run_module.sha256(json.dumps(line))} for line in lines]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make_folder(tmp_path / "real", train=6, val=1)
    dataset = data.load("folder", tmp_path / "real", "train")
    names = dataset.classes[:3]
    teacher, judge = (Stripes([0, 1, 2]), names), (Stripes([0, 1, 0]),
                                                   [names[0], names[1], "other", names[2]])
    run_module.write_json(tmp_path / "plan.json",
                          {"num_images": 3, "model": fakes.digest(teacher[0])})
    scores = fakes.judge_fakes(tmp_path, teacher, dataset, judge)
    masks = [np.array(dataset.read(i)[1]) for i in range(len(dataset))]
    real_sizes = [np.mean([(m == c).mean() for m in masks if (m == c).any()]) for c in (1, 2)]
    assert scores[names[1]] == pytest.approx({"images": 3, "found": 2 / 3, "sure": 0.7,
                                              "size": (0.5 + 0.25) / 2,
                                              "real size": real_sizes[0], "judge found": 2 / 3,
                                              "judge IoU": 1.0}, abs=1e-5)
    assert scores[names[2]] == pytest.approx({"images": 1, "found": 1.0, "sure": 0.7, "size": 0.25,
                                              "real size": real_sizes[1], "judge found": 0.0,
                                              "judge IoU": 0.0}, abs=1e-5)
    assert fakes.judge_fakes(tmp_path, teacher,
                             dataset)[names[2]].keys() == {"images", "found", "sure", "size",
                                                           "real size"}
    evaluation.print_fakes(scores)
    assert f"| {names[2]} | 1 | 100.0 | 70.0 | 25.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"file": ', '{"file": "00000.png"}', "[]"])
def test_a_damaged_list_of_fakes_is_named(tmp_path, text):
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(InputError, match="holds no finished set"):
        fakes.judge_fakes(tmp_path, (tiny((3,)), ["background"]), None)


def test_a_part_of_the_fakes_or_another_networks_are_not_judged(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    manifest = tmp_path / "run/fakes-step-2/manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:5]))
    with pytest.raises(InputError, match="holds no finished set"):
        evaluation.main([f"{tmp_path}/run", "--fakes", "2"])
    manifest.write_text("".join(lines))
    for name in ("plan.json", "manifest.jsonl"):
        shutil.copyfile(finished / "run/fakes-step-1" / name, manifest.with_name(name))
    for path in (finished / "run/fakes-step-1").glob("*.png"):
        shutil.copyfile(path, manifest.with_name(path.name))
    with pytest.raises(InputError, match="holds fakes of another network .*model"):
        evaluation.main([f"{tmp_path}/run", "--fakes", "2"])


def test_the_fakes_of_a_run_are_judged_by_a_command(finished, capsys):
    evaluation.main([f"{finished}/run", "--fakes", "2", "--judge", f"{finished}/run/step-2.pth"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| class | images | found") and "judge IoU" in table[0]
    assert table[-1].startswith("| mean |")
    for flags, problem in ((["--fakes", "9"], "step-8.pth"), (["--fakes", "0"], "1 and later"),
                           (["--fakes", "2", "--judge", f"{finished}/run/step-0.pth"],
                            "does not know")):
        with pytest.raises(InputError, match=problem):
            evaluation.main([f"{finished}/run", *flags])


def test_reused_fakes_are_made_once_per_class_and_matched_together_with_the_earlier_ones(
        finished, tmp_path, monkeypatch):
    inverted = spy(monkeypatch, fakes, "invert",
                   lambda net, targets, r, **options: (targets, options))
    views = spy(monkeypatch, train, "train_step", lambda student, objective, view, *_: view)
    flags = "--max-iters 2 --fake-sizes 16,32 --reuse-fakes"
    train_on(finished, tmp_path / "run", flags)
    (first, of_first), (second, of_second) = inverted
    assert first.shape == (8, 2) and (first == 1).all() and of_first["others"] is None
    assert second.tolist() == [[1, 0, 1]] * 8               # cat's are there, dog's are new
    step_1, step_2 = (sorted(tmp_path.glob(f"run/fakes-step-{step}/*.png")) for step in (1, 2))
    assert [view.fakes for view in views] == [[], step_1, step_1 + step_2]
    teacher, _ = model.load_model(tmp_path / "run/step-1.pth")
    images = torch.stack([data.normalised(fakes.read_pixels(path)) for path in step_1])
    for size in (16, 32):
        number, statistics = of_second["others"][size]
        expected = seginversion.statistics_of(teacher, [images], size)
        assert number == expected[0] == 8
        torch.testing.assert_close(statistics, expected[1])
    # one of two new batches is matched with half of the weight of the earlier ones
    assert fakes.statistics_beside(teacher, step_1, [16], 2)[16][0] == 4
    fakes_of_step_1, donor = tmp_path / "run/fakes-step-1", tmp_path / "donor"
    (fakes_of_step_1 / "00000.png").write_bytes(b"")
    for name in ("step-2.pth", "step-2.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(InputError, match="fakes-step-1 holds no finished set"):
        train_on(finished, tmp_path / "run", flags)
    for more, differing in (("--seed 7", "model"), ("--fake noise", "sizes, steps, spectrum"),
                            ("--r max", "r")):              # another run's are not this one's
        train_on(finished, donor, f"{flags} {more} --step0 {tmp_path}/run/step-0.pth"
                 if differing != "model" else f"{flags} {more}")
        shutil.rmtree(fakes_of_step_1)
        shutil.move(donor / "fakes-step-1", fakes_of_step_1)
        shutil.rmtree(donor)
        with pytest.raises(InputError, match=rf"another network .*\({differing}\); copy it from"):
            train_on(finished, tmp_path / "run", flags)


def test_sixteen_fakes_are_inverted_together_in_passes_of_a_batch(
        finished, tmp_path, monkeypatch):
    calls = spy(monkeypatch, fakes, "invert",
                lambda net, targets, r, part, **_: (len(targets), part))
    for flags, expected in (("", [(8, 4)]), ("--fake-batch 6 --num-fakes 20", [(12, 6)] * 2),
                            ("--fake-batch 18 --num-fakes 20", [(18, 18)] * 2)):
        train_on(finished, tmp_path / f"run{flags}".replace(" ", ""), f"--task 2-1 --max-iters 1 "
                 f"{flags}")
        assert calls == expected
        calls.clear()


@pytest.mark.parametrize("fakes_of_step_1, sizes, expected", [
    (64, (15, 1, 1), [0, 64, 5]), (300, (10, 5, 2), [0, 300, 150]), (8, (1, 1, 1), [0, 8, 8])])
def test_reused_fakes_are_as_many_a_class_as_in_the_first_step(fakes_of_step_1, sizes, expected):
    args = train.parse(["--num-fakes", str(fakes_of_step_1), "--fake-batch", "4", "--reuse-fakes"])
    steps = [[0] * n for n in sizes]
    assert [train.number_of_fakes(args, t, [100] * 3, steps) for t in range(3)] == expected
    assert train.number_of_fakes(args, 2, [100, 100, 0], steps) == expected[2]  # in a smoke run
    assert train.number_of_fakes(args, 0, [100, 100, 0], steps) == 0
    assert train.number_of_fakes(train.parse(["--no-reuse-fakes"]), 2, [9, 9, 0], steps) == 0
    args = train.parse("--dataset voc --fake-batch 5".split())      # as many as real ones, to 1024
    assert [train.number_of_fakes(args, 1, [0, n], steps) for n in (8, 2000)] == [10, 1025]


def test_a_damaged_fake_is_made_again_and_the_others_stay(tmp_path, monkeypatch):
    paths, calls = make_fakes(tmp_path), spy(monkeypatch, fakes, "invert")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for damage in (lambda: paths[5].write_bytes(before[paths[5].name][:-1]),
                   lambda: paths[9].unlink()):
        damage()
        calls.clear()
        make_fakes(tmp_path)
        assert len(calls) == 1                              # its batch alone
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "manifest.jsonl").write_text("{")
    make_fakes(tmp_path)
    assert len(calls) == 4 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ------------------------------------------------------------------ run.py and train.py, end to end

@pytest.mark.parametrize("flags, sentence", [
    ("--dataset voc --data-root nowhere",
     r"--data-root nowhere: no such folder; `python data.py voc --data-root nowhere`"),
    ("--dataset folder", "--task: a folder needs one"),
    ("--batch-size 1", "--batch-size 1: must be a number from 2 to 1000000"),
    ("--batch-size 2 --real-fake 1:9", "--real-fake 1:9: leaves no real"),
    ("--real-fake half", "--real-fake half: expected two numbers"),
    ("--r -1", "--r -1: expected random"),
    ("--r big", "--r big: expected random"),
    ("--fake-sizes 32,16,64", "--fake-sizes 32,16,64: expected growing sizes"),
    ("--r 1e38", "--r 1e38: expected random"),
    ("--split-dir=", "--split-dir: empty"),
    ("--fake-sizes 8,64", "--fake-sizes 8,64: expected"),
    ("--fake-sizes 32", "--fake-sizes 32: expected growing sizes, from 16 on, which end with "
     "--crop, 64"),
    ("--fake-sizes 50.5,64", "--fake-sizes 50.5,64: expected"),
    ("--fake-sizes 1,1/2", "--fake-sizes 1,1/2: expected"),
    ("--fake-sizes 1/2,1/0", "--fake-sizes 1/2,1/0: expected"),
    ("--fake-sizes 1/2,2/3", "--fake-sizes 1/2,2/3: expected"),
    ("--crop 8", "--crop 8: must be a number from 16 to 10000"),
    ("--lr -1", "--lr -1.0: must be"), ("--lr0 nan", "--lr0 nan: must be"),
    ("--lam -1", "--lam -1.0: must be"),
    ("--fake-lr inf", "--fake-lr inf: must be"), ("--seed -1", "--seed -1: must be"),
    ("--workers -1", "--workers -1: must be"),
])
def test_bad_flags_end_with_one_sentence_and_exit_code_2(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("train.py"):
        train.main(f"{flags} --out {tmp_path}/run".split())
    assert stop.value.code == 2
    assert re.match("train.py: " + sentence, capsys.readouterr().err.strip().splitlines()[-1])


def test_a_run_leaves_everything_it_promises(finished):
    run = finished / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {".lock", "settings.json", "log.jsonl", "results.json", "predictions.png",
                     "report.html"} | {
        f"step-{t}.{e}" for t in range(3)
        for e in ("pth", "json")} | {f"fakes-step-{t}{e}" for t in (1, 2) for e in ("", ".png")}
    strict = lambda text: json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    log = [strict(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert "command" in log[0]
    losses = [line for line in log if "iteration" in line]
    assert {"loss", "kd", "seg", "images/s", "eta", "data_wait", "lr"} <= losses[-1].keys()
    assert losses[-1]["loss"] == pytest.approx(losses[-1]["kd"] + losses[-1]["seg"], rel=1e-3)
    assert "kd" not in losses[0] and losses[0]["step"] == 0
    results = strict((run / "results.json").read_text())
    assert len(results["steps"]) == 3 and set(results["final"]) == set(evaluation.CONVENTIONS)
    assert results["steps"][2]["seconds"].keys() == {"seginversion", "training", "evaluation"}
    assert list(results["steps"][1]["iou"]) == ["background", "cat", "dog"]
    assert results["settings"]["crop"] == 32 and results["versions"]["torch"] == torch.__version__
    assert [len(s["confusion"]) for s in results["steps"]] == [2, 3, 4]
    assert model.load_model(run / "step-2.pth")[1]["classes"] == ["background", "cat", "dog", "cow"]


def test_resume_equals_uninterrupted_also_in_the_middle_of_an_epoch_and_of_a_synthesis(
        finished, tmp_path, monkeypatch):
    command = f"{COMMON} --data-root {finished}/data --epochs 2 --out {tmp_path}/run".split()
    # two of them inside an epoch
    stops = {("hrhf", 4), ("invert", 2), ("hrhf", 12), ("evaluate", 2)}
    stop_at(monkeypatch, stops, ("METHODS", "hrhf"), (fakes, "invert"), (train, "evaluate"))
    interruptions = 0
    for _ in range(len(stops) + 1):
        try:
            train.main(command)
        except KeyboardInterrupt:
            interruptions += 1
            if interruptions == 1:                          # in step 0's second epoch
                state = torch.load(tmp_path / "run/last.pth", weights_only=True)
                state["seconds"]["training"] += 1000
                torch.save(state, tmp_path / "run/last.pth")
    assert interruptions == len(stops) and (tmp_path / "run/results.json").exists()
    for t in range(3):
        assert same_weights(finished / f"run/step-{t}.pth", tmp_path / f"run/step-{t}.pth")
    old, new = (json.loads((r / "run/results.json").read_text()) for r in (finished, tmp_path))
    assert [s["confusion"] for s in old["steps"]] == [s["confusion"] for s in new["steps"]]
    assert old["final"] == new["final"]
    seconds = [step["seconds"]["training"] for step in new["steps"]]
    assert seconds[0] > 1000 > seconds[1]                   # of all launches


def test_the_seconds_of_a_phase_add_up(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        with run.timed("phase"):
            pass
        run.seconds["phase"] += 5
    assert 10 < run.seconds["phase"] < 11


def test_settings_are_fixed_from_the_first_write_but_the_data_may_move_and_hidden_files_stay(
        finished, tmp_path):
    command = f"{COMMON} --data-root {finished}/data --epochs 1 --fake none --out {tmp_path}/run"
    with pytest.raises(InputError, match="--pretrained typo.pth: no such file"):
        train.main(command.replace("tiny --pretrained none",
                                   "resnet18 --pretrained typo.pth").split())
    assert not (tmp_path / "run").exists()                  # a typo can be corrected
    run = Run(tmp_path / "run")
    settings = {"dataset": "x", "data": "y", "step0": None, "lr": 1}
    run.claim(settings)
    run.lock.close()
    with pytest.raises(InputError, match="--lr is 1 there and 2 here"):
        Run(tmp_path / "run").claim({**settings, "lr": 2})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run/notes").mkdir(parents=True)
    killed, *mine = (tmp_path / "run" / name
                     for name in (".last.pth.1.tmp", ".draft.tmp", "notes/.last.pth.1.tmp"))
    for path in (killed, *mine):
        path.write_text("left by a killed process, or somebody else's")
    train.main(command.split())
    assert not killed.exists() and all(path.exists() for path in mine)
    shutil.copytree(finished / "data", tmp_path / "moved")
    moved = command.replace(f"{finished}/data", f"{tmp_path}/moved").split()
    train.main(moved)


def test_a_change_of_the_data_under_a_run_is_refused(finished, tmp_path):
    for t in range(3):
        np.save(tmp_path / f"train-{t}.npy", np.arange(t, 24, 3))
    flags = f"--max-iters 1 --fake none --split-dir {tmp_path}"
    train_on(finished, tmp_path / "run", flags)
    for change in ("classes", "pixels", "ids", "label", "list"):
        root = tmp_path / change
        shutil.copytree(finished / "data", root)
        image, mask = root / "JPEGImages/train3.jpg", root / "SegmentationClass/train3.png"
        if change == "classes":
            (root / "classes.txt").write_text("background\ndog\ncat\ncow\n")
        elif change == "pixels":
            Image.eval(Image.open(image), lambda v: 255 - v).save(image)
        elif change == "ids":                               # two of one class: the labels stay
            listing = root / "ImageSets/Segmentation/train.txt"
            names = listing.read_text().split()
            names[0], names[3] = names[3], names[0]
            listing.write_text("\n".join(names))
        elif change == "label":
            Image.fromarray(np.roll(np.array(Image.open(mask)), 1)).save(mask)
        else:
            np.save(tmp_path / "train-2.npy", np.arange(2, 12, 3))
        with pytest.raises(InputError, match="its classes, images or labels have changed"):
            train_on(finished, tmp_path / "run", f"{flags} --data-root {root}")


def test_a_shared_step_0_gives_the_run_it_was_trained_in_and_a_foreign_one_is_refused(
        finished, tmp_path):
    command = (f"{COMMON} --data-root {finished}/data --epochs 2 "
               f"--step0 {finished}/run/step-0.pth --out {tmp_path}")
    train.main(f"{command}/run".split())
    scores = [json.loads((folder / "results.json").read_text())
              for folder in (finished / "run", tmp_path / "run")]
    assert scores[0]["final"] == scores[1]["final"]
    assert scores[0]["steps"][0]["confusion"] == scores[1]["steps"][0]["confusion"]
    assert not any("of" in line and line["step"] == 0 for line in read_log(tmp_path / "run"))
    for flags, what in (("--task 2-1", "classes"), ("--backbone resnet18", "backbone"),
                        ("--crop 64", "crop")):
        with pytest.raises(InputError, match=f"its {what} differ"):
            train.main(f"{command}/other {flags}".split())
    assert not (tmp_path / "other/step-0.pth").exists()


def test_finished_steps_copied_into_another_run_folder_are_built_upon(finished, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("step-0.pth", "step-0.json", "step-1.pth", "step-1.json"):
        (tmp_path / "run" / name).write_bytes((finished / "run" / name).read_bytes())
    with pytest.raises(InputError, match="fakes-step-1 holds no finished .*; copy it from where "
                                         "step-1.pth is from, .* with --no-reuse-fakes"):
        train_on(finished, tmp_path / "run", "--epochs 2 --lam 0")
    shutil.copytree(finished / "run/fakes-step-1", tmp_path / "run/fakes-step-1")
    train_on(finished, tmp_path / "run", "--epochs 2 --lam 0")
    log = read_log(tmp_path / "run")
    assert {line["step"] for line in log if "step" in line} == {2}
    assert len(json.loads((tmp_path / "run/results.json").read_text())["steps"]) == 3


@pytest.mark.parametrize("name, sentence", [
    ("last.pth", "last.pth: damaged, or no file of train.py; remove it, and step 1 starts over"),
    ("step-0.pth",
     "step-0.pth: damaged, or no file of train.py; remove it, its .json, those of later"),
    ("settings.json",
     "settings.json: damaged; if this command is the one that made this run, remove"),
    ("fakes-step-1/plan.json", "plan.json: damaged; remove"),
])
def test_a_damaged_file_in_a_run_folder_is_named(finished, tmp_path, capsys, name, sentence):
    (tmp_path / "run/fakes-step-1").mkdir(parents=True)
    for keep in ("step-0.pth", "step-0.json", "settings.json"):
        (tmp_path / "run" / keep).write_bytes((finished / "run" / keep).read_bytes())
    (tmp_path / "run" / name).write_bytes(b"[1")
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("train.py"):
        train_on(finished, tmp_path / "run", "--epochs 2")
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_an_out_that_cannot_be_a_folder_is_named(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("train.py"):
        train.main(f"{COMMON} --data-root {finished}/data --out {tmp_path}/file/run".split())
    assert stop.value.code == 2 and str(tmp_path / "file") in capsys.readouterr().err


def test_a_step_without_images_is_refused_before_training_but_passed_over_in_a_smoke_run(tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "classes.txt").write_text("background\ncat\ndog\nunicorn\ncow\n")
    for path in (root / "SegmentationClass").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 3, 4, mask).astype(np.uint8)).save(path)
    command = f"{COMMON} --data-root {root} --out {tmp_path}/run"
    with pytest.raises(InputError, match=r"step 2 of task 1-1 \(disjoint\) has no training images"):
        train.main(command.split())
    assert not (tmp_path / "run/step-0.pth").exists()
    train.main(f"{command} --max-iters 1".split())
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log if "warning" in line] == [2] and "unicorn" in str(log)
    assert model.load_model(tmp_path / "run/step-3.pth")[0].classes_per_step == [2, 1, 1, 1]
    made = lambda run: sorted(path.name for path in tmp_path.glob(f"{run}/fakes-step-?"))
    assert made("run") == ["fakes-step-1", "fakes-step-2", "fakes-step-3"]      # for later steps
    train.main(f"{command}-anew --max-iters 1 --no-reuse-fakes".split())
    assert made("run-anew") == ["fakes-step-1", "fakes-step-3"]


def test_a_weight_that_is_not_finite_after_the_last_iteration_is_not_saved(
        finished, tmp_path, monkeypatch):
    # a finite loss, 0, with a gradient that is none: the root's is infinite there
    broken = lambda logits, *_, lam: {"seg": logits.mul(0).sum().sqrt()}
    row = methods.METHODS["hrhf"]._replace(terms=broken, of_labelled=())
    monkeypatch.setitem(methods.METHODS, "hrhf", row)
    with pytest.raises(FloatingPointError, match="step 0: a weight is not finite"):
        train_on(finished, tmp_path / "run", "--max-iters 1")
    assert not (tmp_path / "run/step-0.pth").exists()


def test_a_run_folder_with_other_settings_is_refused_with_their_names(finished, capsys):
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("train.py"):
        train_on(finished, finished / "run", "--epochs 2 --lam 0.5 --r max")
    assert stop.value.code == 2
    sentence = capsys.readouterr().err
    assert "--lam is 1.0 there and 0.5 here" in sentence
    assert "--r is random there and max here" in sentence
    assert "--epochs" not in sentence


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_named_terms(
        finished, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("train.py"):
        train_on(finished, tmp_path / "run", "--epochs 9 --lr0 1e30")
    assert stop.value.code == 2
    assert re.match(r"train.py: step 0, iteration 2 of 18: a loss is not finite: "
                    r"\{'seg': (nan|inf)\}", capsys.readouterr().err)
    assert not (tmp_path / "run/step-0.pth").exists()


@pytest.mark.parametrize("flags", ["--fake none", "--amp", "--r avg --real-fake 2:1 --lam 0",
                                   "--setting overlapped --r 5 --real-fake 1:3"])
def test_every_ablation_flag_runs_and_changes_the_outcome(finished, tmp_path, flags):
    train_on(finished, tmp_path / "run", f"--epochs 2 {flags}")
    assert (tmp_path / "run/results.json").exists()
    assert not same_weights(finished / "run/step-2.pth", tmp_path / "run/step-2.pth")
    pools = len(list((tmp_path / "run").glob("fakes-step-*/manifest.jsonl")))
    assert pools == (0 if flags == "--fake none" else 2)


def test_the_recipe_is_mibs_and_every_step_has_the_right_teacher_seeds_and_numbers(
        finished, tmp_path, monkeypatch):
    optimizers = spy(monkeypatch, torch.optim, "SGD", lambda parameters, **options: options)
    losses = spy(monkeypatch, methods.Objective, "loss", lambda self, student, images, labels: (
        None if self.teacher is None else copy.deepcopy(self.teacher.state_dict()), labels,
        student.training, self.lam))
    pools = spy(monkeypatch, train, "synthesize", lambda net, folder, n, **options: (n, options))
    loaders = spy(monkeypatch, data, "train_batches", lambda *a: a)
    starts = spy(monkeypatch, model.DeepLabV3, "add_classes", lambda net, n, init: (n, init))
    train_on(finished, tmp_path / "run", "--epochs 2 --epochs0 3 --lr0 0.02 --lr 0.01 --lam 0 "
             "--void ignore --num-fakes 5 --fake noise --init random")
    assert starts == [(1, "random")] * 2
    same = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    assert optimizers == [{"lr": 0.02, **same}, {"lr": 0.01, **same}, {"lr": 0.01, **same}]
    lines = [line for line in read_log(tmp_path / "run") if "iteration" in line]
    # 8 real images a step, by 4, then by 2
    assert {(line["step"], line["of"]) for line in lines} == {(0, 6), (1, 8), (2, 8)}
    for line in lines:
        lr0 = 0.02 if line["step"] == 0 else 0.01
        assert line["lr"] == pytest.approx(
            lr0 * (1 - line["iteration"] / line["of"]) ** 0.9, rel=1e-3, abs=1e-9)
        assert line.get("kd", 0) == 0                       # --lam 0
    for k, (teacher, labels, training, lam) in enumerate(losses):
        step = (k >= 6) + (k >= 14)
        assert training and lam == 0 and (teacher is None) == (step == 0)
        if step:
            saved = torch.load(tmp_path / f"run/step-{step - 1}.pth", weights_only=True)["model"]
            assert all(torch.equal(saved[name], value) for name, value in teacher.items())
    assert any((labels == 255).any() for _, labels, _, _ in losses)            # --void ignore
    assert [number for number, _ in pools] == [8, 8]        # 5, rounded up to whole batches of 4
    assert all(options["steps"] == options["spectrum"] == 0 for _, options in pools)
    assert pools[0][1]["seed"] != pools[1][1]["seed"]
    # fakes of step 1 are there in step 2, too
    assert [a[:4] for a in loaders] == [(8, 0, 4, 0), (8, 8, 2, 2), (8, 16, 2, 2)]
    assert len({a[5] for a in loaders}) == 3


def test_batch_parts_and_the_paper_scale_defaults():
    args = train.parse("--dataset voc --task 15-1".split())
    assert (args.backbone, args.pretrained, args.crop, args.batch_size, args.epochs,
            args.epochs0) == (
        "resnet101", "imagenet", 512, 24, 30, 30)
    assert (args.lr0, args.lr, args.lam) == (1e-2, 1e-3, 1)
    assert train.parse(["--dataset", "ade"]).epochs == 60
    assert train.parse([]).task == "15-1" and train.parse([]).dataset == "shapes"
    assert not args.reuse_fakes and train.parse([]).reuse_fakes
    # a flag beats the data set's own default
    assert train.parse("--crop 32".split()).crop == 32
    assert train.batch_parts(args, 0) == (24, 0) and train.batch_parts(args, 1) == (12, 12)
    for ratio, parts in (("1:2", (8, 16)), ("2:1", (16, 8))):
        args.real_fake = ratio
        assert train.batch_parts(args, 1) == parts
    args.fake = "none"
    assert train.batch_parts(args, 1) == (24, 0)


def test_small_is_defaults_that_a_flag_beats_and_a_step_has_at_least_min_iters():
    args = train.parse("--dataset folder --task 4-1 --small --crop 128".split())
    assert (args.backbone, args.batch_size, args.crop, args.fake_steps) == ("mobilenet_v2", 16, 128,
                                                                            190)
    assert args == train.parse(["--dataset", "folder", "--task", "4-1", "--crop", "128", *(
        f"--{name.replace('_', '-')}={value}" for name, value in train.SMALL.items()
        if name != "crop")])
    assert train.parse(["--small"]).backbone == "tiny"      # shapes are small already
    # 30 epochs: of 20 real images a batch of 16 in step 0, of 8 in step 1
    assert [train.step_length(args, step, 20) for step in (0, 1)] == [(1, 300), (2, 300)]
    assert train.step_length(args, 0, 160) == (10, 300) and train.step_length(args, 0, 176) == (11,
                                                                                                330)


def test_a_step_of_short_epochs_is_saved_thirty_times_and_goes_on_from_there(
        finished, tmp_path, monkeypatch):
    saved = spy(monkeypatch, train, "write_atomically", lambda path, do: path.name)
    flags = "--task 1-2 --method ft --epochs 1 --min-iters 90"      # epochs of 2 and 4 iterations
    train_on(finished, tmp_path / "a", flags)
    assert saved == ["last.pth"] * (30 + 23)
    stop_at(monkeypatch, {("ft", 11)}, ("METHODS", "ft"))
    with pytest.raises(KeyboardInterrupt):
        train_on(finished, tmp_path / "b", flags)
    monkeypatch.undo()
    train_on(finished, tmp_path / "b", flags)
    assert [line["resumed_at"] for line in read_log(tmp_path / "b") if "resumed_at" in line] == [9]
    assert same_weights(tmp_path / "a/step-1.pth", tmp_path / "b/step-1.pth")


def test_the_scan_is_one_line_that_stays_on_a_terminal(tmp_path, monkeypatch, capsys):
    dataset = data.load("folder", make_folder(tmp_path, 3, 1), "train")
    clock = iter(range(0, 99, 3))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    dataset.scan()
    assert capsys.readouterr().err.splitlines() == [f"scanning: {n} of 3" for n in (1, 2, 3)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset.scan()
    assert capsys.readouterr().err == "".join(
        f"\r\x1b[Kscanning: {n} of 3" for n in (1, 2, 3)) + "\r\x1b[K"


def test_the_command_line_runs_a_whole_task_with_two_processes(finished, tmp_path):
    code, out, err = run_script(*TORCHRUN, "train.py", *COMMON.split(), "--data-root",
                                f"{finished}/data", "--epochs", "2",
                                "--setting", "overlapped", "--out", f"{tmp_path}/run")
    assert code == 0, err
    assert out.rstrip().splitlines()[-4].startswith("| background excluded |")
    # rank 0 alone speaks
    assert sum('"command"' in line for line in out.splitlines()) == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["processes"] == 2 and len(results["steps"]) == 3
    # two ranks score what one would: eval.py, one process, on the same checkpoints
    code, out, err = run_script(sys.executable, "eval.py", f"{tmp_path}/run")
    assert code == 0, out + err
    assert out.count("exactly as recorded") == 3


def test_training_shows_importances_the_tasks_gradient_alone_and_adds_lam_times_their_penalty(
        tmp_path):
    student, tasks, seen, penalties = tiny((3,)), [], [], []
    class Spy:
        omega = {"something": 1}
        def __init__(self, model, teacher, state):
            assert model is student and teacher is state is None
        def update(self, model):
            seen.append([p.grad.clone() for p in model.parameters()])
        def penalty(self, model):
            penalties.append(sum(p.square().sum() for p in model.parameters()))
            return penalties[-1]
        def state_dict(self):
            return {}
    class Watched(methods.Objective):
        def loss(self, student, images, labels):
            loss = student(images)[:, 0].square().mean()
            tasks.append(torch.autograd.grad(loss, list(student.parameters()), retain_graph=True))
            return loss, {"ce": loss.detach()}
    row = methods.Method(methods.ft_loss, 0.0, uses_teacher=False, importance=Spy,
                         objective=Watched)
    view = data.View(data.Shapes("val"), range(8), protocol.label_map([[1, 2]], 0, "train"),
                     data.train_transform(32))
    args = train.parse("--crop 32 --batch-size 4 --max-iters 3 --lr0 1e-4 --lam 7 "
                       "--workers 0".split())
    before = [p.detach().clone() for p in student.parameters()]
    train.train_step(student, row.objective_of(student, None, args.lam), view, 0, args,
                     Run(tmp_path), World())
    torch.testing.assert_close(seen, [list(t) for t in tasks])
    assert len(seen) == len(penalties) == 3
    logged = read_log(tmp_path)                             # lines at iterations 2 and 3
    means = np.average([line["penalty"] for line in logged], weights=[2, 1])
    assert means == pytest.approx(7 * np.mean([p.item() for p in penalties]), rel=1e-3)
    assert logged[0]["loss"] == pytest.approx(logged[0]["ce"] + logged[0]["penalty"], rel=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_every_method_runs_all_steps_and_resumes_to_the_same_network(
        finished, tmp_path, monkeypatch, method):
    command = f"{COMMON} --data-root {finished}/data --epochs 2 --method {method}"
    last = 0 if method == "joint" else 2
    train.main(f"{command} --out {tmp_path}/a".split())
    real = methods.METHODS[method]
    stop_at(monkeypatch, {(method, 9)}, ("METHODS", method))
    with pytest.raises(KeyboardInterrupt):
        train.main(f"{command} --out {tmp_path}/b".split())
    train.main(f"{command} --out {tmp_path}/b".split())
    assert same_weights(tmp_path / f"a/step-{last}.pth", tmp_path / f"b/step-{last}.pth")
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert len(results["steps"]) == last + 1 and results["settings"]["lam"] == real.lam
    final = results["final"]["background excluded"]
    assert final["old"] is not None and final["new"] is not None and len(final["per_step"]) == 3
    log = read_log(tmp_path / "a")
    terms = {k for line in log if line.get("step") == last and "iteration" in line for k in line}
    assert ("penalty" in terms) == (method in ("ewc", "pi", "rw"))
    assert bool(list((tmp_path / "a").glob("fakes-step-*"))) == (method == "hrhf")
    evaluation.main([f"{tmp_path}/a"])


@pytest.mark.parametrize("method", ["pi", "lwf-mc"])
def test_a_method_with_a_step_0_of_its_own_refuses_another_methods(finished, tmp_path, method):
    for name in ("step-0.pth", "step-0.json"):
        (tmp_path / name).write_bytes((finished / "run" / name).read_bytes())
    with pytest.raises(InputError,
                       match=f"step-0.pth was trained with --method hrhf, and {method} needs"):
        train.main(f"{COMMON} --data-root {finished}/data --max-iters 1 --method {method} "
                   f"--out {tmp_path}".split())


def parallel_work(folder, world):
    """What must not depend on the number of ranks: a score, a pool of fakes, a trained step."""
    torch.set_num_threads(1)
    student, teacher = tiny((3, 1)), tiny((3,), seed=1).eval().requires_grad_(False)
    val, real = (data.load("folder", folder / "data", split) for split in ("val", "train"))
    table = protocol.label_map([[1, 2], [3]], 1, "test")
    view, logged = data.View(val, range(7), table, data.test_transform(32)), []
    confusion = evaluation.evaluate(student.train(), view, world, batch_size=2)
    paths = fakes.synthesize(teacher, folder / f"fakes-{world.size}", 10, sizes=[32], batch_size=2,
                             seed=3,
                             world=world, steps=2, report=logged.append)
    assert len(logged) == len(range(world.rank, 5, world.size))                # of five batches
    class InEvaluationMode(methods.Objective):              # SyncBatchNorm has no CPU form
        def loss(self, student, images, labels):
            assert len(images) == 4 // world.size
            return super().loss(student.eval(), images, labels)
    row = methods.METHODS["hrhf"]._replace(objective=InEvaluationMode, importance=methods.RW)
    table = protocol.label_map([[1, 2], [3]], 1, "train", "ignore")
    view = data.View(real, range(8), table, data.train_transform(32), paths)
    args = train.parse("--crop 32 --batch-size 4 --max-iters 5 --lr 0.05 --workers 0".split())
    objective = row.objective_of(student, teacher, 1.0, methods.RW(teacher).state_dict())
    for name, p in teacher.named_parameters():              # something to penalise
        objective.importance.omega[name] = torch.linspace(0, 1, p.numel()).view_as(p)
    run = Run(folder / f"run-{world.size}", world)
    run.folder.mkdir(exist_ok=True)
    train.train_step(student, objective, view, 1, args, run, world)
    weights = {**student.state_dict(),
               **{f"F {k}": v for k, v in objective.importance.fisher.items()}}
    shared = [torch.tensor(float(world.rank + 1)), world.from_rank_0(world.rank)]
    assert world.sum(shared[0]) == world.size * (world.size + 1) / 2 and shared[1] == 0
    torch.save((confusion, weights), folder / f"work-{world.rank}-of-{world.size}.pt")


def rank_process(rank, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2,
                                         init_method=f"file://{folder}/rendezvous")
    parallel_work(folder, World(rank, 2))
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_in_score_fakes_losses_and_trained_weights(tmp_path):
    make_folder(tmp_path / "data", train=8, val=7)
    torch.multiprocessing.spawn(rank_process, (tmp_path,), nprocs=2)
    threads = torch.get_num_threads()
    try:
        parallel_work(tmp_path, World())
    finally:
        torch.set_num_threads(threads)
    (one, weights), *two = [torch.load(tmp_path / f"work-{name}.pt")
                            for name in ("0-of-1", "0-of-2", "1-of-2")]
    assert one.sum() > 0
    assert not torch.equal(weights["classifiers.1.weight"],
                           tiny((3, 1)).state_dict()["classifiers.1.weight"])
    for confusion, also in two:
        assert torch.equal(confusion, one)
        torch.testing.assert_close(also, weights, rtol=1e-4, atol=1e-6)
    losses = [[event["loss"] for event in read_log(tmp_path / f"run-{n}")] for n in (1, 2)]
    # an epoch is 4 iterations
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    for path in (tmp_path / "fakes-1").iterdir():
        assert path.read_bytes() == (tmp_path / "fakes-2" / path.name).read_bytes(), path.name


def test_real_replay_trains_on_real_images_of_earlier_steps_and_its_folder_is_its_own(
        finished, tmp_path):
    command = f"{COMMON} --data-root {finished}/data --max-iters 1 --out {tmp_path}/run".split()
    train.main(command, real_replay=True)                   # as many as fakes, made once: 8, 8 + 8
    train_set = data.load("folder", finished / "data", "train")
    v2 = torchvision.transforms.v2
    crop = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
    for step in (1, 2):
        old = [i for i, ids in enumerate(train_set.labels()) if set(ids) & set(range(1, step + 1))
               and not set(ids) & set(range(step + 1, 4))]
        allowed = {np.array(crop(train_set.read(i)[0])).tobytes() for i in old}
        paths = sorted((tmp_path / f"run/fakes-step-{step}").iterdir())
        assert len(paths) == 8 * step
        assert {np.array(Image.open(p)).tobytes() for p in paths} <= allowed
    with pytest.raises(InputError, match="--fake is real there and seginversion here"):
        train.main(command)
    command[-1] += "-anew"
    train.main([*command, "--no-reuse-fakes"], real_replay=True)
    assert [len([*tmp_path.glob(f"run-anew/fakes-step-{t}/*.png")]) for t in (1, 2)] == [8, 8]


def test_fake_sizes_are_pixels_or_shares_of_the_crop():
    of = lambda flags: train.parse(flags.split()).fake_sizes
    assert of("--dataset voc") == [512] and of("--crop 32 --fake-sizes 1/3,2/3,1") == [16, 32]
    assert of("--crop 96 --fake-sizes 1/3,2/3,1") == [32, 64, 96]
    assert of("--crop 500 --fake-sizes 0.25,1") == [128, 500]
    assert of("--crop 96 --fake-sizes 40,96") == [40, 96]


def test_off_default_names_the_flags_that_make_a_run_another_method():
    of = lambda flags: train.off_default(train.parse(flags.split()))
    assert of("") == of("--dataset voc --task 15-5 --method mib --seed 3 --workers 2") == ""
    assert of("--dataset voc --pretrained weights.pth") == ""
    assert of("--dataset voc --pretrained none") == "--pretrained none"
    assert of("--dataset voc --backbone tiny --max-iters 2") == "--max-iters 2 --backbone tiny"
    assert of("--dataset voc --lam 0 --r avg --spectrum 1") == "--lam 0.0 --r avg --spectrum 1.0"
    assert of("--method mib --lam 1 --fake noise") == "--lam 1.0 --fake noise"
    assert [of(f"{method} --init random") for method in ("", "--method mib", "--method lwf")] == [
        "--init random", "--init random", ""]
    assert of("--dataset voc --crop 96 --reuse-fakes") == "--crop 96 --reuse-fakes"
    assert of("--dataset shapes --no-reuse-fakes") == "--no-reuse-fakes"
    assert of("--dataset voc --fake-sizes 1/2,1") == "--fake-sizes 256,512"


def test_one_process_owns_a_run_folder_from_its_first_write_to_its_end(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from run import Run; run = Run(sys.argv[1]); "
         "run.claim({'dataset': 'x', 'data': 'y', 'step0': None}); print('mine', flush=True); "
         "time.sleep(60)", str(tmp_path / "run")], cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match="in use by another process"):
            Run(tmp_path / "run").claim({"dataset": "x", "data": "y", "step0": None})
    finally:
        holder.kill()
        holder.wait()
    # the lock died with it
    Run(tmp_path / "run").claim({"dataset": "x", "data": "y", "step0": None})


def test_a_file_system_without_locks_does_not_keep_a_run_from_starting(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(run_module.fcntl, "lockf", lockf)
    run_module.lock(tmp_path)


@pytest.mark.parametrize("error, sentence", [
    (RuntimeError("CUDA out of memory. Tried"), "memory is short: lower --fake-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is short"),
    (MemoryError(), "memory is short"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers 0"),
    (RuntimeError("can't start new thread"), "too few processes"),
    (OSError(28, "No space left on device"), "the disk of the output, or /dev/shm"),
    (InputError("a\nb\x1b[31m.png: odd"), "x.py: ab[31m.png: odd\n"),
    (RuntimeError("unable to allocate shared memory(shm)"), "--shm-size"),
    (RuntimeError("[gloo] Connection closed by peer"), "another process of this run has ended"),
])
def test_short_resources_are_one_sentence_with_the_flag_that_helps(capsys, error, sentence):
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("x.py"):
        raise error
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"), run_module.plain_errors("x.py"):
        raise RuntimeError("a bug")                         # is not dressed up


def test_a_mask_changed_under_a_run_is_one_sentence_also_out_of_a_loaders_worker(tmp_path, capsys):
    dataset = data.load("folder", make_folder(tmp_path), "train")
    Image.new("L", (9, 9)).save(dataset.masks[0])
    view = data.View(dataset, [0], torch.arange(256, dtype=torch.uint8), data.test_transform(32))
    loader = torch.utils.data.DataLoader(view, sampler=[(0, 0)], num_workers=1)
    with pytest.raises(SystemExit), run_module.plain_errors("train.py"):
        next(iter(loader))
    assert re.fullmatch(rf"train.py: .{{0,9}}{dataset.masks[0]}: changed while the run was on\n",
                        capsys.readouterr().err)


def test_a_pipe_is_not_replaced_and_short_memory_does_not_call_a_file_damaged(
        tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.pth")
    assert run_module.contents(tmp_path / "pipe.pth") is None
    with pytest.raises(InputError, match="pipe.pth: not a regular file"):
        run_module.write_atomically(tmp_path / "pipe.pth", lambda p: p.write_text("x"))
    model.save_model(tiny((4, 2)), tmp_path / "c.pth", classes=["a"] * 6, **ABOUT)
    for error, kind, sentence in (
            (MemoryError(), MemoryError, None), (PermissionError(13, "denied"), InputError,
                                               "c.pth: cannot be read .denied."),
            (RuntimeError("can't allocate memory"), RuntimeError, "allocate")):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(kind, match=sentence):
            model.load_model(tmp_path / "c.pth")


@pytest.mark.parametrize("script", ["train", "eval", "fakes", "data", "report", "bench",
                                    "reproduce", "photographs"])
def test_ctrl_c_during_the_imports_is_no_traceback(script):
    process = subprocess.Popen([sys.executable, f"{script}.py", "--help"], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch_cpu" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")


def test_the_time_left_in_the_whole_run_is_by_forward_passes_and_what_was_measured():
    work = {(step, phase): passes for step in (0, 1) for phase, passes in
            zip(run_module.PHASES, (50 * step, 100, 10))}
    line = run_module.LiveLine(work)
    # half of step 0's training in 100 s: 2 s a pass, for all that comes: 10 + 50 + 100 + 10
    assert line.left(0, "training", 0.5, 100.0) == 100 + 2 * 170
    assert line.left(0, "scoring", 0.2, 40.0) == 40 + 5 * 50 + 2 * 100 + 5 * 10
    assert line.left(1, "training", 1.0, 0.0) == 50
    text = line.text(80, step=1, of=4, eta=61.0, phase="seginversion", batch=0, cls=1.234,
                     **{"images/s": 0.51})
    # 61 s here, then 100 passes of 2 s and 10 of 5
    assert text == "step 1 of 0-1 seginversion ##-------- 1/4  1:01 min left, 5:11 min in all"
    assert run_module.clock(3723) == "1:02 h"


def test_the_forward_passes_of_a_run_are_counted_by_hand():
    args = train.parse("--crop 64 --fake-sizes 32,64 --num-fakes 32 --fake-steps 10 --epochs0 1 "
                       "--epochs 2 --batch-size 8".split())
    task = train.Task(None, None, [], [[1]] * 30, [[1], [2]], [[1], [2]], [range(24), range(8)])
    assert train.work_of(args, task) == {
        (0, "seginversion"): 0, (0, "training"): 3 * 3 * 8, (0, "scoring"): 30,
        (1, "seginversion"): 2 * 32 * (5 / 4 + 5), (1, "training"): 4 * 4 * 8, (1, "scoring"): 30}


def test_on_a_terminal_a_run_is_one_line_that_moves_and_its_log_is_the_same(finished, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *trial_command(finished, tmp_path / "run")],
                               cwd=HERE, stdout=theirs, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "90"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):                      # the other end was closed
        while part := os.read(ours, 4096):
            shown += part
    assert process.wait() == 0
    moves = re.findall(r"\r\x1b\[K(step [^\r\n]*)", shown.decode())
    assert {" ".join(line.split()[:4]) for line in moves} == {f"step {k} of 0-2" for k in range(3)}
    assert {line.split()[4] for line in moves} == set(run_module.PHASES)
    assert all(len(line) < 90 for line in moves) and "in all" in moves[0]
    keys = lambda folder: [list(line) for line in read_log(folder)]
    assert keys(tmp_path / "run") == keys(finished / "run") and '"eta"' not in shown.decode()


@pytest.mark.parametrize("command, sentence", [
    ("train.py --dataset vox", "did you mean voc?"),
    ("train.py --metod mib", "did you mean --method?"),
    ("train.py --method lwf_mc", "did you mean lwf-mc?"), ("data.py vok", "did you mean voc?"),
    ("data.py convert x --out o --imges y", "did you mean --images?"),
    ("data.py voc --data-rot x", "did you mean --data-root?")])
def test_a_mistyped_choice_or_flag_is_told_the_nearest(capsys, command, sentence):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        {"train.py": train, "data.py": data}[script].parse(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_mistyped_class_is_told_the_nearest_and_the_version_is_the_commit(finished, capsys):
    with pytest.raises(InputError, match="unicron is unknown.*did you mean unicorn"):
        protocol.parse_order("unicron,1", ["background", "cat", "unicorn"])
    with pytest.raises(InputError, match="did you mean cow"):
        fakes.main(["--checkpoint", f"{finished}/run/step-2.pth", "--classes", "cowe"])
    with pytest.raises(SystemExit) as stop:
        train.parse(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"commit {run_module.commit()}, torch {torch.__version__}\n"


def test_closed_streams_and_odd_ranks_are_no_tracebacks(monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", None)
        with run_module.plain_errors("x.py"):
            raise InputError("bad")
    assert stop.value.code == 2 and capsys.readouterr().err == "x.py: bad\n"
    for rank, size in (("1", "1"), ("0", "0"), ("\u00b2", "4")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match="RANK"):
            run_module.setup()


def test_a_file_that_cannot_be_written_is_named_with_the_free_space_and_the_old_one_stays(tmp_path):
    (tmp_path / "f").write_text("old")
    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError,
                       match=r"f: cannot be written \(No space left .* MiB free there\)"):
        run_module.write_atomically(tmp_path / "f", full)
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"
    with pytest.raises(InputError, match="no/f: cannot be written .*no such folder"):
        run_module.write_atomically(tmp_path / "no/f", lambda p: p.write_text(""))


def test_loader_processes_follow_the_cpus_that_the_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    quota = lambda text: monkeypatch.setattr(Path, "read_text", lambda self: text)
    for text, number in (("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("odd", 6)):
        quota(text)
        assert run_module.cpus() == number
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert run_module.default_workers() == 3


def limited(command, file_size=None, kill_after=None, signals=()):
    """A script with a limit on its files' size, or signalled some seconds after its first line."""
    threads = str(torch.get_num_threads())                  # other numbers round differently
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    script = subprocess.Popen([sys.executable, *command], cwd=HERE, text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, preexec_fn=limit if file_size else None,
                              env={**os.environ, "OMP_NUM_THREADS": threads})
    if signals:
        script.stdout.readline()
        time.sleep(kill_after)
        for number in signals:
            script.send_signal(number)
    out, err = script.communicate(timeout=120)
    return script.returncode, err


def trial_command(finished, out, flags=""):
    return ["train.py",
            *f"{COMMON} --data-root {finished}/data --epochs 2 --out {out} {flags}".split()]


def test_a_disk_that_fills_is_one_sentence_and_the_same_command_goes_on(finished, tmp_path):
    # as on a full disk, a write fails: here because a file may not grow beyond this
    for size, name in ((40_000, "last.pth"), (300, "log.jsonl|settings.json|.labels|step-0")):
        code, err = limited(trial_command(finished, tmp_path / "run"), file_size=size)
        assert code == 2 and re.search(f"({name}).*: cannot be written",
                                       err) and "Traceback" not in err
    assert limited(trial_command(finished, tmp_path / "run"))[0] == 0
    assert same_weights(finished / "run/step-2.pth", tmp_path / "run/step-2.pth")


@pytest.mark.parametrize("number, code, workers", [(signal.SIGINT, 130, 0),
                                                   (signal.SIGTERM, 143, 2)])
def test_a_signal_ends_a_run_with_one_line_and_the_same_command_goes_on(
        finished, tmp_path, number, code, workers):
    command = trial_command(finished, tmp_path / "run", f"--workers {workers}")
    ended, err = limited(command, kill_after=0.1, signals=[number])
    assert ended == code and re.fullmatch(
        rf"train.py: stopped by {signal.Signals(number).name}; .*\n", err), err
    assert limited(command)[0] == 0
    assert same_weights(finished / "run/step-2.pth", tmp_path / "run/step-2.pth")


def test_the_text_of_names_that_a_terminal_lacks_is_replaced(finished, tmp_path):
    shutil.copytree(finished / "data", tmp_path / "data")
    (tmp_path / "data/classes.txt").write_text("background\nK\u00e4tzchen\ndog\ncow\n",
                                               encoding="utf-8")
    code, out, err = run_script(
        sys.executable, *trial_command(tmp_path, tmp_path / "run", "--max-iters 1 --fake none"),
        PYTHONIOENCODING="ascii")
    assert code == 0, err
    code, out, err = run_script(sys.executable, "eval.py", f"{tmp_path}/run", "--predict",
                                f"{tmp_path}/data/JPEGImages", "--out", f"{tmp_path}/p",
                                PYTHONIOENCODING="ascii")
    assert code == 0 and "Traceback" not in err


@pytest.mark.parametrize("flags, sentence", [
    ("--task 2-1", "step-0.pth: its classes differs"),
    ("--method mib", "step-1.pth: its method differs")])
def test_copied_steps_of_another_task_or_method_are_refused(finished, tmp_path, flags, sentence):
    (tmp_path / "run").mkdir()
    for path in (finished / "run").glob("step-*"):
        shutil.copyfile(path, tmp_path / "run" / path.name)
    with pytest.raises(InputError, match=sentence):
        train_on(finished, tmp_path / "run", f"--epochs 2 {flags}")


def test_a_step_under_way_of_other_settings_or_another_step_is_not_gone_on_from(
        finished, tmp_path, monkeypatch):
    stop_at(monkeypatch, {("hrhf", 12)}, ("METHODS", "hrhf"))                  # in step 1
    with pytest.raises(KeyboardInterrupt):
        train_on(finished, tmp_path / "a", "--epochs 2")
    (tmp_path / "b").mkdir()
    for name in ("step-0.pth", "step-0.json", "last.pth"):
        shutil.copyfile(tmp_path / "a" / name, tmp_path / "b" / name)
    with pytest.raises(InputError, match="last.pth: of another run, network or method"):
        train_on(finished, tmp_path / "b", "--epochs 2 --lr 0.002")
    state = torch.load(tmp_path / "a/last.pth", weights_only=True)
    for iteration in (1.0, 999, 0, math.inf):
        torch.save({**state, "iteration": iteration}, tmp_path / "a/last.pth")
        with pytest.raises(InputError, match="last.pth: of another run, network or method"):
            train_on(finished, tmp_path / "a", "--epochs 2")
    torch.save({**state, "step": 0}, tmp_path / "a/last.pth")       # of a step that is done
    train_on(finished, tmp_path / "a", "--epochs 2")
    assert not any("resumed_at" in line for line in read_log(tmp_path / "a"))
    assert same_weights(finished / "run/step-2.pth", tmp_path / "a/step-2.pth")


def test_scores_of_another_run_are_not_taken_for_this_ones(finished, tmp_path):
    train_on(finished, tmp_path / "a", "--max-iters 2 --crop 48 --fake none")
    train_on(finished, tmp_path / "b", "--max-iters 2 --crop 32 --fake none")
    scores = json.loads((tmp_path / "b/results.json").read_text())["final"]
    # beside checkpoints that they do not score
    for path in (tmp_path / "a").glob("step-*.json"):
        shutil.copyfile(path, tmp_path / "b" / path.name)
    train_on(finished, tmp_path / "b", "--max-iters 2 --crop 32 --fake none")
    assert json.loads((tmp_path / "b/results.json").read_text())["final"] == scores
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "a").glob("step-*.json"):       # without checkpoints
        shutil.copyfile(path, tmp_path / "c" / path.name)
    train_on(finished, tmp_path / "c", "--max-iters 2 --crop 32 --fake none")
    assert json.loads((tmp_path / "c/results.json").read_text())["final"] == scores


def test_a_damaged_record_is_scored_again_to_the_same_numbers(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    record = json.loads((tmp_path / "run/step-1.json").read_text())
    record["confusion"][0][0] += 1
    (tmp_path / "run/step-1.json").write_text(json.dumps(record))
    train_on(finished, tmp_path / "run", "--epochs 2")
    assert "step-1.json: damaged; the step is scored again" in capsys.readouterr().err
    for confusion in ([[1]], [1, 2, 3], [[1, 2, 3]] * 2 + [[1, 2]], [[-1, 0, 0]] * 3,
                      [["a"] * 3] * 3, [[10 ** 30] * 3] * 3):
        run_module.write_json(tmp_path / "run/step-1.json", {**record, "confusion": confusion})
        train_on(finished, tmp_path / "run", "--epochs 2")
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert [s["confusion"] for s in again["steps"]] == [s["confusion"] for s in results["steps"]]


def test_a_run_in_another_order_of_the_classes_says_so_and_scores_again_exactly(
        finished, tmp_path, capsys):
    train_on(finished, tmp_path / "run", "--max-iters 2 --order cow,1,dog")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["settings"]["order"] == [3, 1, 2]
    assert list(results["steps"][2]["iou"]) == ["background", "cow", "cat", "dog"]
    assert model.load_model(tmp_path / "run/step-0.pth")[1]["classes"] == ["background", "cow"]
    evaluation.main([f"{tmp_path}/run"])
    assert capsys.readouterr().out.count("exactly as recorded") == 3


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(40))
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_end(finished, tmp_path, trial):
    random = np.random.RandomState(trial)
    command = trial_command(finished, tmp_path / "run", f"--workers {trial % 2}")
    for number in [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][:1 + trial % 3]:
        limited(command, kill_after=random.uniform(0, 4), signals=[number])
    assert limited(command)[0] == 0
    for step in range(3):
        assert same_weights(finished / f"run/step-{step}.pth", tmp_path / f"run/step-{step}.pth")
        for fake in (finished / f"run/fakes-step-{step}").glob("*.png"):
            again = tmp_path / f"run/fakes-step-{step}" / fake.name
            assert fake.read_bytes() == again.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last.pth", "step-0.pth", "step-1.json", "settings.json",
                                  "fakes-step-1/00003.png", "fakes-step-1/manifest.jsonl",
                                  "fakes-step-1/plan.json"])
@pytest.mark.parametrize("trial", range(20))
def test_a_flipped_byte_is_mended_named_or_without_effect(finished, tmp_path, name, trial,
                                                          monkeypatch):
    run = tmp_path / "run"
    stop_at(monkeypatch, {("hrhf", 12)}, ("METHODS", "hrhf"))                  # in step 1
    with pytest.raises(KeyboardInterrupt):
        train_on(finished, run, "--epochs 2")
    if name == "step-1.json":
        train_on(finished, run, "--epochs 2")
    whole = bytearray((run / name).read_bytes())
    whole[np.random.RandomState(trial).randint(len(whole))] ^= 1 << trial % 8
    (run / name).write_bytes(whole)
    try:
        train_on(finished, run, "--epochs 2")
    except InputError as error:
        assert name.split("/")[0] in str(error) or "other settings" in str(error)
        return
    assert same_weights(finished / "run/step-2.pth", run / "step-2.pth")
    old, new = (json.loads((r / "results.json").read_text()) for r in (finished / "run", run))
    assert [s["confusion"] for s in old["steps"]] == [s["confusion"] for s in new["steps"]]


# ------------------------------------------------------------------------------------------ eval.py

def test_confusion_matrix_against_a_loop_with_void_left_out():
    prediction, target = torch.randint(4, (2, 5, 6)), torch.randint(4, (2, 5, 6))
    target[0, 0] = 255
    naive = torch.zeros(4, 4, dtype=torch.int64)
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist()):
        if t != 255:
            naive[t, p] += 1
    assert torch.equal(evaluation.confusion_matrix(prediction, target.to(torch.uint8), 4), naive)


def test_iou_by_hand_and_nan_only_for_classes_that_are_nowhere():
    confusion = torch.tensor([[6, 2, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    values = evaluation.iou(confusion)
    assert values[:2].tolist() == pytest.approx([6 / 10, 3 / 6])
    # class 3 was predicted, but is not there
    assert values[2].isnan() and values[3] == 0


def test_summarize_prints_the_three_conventions_of_the_papers_tables():
    # IoU: background 0.8, classes 0.5, 0.25 (step 0), 0.2 (step 1), 0.1 (step 2), from pure counts
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    for c, (tp, missed) in enumerate([(8, 2), (5, 5), (1, 3), (1, 4), (1, 9)]):
        confusion[c, c] = tp
        confusion[c, 0] += missed if c else 0
    confusion[0, 0] = 84                                    # 84 / (84 + 21) = 0.8
    assert evaluation.iou(confusion).tolist() == pytest.approx([0.8, 0.5, 0.25, 0.2, 0.1])
    result = evaluation.summarize(confusion, [[1, 2], [3], [4]])
    excluded, inside, mixed = result.values()
    assert (excluded["old"], excluded["new"],
            excluded["all"]) == pytest.approx((0.375, 0.15, 1.05 / 4))
    assert (inside["old"], inside["new"],
            inside["all"]) == pytest.approx((1.55 / 3, 0.15, 1.85 / 5))
    assert (mixed["old"], mixed["new"], mixed["all"]) == pytest.approx((0.375, 0.15, 1.85 / 5))
    assert excluded["per_step"] == pytest.approx([0.375, 0.2, 0.1])
    assert inside["per_step"] == pytest.approx([1.55 / 3, 0.2, 0.1])


def test_summarize_leaves_out_classes_without_ground_truth_and_stops_where_the_matrix_stops():
    # ADE: background never scored
    confusion = torch.tensor([[0, 0, 0], [1, 1, 2], [0, 0, 4]])
    result = evaluation.summarize(confusion, [[1], [2], [3]])
    for values in result.values():
        assert values["all"] == pytest.approx((1 / 4 + 4 / 6) / 2)
    assert result["background excluded"]["per_step"] == pytest.approx([1 / 4, 4 / 6])
    first = evaluation.summarize(confusion[:2, :2], [[1], [2], [3]])["background excluded"]
    assert math.isnan(first["new"]) and first["old"] == pytest.approx(1 / 2)


def test_the_test_images_of_a_step_show_a_class_learned_so_far():
    view = evaluation.test_view(None, [[0, 1], [0, 3], [2, 3], [0]], [[1], [2], [3]], 1, 8, "voc")
    assert view.indices == [0, 2]
    assert view.table[[0, 1, 2, 3, 255]].tolist() == [0, 1, 2, 255, 255]
    ade = evaluation.test_view(None, [[0, 1], [0, 3], [2, 3], [0]], [[1], [2], [3]], 1, 8, "ade")
    assert ade.table[[0, 1, 2, 3, 255]].tolist() == [255, 1, 2, 255, 255]


def test_eval_scores_a_run_again_to_the_same_numbers_and_says_so_if_not(finished, tmp_path, capsys):
    evaluation.main([f"{finished}/run"])
    assert capsys.readouterr().out.count("exactly as recorded") == 3
    for path in (finished / "run").glob("step-*.pth"):
        (tmp_path / path.name).symlink_to(path)
    results = json.loads((finished / "run/results.json").read_text())
    results["steps"][1]["confusion"][0][0] -= 4
    results["steps"][1]["confusion"][0][1] += 4
    results["steps"][2]["confusion"][1][1] += 1             # half a move is one, not none
    run_module.write_json(tmp_path / "results.json", results)
    (tmp_path / "settings.json").write_text((finished / "run/settings.json").read_text())
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path)])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "step 0: exactly as recorded\nstep 1: differs from results.json in 4 of" in out
    assert "step 2: differs from results.json in 1 of" in out


def test_predict_writes_a_mask_and_an_overlay_of_each_pictures_own_size(finished, tmp_path):
    Image.new("RGB", (50, 31), (10, 200, 90)).save(tmp_path / "odd.png")
    evaluation.main([f"{finished}/run", "--predict", f"{finished}/data/JPEGImages",
                     f"{tmp_path}/odd.png", "--out", f"{tmp_path}/d"])
    for kind in ("mask", "overlay"):
        assert len(list((tmp_path / "d").glob(f"*-{kind}.png"))) == 33
    assert (tmp_path / "d/legend.csv").read_text().splitlines()[:3] == [
        "id,name,red,green,blue", "0,background,0,0,0", "1,cat,128,0,0"]
    legend = np.array(Image.open(tmp_path / "d/legend.png"))
    assert [legend[12 + 20 * k, 12].tolist() for k in range(4)] == data.palette()[:4].tolist()
    assert not (tmp_path / "d/shares.csv").exists()
    evaluation.main([f"{finished}/run", "--predict", f"{tmp_path}/odd.png", "--csv", "--out",
                     f"{tmp_path}/d"])
    head, row = (tmp_path / "d/shares.csv").read_text().splitlines()
    ids = np.array(Image.open(tmp_path / "d/odd-mask.png"))
    assert head == "picture,background,cat,dog,cow"
    assert row == f"{tmp_path}/odd.png," + ",".join(f"{100 * np.mean(ids == k):.2f}"
                                                    for k in range(4))
    mask = Image.open(tmp_path / "d/odd-mask.png")
    assert mask.size == (50, 31) and mask.mode == "P" and np.asarray(mask).max() <= 3
    assert mask.getpalette()[:12] == data.palette()[:4].flatten().tolist()
    assert Image.open(tmp_path / "d/odd-overlay.png").size == (50, 31)


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere"], "nowhere/settings.json: No such file"),
    (["{run}", "--predict", "{run}/predictions.png", "{run}/../predictions.png"],
     "two pictures are called predictions"),
    (["nowhere", "--predict", "a.jpg"], "nowhere: no such folder"),
    (["{run}", "--csv"], "--csv: of --predict"),
    (["--compare", "nowhere"], "--compare nowhere: no such folder"),
    (["{run}", "--judge", "other.pth"], "--judge: judges --fakes"),
    (["{run}", "--fakes", "1", "--predict", "a.jpg"], "--predict and --fakes: one at a time"),
    (["{run}", "--predict", "{run}/fakes-step-1/empty"], "no picture in this folder"),
    (["{run}", "--predict", ""], "an argument is empty"),
])
def test_eval_ends_with_one_sentence_on_bad_input(finished, capsys, arguments, sentence):
    (finished / "run/fakes-step-1/empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("eval.py"):
        evaluation.main([a.format(run=finished / "run") for a in arguments]
                        + ["--out", str(finished / "predictions")])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_compare_prints_one_table_with_the_papers_numbers_and_writes_csv(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, method, task, score in (("a", "ft", "15-1", (0.1, 0.2, 0.125)),
                                      ("b", "mib", "15-1", (0.5, 0.25, 0.45)),
                                      ("c", "mib", "15-5", (0.6, None, 0.6)),
                                      ("d", "ewc", "15-1", (0.3, 0.1, 0.25))):
        Path(name).mkdir()
        run_module.write_json(Path(name, "results.json"), {
            "settings": {"dataset": "voc", "task": task, "setting": "disjoint", "method": method,
                         "seed": 1},
            "flags": "--lam 50.0" if name == "d" else "",
            "final": {"background excluded": dict(zip(("old", "new", "all"), score))}})
    Path("unfinished").mkdir()
    evaluation.main(["--compare", "a", "b", "c", "d", "unfinished"])
    printed = capsys.readouterr()
    assert "unfinished has no results.json" in printed.err
    assert printed.out.splitlines() == [
        "| mIoU (%), old / new / all (paper) | voc 15-1 disjoint | voc 15-5 disjoint |",
        "|---|---|---|",
        "| ft | 10.0 / 20.0 / 12.5 (0.2 / 1.8 / 0.6) | - |",
        "| mib | 50.0 / 25.0 / 45.0 (46.2 / 12.9 / 37.9) | "
        "60.0 / nan / 60.0 (71.8 / 43.3 / 64.7) |",
        "| ewc --lam 50.0 | 30.0 / 10.0 / 25.0 | - |"]
    lines = Path("compare.csv").read_text().splitlines()
    assert lines[0] == "run,method,dataset,task,setting,seed,group,mIoU,paper" and len(lines) == 13
    assert lines[4] == "b,mib,voc,15-1,disjoint,1,old,50.00,46.2"


def test_the_papers_tables_are_read_right():
    paper = evaluation.paper_results()
    assert len(paper) == 9
    assert all(len(rows) == (10 if key[0] == "voc" else 7) for key, rows in paper.items())
    assert paper["voc", "15-1", "overlapped"]["hrhf"] == (72.4, 39.6, 64.6)
    assert paper["voc", "19-1", "disjoint"]["ewc"] == (23.2, 16.0, 22.9)
    assert paper["ade", "100-10",
                 "disjoint"]["mib"] == pytest.approx((31.8, (10.4 + 14.8 + 12.8 + 13.6 + 18.7) / 5,
                                                      25.9))
    assert paper["ade", "50-50", "disjoint"]["lwf"] == pytest.approx((5.7, (12.9 + 22.8) / 2, 13.9))


@pytest.mark.parametrize("damage, sentence", [
    (lambda r: r["steps"].pop(), "not of the 3 steps of this task"),
    (lambda r: r["steps"][1].pop("confusion"), "results.json: damaged"),
    (lambda r: r["steps"][1].update(confusion=[[1, "a"], [2, 3]]), "results.json: damaged"),
    (lambda r: r["steps"][1].update(confusion=[[1]]), "step 1 is not of this run"),
    (lambda r: r.update(steps="odd"), "results.json: damaged")])
def test_odd_results_are_one_sentence(finished, tmp_path, damage, sentence):
    for path in (finished / "run").glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results = json.loads((tmp_path / "results.json").read_text())
    damage(results)
    run_module.write_json(tmp_path / "results.json", results)
    with pytest.raises(InputError, match=sentence):
        evaluation.main([str(tmp_path)])


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(finished, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("b.jpg", "c.png", "d.bmp", "e.webp", "f.tiff"):
        Image.new("RGB", (40, 30)).save(tmp_path / "in" / name)
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    (tmp_path / "in/._b.jpg").write_bytes(b"x")             # hidden
    (finished / "run/step-9x.pth").touch()                  # no step's
    with pytest.raises(SystemExit) as stop:
        evaluation.main([f"{finished}/run", "--predict", f"{tmp_path}/in", "--out",
                         f"{tmp_path}/out"])
    (finished / "run/step-9x.pth").unlink()
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "a.jpg: not a readable image" in err and "._b" not in err
    assert len(list((tmp_path / "out").glob("*-mask.png"))) == 5


def test_a_prediction_in_bands_is_the_whole_one_and_long_pictures_are_made_smaller(monkeypatch):
    seen, net = [], tiny((4,)).eval()
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (50, 70, 3), np.uint8))
    x = torchvision.transforms.v2.functional.to_image(image)[None]
    x = torchvision.transforms.v2.functional.resize(x, 32)
    whole = model.upsample(net(data.normalised(x)), torch.empty(50, 70)).argmax(1)[0]
    bands = lambda H, numbers: [slice(i, i + 7) for i in range(0, H, 7)]
    monkeypatch.setattr(evaluation, "row_bands", bands)
    mask = evaluation.predict(net, image, 32)
    # but for rounding
    assert mask.dtype == torch.uint8 and (mask == whole).float().mean() > 0.999
    assert len(evaluation.overlay(image, mask).getcolors(10 ** 6)) > 100
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    assert evaluation.predict(net, Image.new("RGB", (2000, 10)), 32).shape == (10, 2000)
    assert max(seen[0]) <= 8 * 32


@pytest.mark.slow
def test_a_picture_of_40_megapixels_and_151_classes_takes_less_than_2_gb(tmp_path):
    code = ("import resource; from PIL import Image; import eval; from model import DeepLabV3;"
            "net = DeepLabV3('mobilenet_v2', [151]).eval();"
            "image = Image.new('RGB', (8000, 5000), (9, 99, 50));"
            "mask = eval.predict(net, image, 512).clone(); mask[::7] = 3;"
            "eval.overlay(image, mask);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < 2e9, done.stderr


# ------------------------------------------------------------------------------------ report.py

class Page(HTMLParser):
    """What stands in a page; every tag must be closed by its own."""
    def __init__(self, text):
        super().__init__()
        self.open, self.heads, self.cells, self.links, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == []
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
    def handle_endtag(self, tag):
        assert self.open.pop() == tag
    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.heads.append(text)
        if self.open and self.open[-1] == "td":
            self.cells.append(text)


def test_the_report_of_a_run_has_its_records_numbers_and_needs_no_network(finished, tmp_path):
    text = (finished / "run/report.html").read_text(encoding="utf-8")
    page, results = Page(text), json.loads((finished / "run/results.json").read_text())
    assert page.heads == [
        "run", "What was run", "Scores", "Over the steps", "IoU of every class (%)",
        "Confusions of the last step", "Losses", "Fakes", "Predictions", "What to look at"]
    for name, score in results["final"].items():
        i = page.cells.index(name)
        assert page.cells[i + 1:i + 4] == [f"{100 * score[k]:.1f}" for k in ("old", "new", "all")]
    assert len(text) < 4e6 and "script" not in page.tags
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("img") == 2 * (8 + 8) + 3 * 8    # fakes and maps, test images
    log = read_log(finished / "run")
    assert html.escape(log[0]["command"]) in text
    shares = torch.tensor(results["steps"][2]["confusion"]).double()
    shares /= shares.sum(1, keepdim=True)
    for i, truth in enumerate(names := ["background", "cat", "dog", "cow"]):
        for j, other in enumerate(names):
            words = f"{truth} is taken for {other}: {100 * shares[i, j]:.0f} %"
            assert (words in text) == (i != j and i > 0 and j > 0 and bool(shares[i, j] >= 0.05))
    report.main([f"{finished}/run"])
    assert (finished / "run/report.html").read_text(encoding="utf-8") == text


def test_a_report_that_cannot_be_made_does_not_end_a_run_and_a_lost_one_is_made_again(
        finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    train_on(finished, tmp_path / "run", "--epochs 2")
    assert (tmp_path / "run/report.html").exists()
    (tmp_path / "run/fakes-step-1.png").write_bytes(b"x")
    train_on(finished, tmp_path / "run", "--epochs 2")
    assert "report.html is not written: UnidentifiedImageError" in capsys.readouterr().err


def test_a_report_of_several_runs_and_of_an_unfinished_one(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "<b>part"
    shutil.copytree(finished / "run", part)
    for name in ("step-2.json", "results.json", "predictions.png", "fakes-step-1/manifest.jsonl"):
        (part / name).unlink()
    log = (part / "log.jsonl").read_bytes()
    (part / "log.jsonl").write_bytes(log + b'7\n\xff\n{"step": 2, "itera')
    report.main([f"{finished}/run", str(part)])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.heads.count("What was run") == 2 and "<b>part" in page.heads
    assert [link for link in page.links if link[0] == "#"] == ["#0", "#1"]
    for name, sentence in (("step-0.json", "no step is scored"), ("settings.json", "no settings")):
        (part / name).unlink()
        with pytest.raises(InputError, match=sentence):
            report.main([str(part)])


def test_the_report_says_what_to_look_at(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    record = json.loads((folder / "step-0.json").read_text())
    write = lambda step, confusion: run_module.write_json(
        folder / f"step-{step}.json", {**record, "confusion": confusion, "of": [
            {"classes": ["background", "cat", "dog", "cow"][:step + 2],
             "classes_per_step": [2, 1, 1][:step + 1]}, None]})
    write(0, [[90, 10], [10, 90]])
    write(1, [[90, 10, 0], [99, 1, 0], [80, 20, 0]])
    write(2, [[90, 10, 0, 0], [99, 1, 0, 0], [80, 20, 0, 0], [10, 0, 0, 90]])
    said = report.advice(report.Records(folder))
    assert ("cat (IoU 81.8, then 0.8): forgotten, most in step 1; "
            "lower --lr, raise --num-fakes, raise --lam." in said)
    assert ("dog (IoU 0.0, 25.0 % of the pixels): never learned; step 1 had 8 iterations: "
            "--min-iters 300" in said)
    assert "cat: over 60 % of the pixels are taken for the background; step 0 had" in said
    assert "The old classes had 81.8 % and have 0.8 %; lower --lr" in said and "cow" not in said
    settings = json.loads((folder / "settings.json").read_text())
    run_module.write_json(folder / "settings.json", {**settings, "fake": "none", "lam": 0.0,
                                                     "max_iters": 8})
    said = report.advice(report.Records(folder))
    assert "most in step 1; lower --lr." in said and "capped by --max-iters" in said
    shutil.rmtree(folder / "fakes-step-1")
    shutil.rmtree(folder / "fakes-step-2")
    for step, size in enumerate((2, 3, 4)):
        write(step, [[90 * (i == j) for j in range(size)] for i in range(size)])
    assert "Nothing stands out: no class stayed under 10 % or lost half of its IoU." in \
        report.advice(report.Records(folder))
    write(2, [[90 * (i == j) * (i < 3) for j in range(4)] for i in range(4)])
    assert "cow: no pixel in the test images" in report.advice(report.Records(folder))
    for step, size in enumerate((2, 3, 4)):                 # cat is background in all of them
        write(step, [[90 * (j == (0 if i < 2 else i)) for j in range(size)] for i in range(size)])
    for more, words in (({"max_iters": 4}, "4 iterations, capped by"), (
            {"max_iters": None, "min_iters": 4}, "--min-iters 300"),
            ({"max_iters": None, "step0": "x.pth"}, "step 0 came with --step0")):
        run_module.write_json(folder / "settings.json", {**settings, **more})
        assert words in report.advice(report.Records(folder))


def test_the_page_stays_small_and_its_maps_keep_their_colours():
    noisy = Image.fromarray(np.random.RandomState(0).randint(0, 255, (512, 512, 3), np.uint8))
    ids = np.zeros((512, 512), np.uint8)
    ids[100:301, 77:200] = 2
    segmented = Image.fromarray(data.palette()[ids])
    card = report.picture(noisy, "") + report.picture(segmented, "", flat=True)
    assert report.MOST_FAKES * len(card) < 3.5e6
    shown = Image.open(io.BytesIO(base64.b64decode(card.rpartition("base64,")[2][:-2])))
    assert {rgb for _, rgb in shown.getcolors()} == {(0, 0, 0), tuple(data.palette()[2].tolist())}


# ------------------------------------------------------------------------------------- bench.py

@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_memory_counts_what_is_alive_at_once_and_not_what_was_there_before(device):
    x = torch.zeros(100, device=device)                     # 400 bytes, not counted
    with bench.PeakMemory() as memory:
        y = x + 1
        z = y * 2                                           # 800 alive
        del y
        z.view(10, 10).add_(1)                              # no new memory
        w = z * 2                                           # 800
        assert memory.now == memory.peak == 800
        del z, w
        assert memory.now == 0
        x.view(-1).mul_(2)
        assert (memory.now, memory.peak) == (0, 800)
    weight = torch.zeros(100, device=device, requires_grad=True)
    with bench.PeakMemory() as memory:
        loss = weight.exp().exp().sum()                     # both keep their result for backward
        assert memory.now == 804
        loss.backward()
    assert memory.peak >= 1200 and weight.grad is not None


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("frozen, to_input, times",
                         [(False, True, 3), (False, False, 2), (True, True, 2)])
def test_each_gradient_of_a_convolution_costs_what_its_forward_pass_does(
        groups, frozen, to_input, times):
    with torch.device("meta"):
        conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
        x = torch.empty(2, 8, 10, 12, requires_grad=to_input)
    conv.requires_grad_(not frozen)
    forward = 2 * 2 * 16 * 10 * 12 * (8 // groups) * 9
    assert bench.cost(lambda: conv(x).sum().backward())[0] == times * forward


def plan(command, gpus=1, tflops=1e-6):
    """The plan's rows as [step, phase, images, iterations, PFLOP, GB, hours]."""
    lines = "\n".join(bench.plan(train.parse(command.split()), gpus, tflops)).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines
            if re.match(r"\| (\d|all)", line)]


PLANNED = ("--dataset voc --task 15-1 --data-root nowhere --backbone tiny --crop 64 "
           "--batch-size 24 --epochs 3 --fake-steps 7 --num-fakes 48 --fake-batch 16")


def test_the_plan_sums_seginversion_and_a_gpu_makes_whole_batches_of_fakes():
    args = train.parse("--crop 32 --num-fakes 40 --fake-batch 4 --fake-steps 1000 --fake-sizes 1 "
                       "--no-reuse-fakes".split())
    lines = "\n".join(bench.plan(args, 2, 1e-6)).splitlines()
    rows = [line.split("|") for line in lines if "SegInversion at" in line]
    # three batches of 16, 16 and 8: two on the busiest, in four parts each
    assert [int(row[4]) for row in rows] == [2 * 4 * 1000] * 5
    said = next(line for line in lines if line.startswith("SegInversion:"))
    theirs = sum(float(row[5]) for row in rows)
    assert float(said.split()[1]) == pytest.approx(theirs, rel=2e-3)
    less, run = map(float, re.search(r"` ([\d.e-]+), and the run ([\d.e-]+)\.$", said).groups())
    whole, = (float(line.split("|")[5]) for line in lines if line.startswith("| all"))
    assert run == pytest.approx(whole - theirs + less, rel=2e-3) and less < 0.2 * theirs
    dear = bench.plan(train.parse("--crop 32 --fake-steps 5".split()), 1, 1)    # dearer than this
    assert not [line for line in dear if line.startswith("SegInversion:")]


def test_the_phases_are_measured_with_their_plan(monkeypatch):
    compiled = []
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    lines = list(bench.on_gpu("--dataset shapes --crop 32 --fake-sizes 16,32 --batch-size 8",
                              gpus=2))
    assert len(compiled) == 1
    assert [line.split(":")[0][2:] for line in lines[1:-1]] == [
        phase for phase in ("SegInversion at 16", "SegInversion at 32", "training", "evaluation")
        for _ in range(3)]
    assert all(float(line.split("|")[2]) > 0 for line in lines[1:] if "sustained" not in line)
    with pytest.raises(InputError, match="no GPU here"):
        bench.parse(["cuda"])


def test_the_plan_has_every_phase_of_the_real_run_with_its_iterations():
    one, four = plan(PLANNED), plan(PLANNED, gpus=4)
    later = [["SegInversion at 64", "training", "evaluation"]] * 5
    assert [row[:2] for row in one] == [["0", "training"], ["0", "evaluation"]] + [
        [str(step), name] for step, names in enumerate(later, 1) for name in names] + [["all", ""]]
    assert [row[2] for row in one if row[1] == "training"] == [
        "8437", "378", "299", "420", "500", "548"]
    first, test = 3 * (8437 // 24), math.ceil(1449 / 8)
    assert [int(row[3]) for row in one[:5]] == [first, test, 3 * 7, 3 * (378 // 12), test]
    assert [int(row[3]) for row in four[:5]] == [first, math.ceil(test / 4), 7, 3 * (378 // 12),
                                                 math.ceil(test / 4)]
    for rows in (one, four):
        hours, flops = (sum(float(row[i]) for row in rows[:-1]) for i in (6, 4))
        assert hours == pytest.approx(float(rows[-1][6]), rel=1e-3)
        assert flops == pytest.approx(float(rows[-1][4]), rel=2e-3)
    assert float(one[0][6]) == pytest.approx(4 * float(four[0][6]), rel=0.01)
    assert float(one[2][6]) == pytest.approx(3 * float(four[2][6]), rel=0.01)   # 3 batches on 4


def test_the_plans_flops_memory_and_hours_are_those_counted_by_hand():
    _, _, inversion, training, evaluation, *_ = plan(PLANNED)
    with torch.device("meta"):                              # each network alone
        old, new = tiny([16]).eval(), tiny([16, 1])
        x, both = torch.empty(24, 3, 64, 64), torch.empty(16, 3, 64, 64, requires_grad=True)
        tested, labels = torch.empty(8, 3, 64, 64), torch.empty(24, 64, 64, dtype=torch.uint8)
    forward = lambda net, x: bench.cost(lambda: net(x))[0]
    first_layer = 2 * 24 * 32 * 32 * 32 * 3 * 9             # no image asks for its gradient
    of_training = 3 * forward(new, x) - first_layer + forward(old, x)
    of_inversion, _ = bench.cost(lambda: old.requires_grad_(False)(both).sum().backward())
    matrices = 1.02                                         # the products that upsample the logits
    for row, flops in ((inversion, 21 * of_inversion), (training, int(training[3]) * of_training),
                       (evaluation, 182 * forward(new, tested))):
        assert 0.999 < float(row[6]) * 3600 * 1e6 / flops < matrices, row
        assert 0.999 < float(row[4]) * 1e15 / flops < matrices, row

    sgd = torch.optim.SGD(new.train().parameters(), momentum=0.9, nesterov=True, weight_decay=1e-4)
    objective = methods.METHODS["hrhf"].objective_of(new, old, 1.0)

    def iteration():
        objective.loss(new, x, labels)[0].backward()
        sgd.step()
        sgd.zero_grad()
    weights = sum(t.nbytes for t in new.state_dict().values())
    momentum = sum(p.nbytes for p in new.parameters())
    assert float(training[5]) * 1e9 == pytest.approx(       # both networks, momentum, images
        bench.cost(iteration)[1] + 2 * weights + momentum + x.nbytes, rel=0.005)
    new.eval().requires_grad_(False)
    _, peak = bench.cost(lambda: model.upsample(new(tested), tested))
    assert float(evaluation[5]) * 1e9 == pytest.approx(weights + tested.nbytes + peak, rel=0.3)


def test_the_plan_counts_the_images_of_data_that_is_there(finished):
    command = f"--dataset folder --data-root {finished}/data --task 2-1 --backbone tiny --crop 32"
    rows, train_set = plan(command), data.load("folder", finished / "data", "train")
    steps = protocol.task_steps("2-1", len(train_set.classes) - 1)
    images = protocol.training_indices(train_set.labels(), steps, "disjoint")
    assert [int(row[2]) for row in rows if row[1] == "training"] == [*map(len, images)]
    assert [row[1] for row in plan(f"{command} --method joint")] == ["training", "evaluation", ""]


@pytest.mark.parametrize("flags", [
    "--plan --dataset voc --task 10-1 --data-root nowhere", "--plan --dataset voc --gpus 0",
    "--plan --dataset voc --gpus 5 --data-root nowhere", "--plan --dataset voc --gpus 24",
    "--plan --tflops nan", "loses"])
def test_bad_flags_of_the_benchmark_are_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as stop, run_module.plain_errors("bench.py"):
        bench.main(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("bench.py: ")


def test_a_ratio_is_taken_pair_by_pair(monkeypatch):
    line = bench.row("what", [2.0, 6.0, 9.0], [1.0, 2.0, 1.0], "<= 4")
    assert line == "| what | 3.00 | 2.00 to 9.00 | <= 4 |"
    order = []
    monkeypatch.setattr(bench, "REPEATS", 2)
    seconds = bench.alternate({name: lambda name=name: order.append(name) for name in "ab"})
    assert order == list("ababab") and [len(v) for v in seconds.values()] == [2, 2]


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    run_module.commit.cache_clear()
    assert run_module.commit() == "unknown"
    run_module.commit.cache_clear()


def test_the_published_form_measures_the_same_distance():
    model, x, losses = tiny([3]), torch.randn(2, 3, 32, 32), []
    for form in (seginversion.BatchNormMatching, bench.PublishedMatching):
        with form(model.eval()) as matching:
            losses.append(matching.loss(matching(x)[1]))
        assert not any(layer._forward_hooks for layer in matching.layers)
    torch.testing.assert_close(*losses)


def test_a_section_of_the_benchmark_is_rows_of_its_table(monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 1)
    inversion = train.inversion
    monkeypatch.setattr(train, "inversion", lambda args: inversion(args) | {
        "steps": args.fake_steps // 10})
    equal = list(bench.equal_fakes("tiny", 2, 32, "resnet18"))
    # of 19 passes 9 are at 16 pixels, 10 at 32; the paper's 100 are at 32
    assert float(equal[1].split("|")[2]) == pytest.approx((9 / 4 + 10) / 100, rel=0.03)
    assert float(equal[-1].split("|")[2]) < 0.5             # a quarter, but for the images
    lines = [*bench.inversion([("tiny", 2, 32, 1)]), *bench.scan(60)]
    assert len(lines) == 5 + 3 and {line.count("|") for line in lines} == {5}


@real_data
def test_the_recorded_image_counts_are_those_of_the_real_label_sets():
    recorded = json.loads((HERE / "results/image-counts.json").read_text())
    for dataset, name in (("voc", "voc_train_aug_labels"), ("ade", "ade_train_labels")):
        labels = list(json.loads((SHARED / f"oracles/{name}.json").read_text()).values())
        classes, _, *rows = recorded[dataset].values()
        for key, counts in zip([*recorded[dataset]][2:], rows):
            task, setting = key.split()
            images = protocol.training_indices(labels, protocol.task_steps(task, classes), setting,
                                               ade=dataset == "ade")
            assert counts == [*map(len, images)], key


# ---------------------------------------------------------------------------------- reproduce.py

STUDY = HERE / "results/study.jsonl"


@pytest.fixture
def small_study(finished, tmp_path, monkeypatch):
    """reproduce.py's `shapes` turned into the tiny folder set, with places of its own."""
    monkeypatch.setitem(reproduce.SETTINGS, "shapes",
                        f"{COMMON.replace('--task 1-1', '')} --epochs 1")
    monkeypatch.setitem(reproduce.TASK, "shapes", "1-1")
    return reproduce.Place({"shapes": finished / "data"}, "none", tmp_path / "runs",
                           tmp_path / "study.jsonl")


def of_study(row, flags, seed=1):
    return reproduce.Run("shapes", "1-1", "disjoint", row, flags, seed)


def test_the_study_names_every_different_run_once_and_all_its_commands_parse(capsys):
    by_name = {}
    for run in [run for runs in reproduce.study().values() for run in runs]:
        assert by_name.setdefault(run.name, run)._replace(row="") == run._replace(row="")
        assert train.parse(run.argv).seed == run.seed
        assert (reproduce.REPLAY in run.flags) == run.row.endswith("(outside the protocol)")
    reproduce.main(["--list", "--only", "voc20/15-1/hrhf/1"])
    alone, = capsys.readouterr().out.splitlines()
    assert alone.split()[:3] == ["voc20/15-1/hrhf/1", "python", "train.py"]
    for _, table, better, worse in tables.CLAIMS:        # some column has both rows
        runs = reproduce.study()[table]
        assert any({better, worse} <= {run.row for run in runs if run[:3] == where}
                   for where in {run[:3] for run in runs})


def test_every_record_is_of_a_command_that_means_the_settings_it_says():
    records = tables.read_records(STUDY)
    known = {run.name: run for runs in reproduce.study().values() for run in runs}
    assert records.keys() <= known.keys() | {"figure3", "figure4"}
    for name, run in known.items():
        if name not in records:
            continue
        assert tables.recorded(run, records)["seconds"] > 0
        judge = reproduce.judge(run)                        # of another seed
        assert judge.seed != run.seed
        assert judge.name in records or "fakes" not in records[name]
        args = vars(train.parse(run.argv))
        settings = records[name]["settings"]
        assert {k: args[k] for k in settings if k != "fake"} == {
            k: v for k, v in settings.items() if k != "fake"}, name
    name = min(records.keys() & known.keys())
    record = records[name]
    assert not tables.recorded(known[name]._replace(flags="--lr 7"), {name: record})


def test_the_tables_are_made_of_the_committed_records(tmp_path):
    names = ("README.md", STUDY.name)
    for name in names:
        shutil.copyfile(STUDY.with_name(name), tmp_path / name)
    for _ in range(2):                                      # what is written is not added to
        tables.write_tables(tmp_path / STUDY.name, reproduce.study(), reproduce.schedules())
        for name in names:
            assert (tmp_path / name).read_text() == STUDY.with_name(name).read_text()
    assert (tmp_path / "weights.svg").read_text() == STUDY.with_name("weights.svg").read_text()
    (tmp_path / "README.md").write_text("Prose that lost its last line.")
    with pytest.raises(InputError, match="README.md: lacks the line <!-- from here on"):
        tables.write_tables(tmp_path / STUDY.name, reproduce.study(), reproduce.schedules())


@pytest.mark.parametrize("line", [b"\xff", b'{"name": "a"', b'{"name": 3, "commit": "b"}',
                                  b'{"name": "voc20/15-1/hrhf/1"}', b"[1]"])
def test_a_damaged_line_of_the_records_is_said_not_left_out(tmp_path, line):
    path = tmp_path / "study.jsonl"
    path.write_bytes(b'{"name": "a", "commit": "b"}\n' + line)
    with pytest.raises(InputError, match="study.jsonl: damaged; remove its damaged line"):
        tables.read_records(path)


def test_a_run_of_the_study_is_done_once_shares_its_step_0_and_its_fakes_are_judged(
        small_study, monkeypatch):
    calls = spy(monkeypatch, train, "main", lambda argv, **options: (argv, options))
    runs = [of_study("Baseline", "--fake none"), of_study("HRHF", ""),
            of_study("x", "--method ewc")]
    for run in runs:
        reproduce.perform(run, small_study)
    judge = reproduce.judge(runs[1])
    assert [(f"--out {small_study.runs / run.name}" in " ".join(argv), "--step0" in argv)
            for run, (argv, _) in zip([*runs[:2], judge, runs[2]], calls, strict=True)] == [
        (True, False), (True, True), (True, False), (True, False)]
    records = tables.read_records(small_study.records)
    none, hrhf, _ = (tables.recorded(run, records) for run in runs)
    assert none["step 0"] == hrhf["step 0"] and "fakes" not in none and len(none["iou"]) == 4
    assert {step: list(scores) for step, scores in hrhf["fakes"].items()} == {
        "1": ["cat"], "2": ["dog"]}                         # made once
    assert 0 <= hrhf["fakes"]["2"]["dog"]["judge IoU"] <= 1
    monkeypatch.setattr(reproduce, "study", lambda: {"table1": runs})
    monkeypatch.setattr(reproduce, "HERE", small_study.records.parent)
    (small_study.records.parent / "results").mkdir()
    (small_study.records.parent / "results/README.md").write_text(tables.MARK)
    small_study.records.rename(small_study.records.parent / "results/study.jsonl")
    monkeypatch.setattr(reproduce, "recorded", lambda run, records: records.get(run.name))
    monkeypatch.setattr(reproduce, "write_tables", lambda *_: calls.append("tables"))
    reproduce.main(["--runs", str(small_study.runs)])       # nothing is left to do
    assert calls[4:] == ["tables"]


def test_a_run_that_diverges_does_not_keep_the_rest_from_running(tmp_path, monkeypatch):
    done = []
    def perform(run, place):
        done.append(run.name)
        if run.seed == 1:
            raise FloatingPointError("try a lower rate")
    monkeypatch.setattr(reproduce, "perform", perform)
    monkeypatch.setattr(reproduce, "read_records", lambda path: {})
    monkeypatch.setattr(reproduce, "write_tables", lambda *_: done.append("tables"))
    with pytest.raises(FloatingPointError, match="1 of 3 diverged; shapes/15-1/mib/1: try a lower"):
        reproduce.main(["--only", "shapes/15-1/mib", "--runs", str(tmp_path)])
    assert done == [*(f"shapes/15-1/mib/{seed}" for seed in (1, 2, 3)), "tables"]


def test_mean_and_spread_are_over_the_seeds_in_percent_and_a_claim_holds_by_a_paired_t_test():
    assert tables.spread([0.10, 0.20, 0.60]) == "30.0 ± 26.5"
    assert tables.spread([0.123]) == "12.3"
    # by hand: mean 0.03, standard error 0.01 / sqrt(3), and 4.30 of these are 0.0248; but 0.0372
    assert tables.verdict([0.02, 0.03, 0.04]) == "holds"
    assert tables.verdict([0.015, 0.03, 0.045]) == "undecided"
    assert tables.verdict([-0.02, -0.03, -0.04]) == "does not hold"
    # mean 0.03; 12.71 standard errors of two seeds are 0.0254 and 0.0381
    assert tables.verdict([0.028, 0.032]) == "holds"
    assert tables.verdict([0.027, 0.033]) == "undecided"
    assert tables.verdict([0.2]) == "undecided"


def rows_of(**scores):
    """{row: {seed: a record}} for reproduce.py's tables; a score of None: no such seed."""
    record = lambda v: {"all": v, "old": v, "new": v, "step 0": 0.5}
    return {row.replace("_", " "): {seed: record(v) for seed, v in enumerate(values, 1)
                                    if v is not None}
            for row, values in scores.items()}


def test_a_table_has_its_rows_means_and_a_claim_the_seeds_that_both_rows_have_from_one_step_0():
    rows = rows_of(HRHF=[0.3, 0.4, 0.9], MiB=[0.1, 0.2, None], Joint=[0.4, 0.5, 0.0],
                   LwF=[None] * 3, ILT=[0.0, 0.35, 0.1], FT=[0.1, 0.2, 0.1])
    rows["MiB"][2]["step 0"] = rows["FT"][3]["step 0"] = 0.6
    assert tables.table_lines(("voc6", "4-1", "disjoint"), rows) == [
        "| voc6 4-1 disjoint | step 0 | old | new | all | n |", "|---|---|---|---|---|---|",
        "| HRHF | 50.0 ± 0.0 | 53.3 ± 32.1 | 53.3 ± 32.1 | 53.3 ± 32.1 | 3 |",
        "| MiB | 55.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1 | 2 |",
        "| Joint | - | 30.0 ± 26.5 | 30.0 ± 26.5 | 30.0 ± 26.5 | 3 |",
        "| LwF | not run | not run | not run | not run | 0 |",
        "| ILT | 50.0 ± 0.0 | 15.0 ± 18.0 | 15.0 ± 18.0 | 15.0 ± 18.0 | 3 |",
        "| FT | 53.3 ± 5.8 | 13.3 ± 5.8 | 13.3 ± 5.8 | 13.3 ± 5.8 | 3 |", "",
        "- HRHF / Joint: 77.5 ± 3.5 %", ""]                 # not of the seed without a Joint
    lines = tables.claim_lines([
        ("table1", ("voc6", "4-1", "disjoint"), rows),
        ("table1", ("shapes", "15-1", "overlapped"),
         rows_of(HRHF=[0.1, 0.1, 0.1], MiB=[0.2, 0.25, 0.3])),
        ("table2", ("voc6", "4-1", "disjoint"), rows)])
    assert lines[7:] == [f"| {claim} |  | not run |  |" for claim, *_ in tables.CLAIMS[4:]]
    assert lines[:7] == [
        "| claim | on | verdict | lead in points (seed) |", "|---|---|---|---|",
        "| HRHF beats MiB | voc6 4-1 | undecided | +20.0 (1), other step 0 (2) |",
        "| HRHF beats MiB | shapes 15-1 overlapped | does not hold | -10.0 (1), -15.0 (2), "
        "-20.0 (3) |",
        "| HRHF beats LwF | voc6 4-1 | not run |  |",
        "| HRHF beats ILT | voc6 4-1 | undecided | +30.0 (1), +5.0 (2), +80.0 (3) |",
        "| HRHF beats fine-tuning | voc6 4-1 | holds | +20.0 (1), +20.0 (2), other step 0 (3) |"]
    rows = {tables.FULL: [0.3, 0.4, None], tables.BASELINE: [0.1, 0.2, None],
            reproduce.REAL: [0.5, 0.4, 0.9]}
    rows = rows_of(**{row: [*scores, other] for (row, scores), other in zip(rows.items(),
                                                                            (0.3, 0.1, 0.9))})
    rows[tables.FULL][4]["step 0"] = 0.6
    assert tables.shares_of_joint_and_replay(rows) == [
        "- replay recovery, (HRHF - Baseline) / (real - Baseline): 75.0 ± 35.4 %"]
    rows[tables.REAL][1]["all"] = 0.105                     # half a point over the Baseline
    assert tables.shares_of_joint_and_replay(rows) == []


def test_the_trade_off_s_picture_has_a_point_a_weight_at_its_old_and_new_mIoU():
    record = lambda old, new: {1: {"old": old, "new": new}}
    svg = xml.etree.ElementTree.fromstring(tables.weights_svg(
        {"MiB, 1": record(0.1, 0.1), "MiB, 3": record(0.2, 0.0), "MiB, 10": {},
         "HRHF, 1": record(0.15, 0.05)}))
    of_kind = lambda kind: [each for each in svg.iter() if each.tag.endswith(kind)]
    left, right, top, bottom = 44, 512, 8, 178              # 10 and 20 %; 10 and 0 %
    assert [(float(c.get("cx")), float(c.get("cy"))) for c in of_kind("circle")] == [
        (left, top), (right, bottom), ((left + right) / 2, (top + bottom) / 2)]
    colours = {name.text: name.get("style").split(":")[1] for name in of_kind("text")
               if name.get("style")}
    assert [c.get("fill") for c in of_kind("circle")] == [
        colours["MiB"], colours["MiB"], colours["HRHF"]]


def test_judged_fakes_become_means_over_classes_and_seeds_and_other_flags_have_rows_of_their_own():
    one = lambda v: dict.fromkeys(tables.JUDGED, v)
    records = {}
    for seed, flags, sets in ((1, "", {"cat": one(0.2), "dog": one(0.4)}),
                              (2, "", {"cat": one(0.5)}),
                              (1, "--no-reuse-fakes", {"cat": one(0.125)})):
        run = reproduce.Run("voc20", "15-1", "disjoint", "", flags, seed)
        records[run.name] = {"name": run.name, "command": run.command, "fakes": {"1": sets}}
    rows = [line for line in tables.fakes_lines(reproduce.study(), records)
            if re.search(r"\d \|$", line)]
    assert rows == ["| voc20 15-1 disjoint step 1 |" + " 40.0 ± 14.1 |" * 6 + " 2 |",
                    "| voc20 15-1 disjoint step 1 --no-reuse-fakes |" + " 12.5 |" * 6 + " 1 |",
                    "| cat |" + " 35.0 ± 21.2 |" * 6 + " 2 |", "| dog |" + " 40.0 |" * 6 + " 1 |"]


def test_the_study_s_photographs_and_weights_are_those_of_its_records(finished, tmp_path):
    check = lambda root: [photographs.check(root / name, name) for name in ("voc6", "voc20")]
    for folder in (finished / "data", Path("nowhere")):
        with pytest.raises(InputError, match=f"{folder}/voc6: not the study's voc6"):
            check(folder)
    for name, folder in (("voc6", "voc6"), ("voc20", "voc20/VOCdevkit/VOC2012")):
        lists = tmp_path / folder / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        for split, ids in json.loads((HERE / f"results/{name}.json").read_text()).items():
            (lists / f"{split}.txt").write_text("".join(f"{each}\n" for each in ids))
    (tmp_path / "voc6/classes.txt").write_text("\n".join(photographs.VOC6_CLASSES))
    check(tmp_path)
    (tmp_path / "other.pth").write_bytes(b"other")
    for weights, text in (("other.pth", "other.pth: not torchvision's"),
                          ("no.pth", "no.pth: No such")):
        with pytest.raises(InputError, match=text):
            reproduce.check_weights(str(tmp_path / weights))
    for photos, text in ((finished, "not the study's voc20"), (tmp_path, "not torchvision's")):
        with pytest.raises(InputError, match=text):         # before hours of runs
            reproduce.main(["--only", "figure3", "--photos", str(photos),
                            "--weights", str(tmp_path / "other.pth")])
    (tmp_path / "voc20/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").rename(tmp_path / "val")
    with pytest.raises(InputError, match="not the study's voc20, .*val.txt differs"):
        check(tmp_path)
    (tmp_path / "voc6/classes.txt").write_text("\n".join(reversed(photographs.VOC6_CLASSES)))
    with pytest.raises(InputError, match="not the study's voc6, .*classes.txt differs"):
        check(tmp_path)
    with pytest.raises(InputError, match="made: no VOC 2012 there"):
        photographs.main([str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()


def test_voc6_and_voc20_are_made_out_of_voc_2012(tmp_path, monkeypatch):
    voc = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (voc / folder).mkdir(parents=True)
    ids = np.zeros((300, 400), np.uint8)                    # b is small, and stays so
    # cat, cow, dog, horse, person, sheep, void, aeroplane
    for k, value in enumerate((8, 10, 12, 13, 15, 17, 255, 1)):
        ids[:, 50 * k:50 * k + 50] = value
    for folder, name in (("SegmentationClassAug", "a"), ("SegmentationClass", "b")):
        step = 1 if name == "a" else 2
        Image.fromarray(ids[::step, ::step]).save(voc / folder / f"{name}.png")
        Image.fromarray(np.full((300 // step, 400 // step, 3), 90,
                                np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/voc6.json").write_text('{"train": ["a"], "val": ["b"]}')
    (tmp_path / "results/voc20.json").write_text('{"train_aug": ["a"], "val": ["b"]}')
    monkeypatch.setattr(photographs, "HERE", tmp_path)
    photographs.main([str(tmp_path)])
    for split, size in (("train", (256, 192)), ("val", (200, 150))):
        six, twenty = (data.load(kind, tmp_path / name, split)
                       for kind, name in (("folder", "voc6"), ("voc", "voc20")))
        assert six.classes == "background cat cow dog horse person sheep".split()
        for made, expected in ((six, [1, 2, 3, 4, 5, 6, 255, 0]),
                               (twenty, [8, 10, 12, 13, 15, 17, 255, 1])):
            assert len(made.images) == 1
            image, mask = made.read(0)
            assert image.size == mask.size == size
            assert [np.array(mask)[100, (2 * k + 1) * size[0] // 16] for k in range(8)] == expected


@real_data
def test_the_committed_lists_of_voc6_and_voc20_are_those_of_the_real_ones():
    for name, where in (("voc6", "voc6"), ("voc20", "voc20/VOCdevkit/VOC2012")):
        for split, ids in json.loads((HERE / f"results/{name}.json").read_text()).items():
            listing = SHARED / f"data/{where}/ImageSets/Segmentation/{split}.txt"
            assert ids == listing.read_text().split()


def test_the_command_that_the_list_shows_does_what_the_study_does(small_study, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "main",
                        lambda argv, real_replay=False: asked.append((argv, real_replay)))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: Path(_[1]).touch())
    (small_study.runs / "shapes").mkdir(parents=True)
    place = small_study._replace(roots={"shapes": Path("my data")})
    for flags, real in (("--fake none", False), (reproduce.REPLAY, True)):
        run = of_study("x", flags)
        python, *arguments = shlex.split(reproduce.shell_command(run, place))
        assert python == "python" and arguments[0] == ("-c" if real else "train.py")
        if real:
            exec(arguments[1], {})
        reproduce.train_run(run, place)
        study, shared = asked[-1][0], "--step0" in asked[-1][0]
        assert train.parse(study[:-2] if shared else study) == train.parse(
            asked[-2][0] if real else arguments[1:])
        assert [real_replay for _, real_replay in asked[-2 if real else -1:]] == [real] * (1 + real)
    reproduce.main(["--list", "--photos", "photos"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split()[0] for line in lines}) == len(lines)
    of_train = [shlex.split(line)[3:] for line in lines if " train.py " in line]
    # none in another's
    assert len({train.parse(flags).out for flags in of_train}) == len(of_train)
    assert {train.parse(flags).data_root for flags in of_train} == {
        "data", "photos/voc6", "photos/voc20"}


def test_a_name_that_nothing_has_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="--only nothing: in no run's name"):
        reproduce.main(["--only", "nothing", "--runs", str(tmp_path)])


def test_the_pictures_are_of_finished_runs_whose_networks_are_trained_if_they_are_not_there(
        small_study, tmp_path, monkeypatch):
    trained, run = [], reproduce.figure_runs()["HRHF"]
    folder = small_study.runs / run.name
    folder.mkdir(parents=True)
    (folder / "step-0.pth").touch()                         # a run that was stopped after step 0

    def train_run(run, place):
        trained.append(run.name)
        for name in ("step-2.pth", "step-10.pth", "results.json"):
            (folder / name).touch()
        return folder
    monkeypatch.setattr(reproduce, "train_run", train_run)
    monkeypatch.setattr(reproduce, "load_model", lambda path: (path.name, {}))
    assert [reproduce.network(run, small_study)[0] for _ in range(2)] == ["step-10.pth"] * 2
    assert trained == [run.name] * 2                        # other settings would be refused
    shutil.rmtree(folder)
    folder.mkdir()
    monkeypatch.setattr(fakes, "main",
                        lambda argv: trained.append(argv[argv.index("--checkpoint") + 1]))
    reproduce.figure3(small_study)
    assert trained[2:] == [run.name, str(folder / "step-0.pth")]
    assert "share" in tables.read_records(small_study.records)["figure3"]


def test_figure_4_ends_its_rows_with_the_truth_and_names_what_each_fake_was_asked_for(
        finished, small_study, monkeypatch):
    monkeypatch.setitem(reproduce.TASK, "voc20", "1-1")
    models = {run.name: reproduce.load_model(finished / f"run/step-{k}.pth")
              for k, run in enumerate(reproduce.figure_runs().values())}
    monkeypatch.setattr(reproduce, "network", lambda run, place: models[run.name])
    test_set = data.load("folder", finished / "data", "val")
    monkeypatch.setattr(data, "load", lambda *_: test_set)
    hrhf = small_study.runs / reproduce.figure_runs()["HRHF"].name
    hrhf.parent.mkdir(parents=True)
    hrhf.symlink_to(finished / "run")
    reproduce.figure4(small_study._replace(roots={"voc20": finished / "data"}), count=2)
    folder = small_study.records.parent
    assert (folder / "fakes.png").read_bytes() == (finished / "run/fakes-step-1.png").read_bytes()
    lines = map(json.loads, (finished / "run/fakes-step-1/manifest.jsonl").read_text().splitlines())
    names = [test_set.classes[line["classes"][1]] for line in lines]    # one old class in step 1
    assert tables.read_records(small_study.records)["figure4"]["asked"] == names[:16]
    image, *predictions, truth = report.cut(folder / "figure4.png", 5, 1)[0][0]
    x, shown = data.View(test_set, [0], torch.arange(256), data.test_transform(32))[0, 0]
    expected = [data.denormalise(x), *(fakes.segment(model, x[None])[0]
                                       for model, _ in models.values()), data.colour(shown)]
    for panel, pixels in zip((image, *predictions, truth), expected, strict=True):
        assert np.abs(np.array(panel).astype(int) - pixels.permute(1, 2, 0).numpy()).max() <= 1


# ------------------------------------------------------------------------ a GPU, where there is one

@pytest.fixture
def gpu(monkeypatch):
    """The first GPU, without TF32."""
    if not GPUS:
        pytest.skip("no GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda", 0)


@pytest.mark.cuda
@pytest.mark.parametrize("bf16", [True, False])
def test_a_task_on_a_gpu_in_either_half_precision_scores_again_exactly(
        gpu, finished, tmp_path, monkeypatch, bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    train_on(finished, tmp_path / "run",                    # graphs, then forked loaders
             "--epochs 2 --fake-sizes 16,32 --fake-steps 40 --workers 1")
    evaluation.main([f"{tmp_path}/run"])                    # exits where a pixel has moved
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["device"] == "cuda:0" and results["settings"]["amp"]
    last = torch.load(tmp_path / "run/step-2.pth", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in last.values())


@pytest.mark.cuda
def test_fakes_on_a_gpu_are_the_same_twice(gpu, monkeypatch):
    net = tiny((4,)).to(gpu)
    make = lambda: seginversion.invert(net, one_hot(1, 2, 3), 5.0, sizes=[16, 32], steps=40,
                                       part=2, spectrum=1.0)
    fakes, captured = make(), seginversion.captured
    # garbage that is collected during a capture ends it
    monkeypatch.setattr(seginversion, "captured", lambda network, x: captured(
        lambda view: (gc.collect(), network(view))[1], x))
    assert torch.equal(make(), fakes)


@pytest.mark.cuda
def test_a_captured_network_makes_the_fakes_of_a_plain_one(gpu, monkeypatch):
    net, seen = tiny((4,)).to(gpu), []
    make = lambda: seginversion.invert(net, one_hot(1, 2, 3, 1, 2), 5.0, sizes=[32, 48], steps=40,
                                       part=2)
    captured = seginversion.captured
    def capture(network, x):
        seen.append(tuple(x.shape))
        graph = captured(network, x)
        assert graph is not network
        return graph
    monkeypatch.setattr(seginversion, "captured", capture)
    fakes = make()
    assert seen == [(2, 3, 32, 32), (1, 3, 32, 32), (2, 3, 48, 48), (1, 3, 48, 48)]
    monkeypatch.setattr(seginversion, "captured", lambda network, x: network)
    torch.testing.assert_close(fakes, make(), rtol=0, atol=1e-3)


@pytest.mark.cuda
def test_losses_gradients_and_scores_on_a_gpu_are_the_cpus(gpu, tmp_path):
    s, t, images = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7), torch.randn(2, 3, 32, 32)
    labels, net, sides = torch.randint(5, (2, 96, 112)), tiny((4,)).requires_grad_(False), []
    make_folder(tmp_path, val=6)
    view = data.View(data.load("folder", tmp_path, "val"), range(6),
                     protocol.label_map([[1, 2, 3]], 0, "test"), data.test_transform(32))
    for device in (torch.device("cpu"), gpu):
        net.to(device)
        x, logits = (v.to(device).requires_grad_() for v in (images, s))
        l, terms = fast.in_bands(distill.hrhf_loss, logits, t.to(device), labels.to(device),
                                 ["seg"])
        with seginversion.BatchNormMatching(net) as matching:
            distance = matching.loss(matching(x)[1])
            gradients = torch.autograd.grad([l, distance], [logits, x])
        confusion = evaluation.evaluate(net, view, World(device=device))
        sides.append([v.detach().cpu() for v in (l, *terms.values(), *gradients, confusion)])
    (*cpu, of_cpu), (*cuda, of_cuda) = sides
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-6)
    assert (of_cpu - of_cuda).abs().sum() <= 1e-3 * of_cpu.sum()


@pytest.mark.cuda
def test_every_convolution_on_a_gpu_gives_channels_last(gpu):
    net, layouts = tiny((4,)).to(gpu), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: layouts.append(
                output.is_contiguous(memory_format=torch.channels_last)))
    net(torch.randn(2, 3, 64, 64, device=gpu))
    assert len(layouts) > 5 and all(layouts)


def train_on_a_gpu(rank, folder, backend, device, size):
    """Four iterations of HRHF on Shapes by one of `size` ranks, in float32; saves the weights."""
    os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE            # importing this file hid them
    torch.cuda.is_available = lambda: True
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", device[rank])
    torch.cuda.set_device(device)
    if size > 1:
        torch.distributed.init_process_group(backend, rank=rank, world_size=size,
                                             init_method=f"file://{folder}/rendezvous")
    student, teacher = tiny((16, 1)).to(device), tiny((16,), seed=1).to(device).eval()
    view = data.View(data.Shapes("val"), range(8),
                     protocol.label_map([[*range(1, 16)], [16]], 1, "train"),
                     data.train_transform(64))
    args = train.parse("--batch-size 8 --fake none --max-iters 4 --workers 0 --no-amp".split())
    run = Run(folder / f"run-{size}", World(rank, size, device))
    run.folder.mkdir(exist_ok=True)
    objective = methods.METHODS["hrhf"].objective_of(student, teacher.requires_grad_(False), 1.0)
    train.train_step(student, objective, view, 1, args, run, run_world := World(rank, size, device))
    weights = {k: v.cpu() for k, v in student.state_dict().items()}
    torch.save(weights, folder / f"weights-{rank}-of-{size}.pt")
    run_world.barrier()
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("backend, devices", [("gloo", (0, 0)), ("nccl", (0, 1))])
def test_two_ranks_on_gpus_with_shared_batch_norm_equal_one(
        gpu, tmp_path, monkeypatch, backend, devices):
    if GPUS <= devices[1]:
        pytest.skip("one GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    for size in (1, 2):
        torch.multiprocessing.spawn(train_on_a_gpu, (tmp_path, backend, devices, size), nprocs=size)
    one, *two = [torch.load(tmp_path / f"weights-{name}.pt")
                 for name in ("0-of-1", "0-of-2", "1-of-2")]
    for weights in two:
        torch.testing.assert_close(weights, one, rtol=1e-2, atol=1e-4)


@pytest.mark.cuda
def test_neither_loop_waits_for_the_gpu(gpu, tmp_path, monkeypatch):
    """torch's own sync debug mode is the oracle; from the second iteration on, until a log line."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("float16's scaler waits")
    mode, net = torch.cuda.set_sync_debug_mode, tiny((4,)).to(gpu)
    others = {64: seginversion.statistics_of(net, [torch.randn(2, 3, 64, 64, device=gpu)], 64)}
    try:
        seginversion.invert(net, one_hot(1, 2), torch.full((2, 4), 5.0), sizes=[64], steps=24,
                            part=1, spectrum=1.0, others=others,
                            on_step=lambda i, _: mode("error"))
        mode("default")
        add, log = train.Progress.add, train.Progress.log
        monkeypatch.setattr(train.Progress, "add", lambda *a: (add(*a), mode("error")))
        monkeypatch.setattr(train.Progress, "log", lambda *a: (mode("default"), log(*a)))
        view = data.View(data.Shapes("val"), range(64),
                         protocol.label_map([[*range(1, 16)], [16]], 1, "train"),
                         data.train_transform(64))
        args = train.parse("--batch-size 8 --fake none --max-iters 6 --workers 0 --amp".split())
        student, teacher = tiny((16, 1)).to(gpu), tiny((16,), seed=1).to(gpu).eval()
        hrhf = methods.METHODS["hrhf"].objective_of(student, teacher.requires_grad_(False), 1.0)
        train.train_step(student, hrhf, view, 1, args, Run(tmp_path), World(device=gpu))
    finally:
        mode("default")


@pytest.mark.cuda
def test_memory_on_a_gpu_at_the_papers_size_is_what_the_plan_says(gpu, monkeypatch):
    # cuDNN's trials of algorithms take what memory there is
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    if torch.cuda.get_device_properties(gpu).total_memory < 38e9:
        pytest.skip("a smaller GPU than the paper's size needs")
    args, on_gpu = train.parse("--dataset voc --pretrained none".split()), []
    phases = lambda device: {
        name: (work, there) for name, _, _, _, work, there in bench.phases(
            args, [16, 1], 1000, 16, 8, gpus=4, device=device,
            steps=1 if device == "meta" else 20)}
    planned = phases("meta")
    for name, (work, _) in phases(gpu).items():
        work()                                              # momentum is there
        on_gpu.append((name, bench.memory_added(work) / bench.cost(planned[name][0])[1]))
    assert all(ratio < 1.25 for _, ratio in on_gpu), on_gpu


# -------------------------------------------------------------------------------------- README.md

README = (HERE / "README.md").read_text()


def readme_commands():
    """Every command of ours in README.md, without what a shell does around it."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    inline = re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", README)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    found = [re.search(r"(\w+)\.py(.*)", line.split("#")[0]) for line in lines + inline]
    return sorted({(m[1], m[2].strip()) for m in found if m and (HERE / f"{m[1]}.py").exists()})


def test_every_command_in_the_readme_parses():
    scripts = {"train": train, "eval": evaluation, "fakes": fakes, "data": data, "bench": bench,
               "report": report, "reproduce": reproduce}
    commands = readme_commands()
    assert len(commands) >= 15 and {script for script, _ in commands} == set(scripts)
    for script, arguments in commands:
        if "--method sure" not in arguments:                # README's own method: see below
            scripts[script].parse(shlex.split(arguments))


def test_every_flag_of_the_readmes_table_of_tables_parses():
    table = README.split("## The paper's tables")[1].split("## Results")[0]
    flags = [f for line in table.splitlines() if re.match(r"\| [\d,]+ ", line)
             for f in re.findall(r"`(--[^`]*)`", line)]
    assert len(flags) >= 8
    for text in flags:
        train.parse([*("--dataset voc --task 15-1".split() if "--dataset" not in text else ()),
                     *shlex.split(text), *("hrhf",) * text.endswith("--method")])
    assert set(re.search(r"`(ft pi [^`]*)`", table)[1].split()) == set(methods.METHODS)


def test_the_readmes_file_map_names_the_files_that_are_there():
    table = README.split("## Files")[1].split("##")[0]
    assert set(re.findall(r"`(\w+\.py)`",
                          table.split("\n\n")[1])) == {p.name for p in HERE.glob("*.py")}
    assert len(README.encode()) <= 12 * 1024


def test_the_readmes_numbers_are_those_of_the_records():
    records = tables.read_records(STUDY)
    first, none = (tables.recorded(run, records) for run in reproduce.study()["first"])
    assert evaluation.table(first["final"], {"dataset": "shapes", "task": "", "setting": "",
                                             "method": ""}) in README
    percent = lambda record: [f"{100 * record[key]:.1f}" for key in ("old", "new", "all")]
    assert " / ".join(percent(none)) in README.replace("\n", " ")
    assert f"({100 * first['step 0']:.1f} then)" in README
    study, table = reproduce.study(), README.split("What two CPU")[1].split("##")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                      for line in table.splitlines() if line.startswith("|")]
    assert head[1:] == ["HRHF", "MiB", "no fakes", "noise", "Joint"]
    where = (("table1", "HRHF"), ("table1", "MiB"), ("table2", tables.BASELINE),
             ("table2", "+ Noise"), ("table1", "Joint"))
    table2 = {"15-1": ["27.5", "27.6"], "15-5": ["68.3", "68.1"]}           # the paper's, no code
    for name, *cells in rows:
        dataset, task = re.search(r"(VOC|\w+`?) (\d+-\d)", name).groups()
        if dataset == "VOC":
            theirs = evaluation.paper_results()["voc", task, "disjoint"]
            hrhf, mib, joint = (str(theirs[method][2]) for method in ("hrhf", "mib", "joint"))
            assert cells == [hrhf, mib, *table2[task], joint]
            continue
        for (table, row), cell in zip(where, cells):
            scores = [100 * record["all"] for run in study[table]
                      if run[:4] == (dataset.rstrip("`"), task, "disjoint", row)
                      and (record := tables.recorded(run, records))]
            fewer = f" (n = {len(scores)})" * (len(scores) != len(reproduce.SEEDS))
            assert cell == (f"{np.mean(scores):.1f}{fewer}" if scores else "not run")
    report = tables.report(study, [], records)
    said = re.findall(r"holds on `voc20` (\d+-\d): ([^.]*)\.", README.replace("\n", " "))
    assert [task for task, _ in said] == ["15-1", "15-5"]
    for task, text in said:
        holds = re.findall(rf"^\| (.*) \| voc20 {task} \| holds \|", report, re.M)
        assert text.split(", ") == holds


def test_the_readmes_rows_of_the_paper_are_those_of_its_tables():
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in
             README.split("## Results")[1].split("What two CPU")[0].splitlines() if "|" in line]
    assert cells[0] == ["HRHF", "VOC 19-1", "15-5", "15-1", "ADE 100-50", "100-10", "50-50"]
    for (_, *disjoint), k in ((cells[2], "disjoint"), (cells[3], "overlapped")):
        theirs = [evaluation.paper_results()["ade" if i > 2 else "voc", name.split()[-1], k]["hrhf"]
                  for i, name in enumerate(cells[0][1:]) if disjoint[i]]
        assert [c for c in disjoint if c] == [" / ".join(f"{v:.1f}" for v in row) for row in theirs]
    assert cells[4] == ["ours", *["not run"] * 6]


def test_the_readmes_ratios_are_those_of_the_benchmark():
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \|", (HERE / "results/bench.md").read_text(), re.M)
    median = lambda start: [value for name, value in rows if name.startswith(start)]
    text = README.split("## Speed")[1].split("##")[0].replace("\n", " ")
    bare = median("ours / bare")
    assert f"{min(bare)} to {max(bare)} of the network's bare" in text
    assert f"training step {median('HRHF')[0]} of" in text
    assert f"{median('time, batch 4, 151 classes')[0]} of the time" in text
    assert f"1/{median('peak memory, measured, batch 8')[0]} of the memory" in text


def test_the_readmes_own_method_runs_two_steps_and_stands_in_the_comparison(
        finished, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    exec(code, vars(methods) | {"METHODS": methods.METHODS})
    monkeypatch.setattr(train, "METHODS", methods.METHODS)
    train_on(finished, tmp_path / "run", "--task 2-1 --epochs 1 --method sure")
    log = read_log(tmp_path / "run")
    assert [set(line) & {"kd", "seg"} for line in log if "iteration" in line][-1] == {"kd", "seg"}
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--compare", "run"])
    assert re.search(r"\| sure .*--num-fakes 8", capsys.readouterr().out)
