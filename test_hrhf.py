"""
pytest                     # every formula against an independent oracle, then the whole command line

No downloads, no GPU. Sizes are tiny; the code under test is the code that runs at full size.
"""
import copy
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import data
import distill
import eval as evaluation
import model
import seginversion
import train
from data import InputError
from saa import scale_aware_aggregation

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"                             # real data, where a checkout has it beside it
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data beside the project")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def logits(*shape, scale=3.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


# --------------------------------------------------------------------------------------- saa.py, Eq. 1

def test_saa_is_equation_1_in_a_naive_loop_value_and_gradient():
    s, r = logits(2, 3, 4, 5), torch.tensor([[0.5, 1, 5], [10, 20, 0.1]])
    naive = torch.stack([torch.stack([
        sum(torch.exp(r[b, k] * s[b, k, i, j]) for i in range(4) for j in range(5)).div(20).log() / r[b, k]
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


@pytest.mark.parametrize("r", [1e-8, 1e-4])
def test_saa_tends_to_the_mean_for_small_r_in_float32(r):
    s = torch.randn(2, 3, 32, 32) * 10
    torch.testing.assert_close(scale_aware_aggregation(s, r), s.mean((2, 3)), atol=1e-2 if r > 1e-6 else 1e-5, rtol=0)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_saa_is_finite_for_products_of_ten_thousand(magnitude):
    s = torch.full((1, 2, 8, 8), magnitude / 20, requires_grad=True)
    y = scale_aware_aggregation(s, 20)
    torch.testing.assert_close(y, torch.full((1, 2), magnitude / 20))
    y.sum().backward()
    torch.testing.assert_close(s.grad, torch.full_like(s, 1 / 64))


def test_saa_grows_with_r_and_its_gradient_sums_to_one():
    s = logits(1, 4, 6, 6)
    values = [scale_aware_aggregation(s, r) for r in (0, 0.5, 1, 5, 10, 20, math.inf)]
    assert all(bool((b >= a).all()) for a, b in zip(values, values[1:]))
    for y in values:
        gradient, = torch.autograd.grad(y.sum(), s)
        torch.testing.assert_close(gradient.sum((2, 3)), torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("r", [-1, -math.inf, math.nan, torch.tensor([[1.0, -0.1]])])
def test_saa_refuses_a_negative_r(r):
    with pytest.raises(ValueError, match="r must be >= 0"):
        scale_aware_aggregation(torch.zeros(1, 2, 3, 3), r)


# ----------------------------------------------------------------------------------- distill.py, Eq. 3-5

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
                total = total - p[b, 0, i, j] * (q[b, 0, i, j] + q[b, 3, i, j] + q[b, 4, i, j]).log()
                total = total - sum(p[b, c, i, j] * q[b, c, i, j].log() for c in (1, 2))
    loss = distill.distillation_loss(student, teacher)
    torch.testing.assert_close(loss, total / 24)            # sum over classes, mean over 2 x 3 x 4 pixels
    mine, = torch.autograd.grad(loss, student, retain_graph=True)
    theirs, = torch.autograd.grad(total / 24, student)
    torch.testing.assert_close(mine, theirs)


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(1, 3, 2, 2), logits(1, 2, 2, 2)
    sum(distill.hrhf_loss(student, teacher, torch.zeros(1, 2, 2, dtype=torch.uint8)).values()).backward()
    assert teacher.grad is None and student.grad is not None


def test_distillation_of_one_pixel_computed_by_hand():
    teacher = torch.tensor([0.50, 0.50]).log().view(1, 2, 1, 1)
    student = torch.tensor([0.20, 0.25, 0.55]).log().view(1, 3, 1, 1)      # background becomes 0.75
    expected = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    assert distill.distillation_loss(student, teacher).item() == pytest.approx(expected)


def test_label_merge_takes_new_labels_and_else_the_teacher_pixel_by_pixel():
    teacher = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 5, 0], [0, 0, 5]]).T.reshape(1, 3, 1, 5)
    labels = torch.tensor([[[0, 0, 0, 3, 255]]], dtype=torch.uint8)
    merged = distill.label_merge(teacher, labels, 3)
    assert merged.tolist() == [[[0, 1, 2, 3, 255]]] and merged.dtype == torch.int64


def test_a_saturated_teacher_never_wins_over_a_new_label():
    teacher = torch.tensor([0.0, 1e4, 0.0]).view(1, 3, 1, 1)
    assert teacher.softmax(1)[0, 1] == 1.0
    assert distill.label_merge(teacher, torch.tensor([[[3]]]), 3).item() == 3


def test_segmentation_loss_is_equation_4_and_leaves_void_out():
    s = logits(2, 5, 3, 4)
    labels = torch.randint(5, (2, 3, 4))
    torch.testing.assert_close(distill.segmentation_loss(s, labels), F.cross_entropy(s, labels))
    labels[0, 0] = 255
    loss = distill.segmentation_loss(s, labels.to(torch.uint8))
    picked = [-s.log_softmax(1)[b, labels[b, i, j], i, j] for b in range(2) for i in range(3) for j in range(4)
              if labels[b, i, j] != 255]
    assert len(picked) == 20
    torch.testing.assert_close(loss, sum(picked) / 20)
    gradient, = torch.autograd.grad(loss, s)
    assert (gradient[0, :, 0] == 0).all() and (gradient[0, :, 1] != 0).all()


def test_segmentation_loss_of_an_image_that_is_all_void_is_zero():
    s = logits(1, 3, 2, 2)
    loss = distill.segmentation_loss(s, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


def test_hrhf_loss_is_equation_5():
    student, teacher = logits(2, 4, 3, 3), logits(2, 3, 3, 3)
    labels = torch.randint(2, (2, 3, 3)) * 3
    terms = distill.hrhf_loss(student, teacher, labels, lam=2.5)
    merged = torch.where(labels == 3, 3, teacher.argmax(1))
    assert list(terms) == ["kd", "seg"]
    torch.testing.assert_close(terms["kd"], 2.5 * distill.distillation_loss(student, teacher))
    torch.testing.assert_close(terms["seg"], F.cross_entropy(student, merged))


def test_the_method_upsamples_to_the_labels_and_is_plain_cross_entropy_at_step_0():
    student, teacher = nn.Conv2d(3, 4, 1, stride=4), nn.Conv2d(3, 3, 1, stride=4)
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(4, (2, 16, 16), dtype=torch.uint8)
    up = lambda s: F.interpolate(s, (16, 16), mode="bilinear", align_corners=False)
    first = distill.hrhf(student, None, (images, labels))
    torch.testing.assert_close(first, {"seg": F.cross_entropy(up(student(images)), labels.long())})
    later = distill.hrhf(student, teacher, (images, labels), lam=3.0)
    torch.testing.assert_close(later, distill.hrhf_loss(up(student(images)), up(teacher(images)), labels, 3.0))
    sum(later.values()).backward()                          # the teacher's inference mode does not get in the way
    assert student.weight.grad is not None and teacher.weight.grad is None


# ------------------------------------------------------------------------------------------- model.py

def tiny(classes=(3, 1), seed=0):
    torch.manual_seed(seed)
    return model.DeepLabV3("tiny", list(classes))


@pytest.mark.parametrize("backbone, stride, norms", [
    ("resnet101", 16, 107), ("resnet50", 16, 56), ("resnet18", 16, 23), ("mobilenet_v2", 16, 54), ("tiny", 8, 7)])
def test_backbones_have_their_stride_channels_and_number_of_batch_norms(backbone, stride, norms):
    net = model.DeepLabV3(backbone, [16, 1, 2]).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 19, 64 // stride, 96 // stride)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == norms     # MiB's ResNet-101: 107
    assert net.classes_per_step == [16, 1, 2]


def test_the_last_resnet_stage_has_stride_1_and_dilation_2_in_every_block_and_leaky_relus():
    net = model.DeepLabV3("resnet50", [2])
    convs = [m for m in net.body[-1].modules() if isinstance(m, nn.Conv2d)]
    assert all(c.stride == (1, 1) for c in convs)
    assert [c.dilation for c in convs if c.kernel_size == (3, 3)] == [(2, 2)] * 3
    assert not any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in net.modules())
    assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}


def test_aspp_is_its_definition_written_out():
    aspp = model.ASPP(5, 4, (1, 2, 3)).eval()
    x = torch.randn(2, 5, 7, 9)
    lrelu = lambda t: F.leaky_relu(t, 0.01)
    (norm1, _), merge = aspp.merge[0], aspp.merge[1]
    reduce, (norm2, _), expand = aspp.pool
    branches = [F.conv2d(x, aspp.branches[0].weight)] + [
        F.conv2d(x, b.weight, padding=d, dilation=d) for b, d in zip(aspp.branches[1:], (1, 2, 3))]
    y = F.conv2d(lrelu(norm1(torch.cat(branches, 1))), merge.weight)
    pooled = F.conv2d(lrelu(norm2(F.conv2d(x.mean((2, 3), keepdim=True), reduce.weight))), expand.weight)
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
    windows = F.avg_pool2d(x, 32, 1)                        # (9, 5): padded by 31 rows and columns, 15 first
    torch.testing.assert_close(out[:, :, 15:24, 15:20], windows / (1 + 1e-5), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[:, :, 0, 0], windows[:, :, 0, 0] / (1 + 1e-5), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[:, :, -1, -1], windows[:, :, -1, -1] / (1 + 1e-5), rtol=1e-4, atol=0)
    flat = aspp.train()(x)
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))


def test_student_equal_to_teacher_with_background_init_gives_the_teachers_probabilities_back():
    teacher = tiny((16,)).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.classifiers[0].bias.normal_()
        teacher.classifiers[0].bias.copy_(student.classifiers[0].bias)
    student.add_classes(5)
    x = torch.randn(2, 3, 32, 32)
    s, t = student(x), teacher(x).detach()
    assert s.shape[1] == 21
    torch.testing.assert_close(distill.probability_rearrange(s, 16).exp(), t.softmax(1))
    torch.testing.assert_close(s.softmax(1)[:, 16:], (t.softmax(1)[:, :1] / 6).expand(-1, 5, -1, -1))
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


def mapillary_file(path, net, drop=(), rename=()):
    """A file like Mapillary's: its names, DDP's prefix, signed norm weights, no head, no batch counter."""
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
    for key in drop:
        del state[key]
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
    torch.testing.assert_close(loaded[1].weight, net.bn1.weight.abs() + 1e-5)
    torch.testing.assert_close(loaded[1].bias, net.bn1.bias, rtol=0, atol=0)
    block = loaded[6][0]                                    # layer3.0
    torch.testing.assert_close(block.conv2.weight, net.layer3[0].conv2.weight, rtol=0, atol=0)
    torch.testing.assert_close(block.bn3.weight, net.layer3[0].bn3.weight.abs() + 1e-5)
    torch.testing.assert_close(block.downsample[0].weight, net.layer3[0].downsample[0].weight, rtol=0, atol=0)
    torch.testing.assert_close(block.downsample[1].weight, net.layer3[0].downsample[1].weight.abs() + 1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_a_torchvision_file_loads_bit_for_bit(tmp_path, backbone):
    net = torchvision.models.get_model(backbone)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    body = model.DeepLabV3(backbone, [2], str(tmp_path / "w.pth")).body
    theirs = [v for k, v in net.state_dict().items() if not k.startswith(("fc.", "classifier.", "features.18."))]
    for mine, his in zip(body.state_dict().values(), theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=0)


def test_an_incompatible_weights_file_names_the_first_missing_and_unexpected_key(tmp_path):
    path = tmp_path / "bad.pth.tar"
    mapillary_file(path, torchvision.models.resnet50(), rename=[("module.mod1.conv1.weight", "module.mod1.conv9.weight")])
    with pytest.raises(InputError, match=r"bad.pth.tar.*1 missing, first conv1.weight; 1 unexpected, first conv9.weight"):
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


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    net = tiny((4, 2))
    net(torch.randn(4, 3, 32, 32))                          # moves the running statistics
    model.save_model(net, tmp_path / "c.pth", crop=32, classes=["a"] * 6)
    back, about = model.load_model(tmp_path / "c.pth")
    assert back.classes_per_step == [4, 2] and about["crop"] == 32 and not back.training
    for mine, his in zip(back.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(mine, his)
    (tmp_path / "c.pth").write_bytes(b"PK")
    with pytest.raises(InputError, match="not a checkpoint"):
        model.load_model(tmp_path / "c.pth")
