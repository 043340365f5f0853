"""
DeepLab-v3 as MiB built it (the network of the paper, Sec. 4.2), in plain PyTorch.

    backbone, output stride 16  ->  ASPP, 256 channels  ->  one 1x1 classifier per learning step

"Activated" batch norm is BatchNorm2d + LeakyReLU(0.01): the in-place form of the original keeps no
layer input, and SegInversion needs the statistics of just those inputs.
"""
import hashlib
import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from run import InputError, check_file, nearest, printable, reason, write_atomically

SLOPE = 0.01                                            # LeakyReLU slope of activated batch norm


def norm_act(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE, inplace=True))


def conv_norm_act(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), norm_act(c_out))


def dilate(stage):
    """Turn a stage's stride into dilation 2 of all its 3x3 convolutions, the first included (MiB).

    torchvision's own `replace_stride_with_dilation` leaves the first one undilated and refuses
    BasicBlock, hence this function.
    """
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)


def resnet_body(net):
    for module in net.modules():                            # ReLU -> LeakyReLU, as in activated BN
        if hasattr(module, "relu"):
            module.relu = nn.LeakyReLU(SLOPE, inplace=True)
    dilate(net.layer4)
    channels = net.fc.in_features
    net.fc = None
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool,
                         net.layer1, net.layer2, net.layer3, net.layer4), channels


def mobilenet_body(net):
    dilate(net.features[14:18])                             # keeps its ReLU6: trained with it
    return net.features[:18], 320                           # without the 1x1 to 1280 channels


def tiny_body(_):
    """Four blocks, stride 8, for the embedded `shapes` set: a CPU runs a step in a blink."""
    return nn.Sequential(conv_norm_act(3, 32, 2), conv_norm_act(32, 64, 2),
                         conv_norm_act(64, 128, 2), conv_norm_act(128, 128)), 128


# name -> body, head width, ASPP dilations (6, 12, 18: output stride 16; MiB)
BACKBONES = {
    "resnet101": (resnet_body, 256, (6, 12, 18)),           # the paper's
    "resnet50": (resnet_body, 256, (6, 12, 18)),
    "resnet18": (resnet_body, 256, (6, 12, 18)),
    "mobilenet_v2": (mobilenet_body, 256, (6, 12, 18)),
    "tiny": (tiny_body, 64, (1, 2, 3)),
}


# ------------------------------------------------------------------------- pretrained weights

def from_mapillary(state):
    """Keys of Mapillary's in-place-ABN ResNet, renamed to torchvision's; None if it is not one.

    In-place ABN scales by |weight| + eps (its eps is 1e-5), plain BatchNorm by weight.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if not any(k.startswith("mod1.") for k in state):
        return None
    renamed = {}
    for key, value in state.items():
        if key.startswith("classifier."):
            continue
        if match := re.match(r"mod(\d)\.block(\d+)\.(.*)", key):
            layer, block, rest = match.groups()
            for theirs, ours in (("convs.", ""), ("proj_conv", "downsample.0"),
                                 ("proj_bn", "downsample.1")):
                rest = rest.replace(theirs, ours)
            new = f"layer{int(layer) - 1}.{int(block) - 1}.{rest}"
        else:
            new = key.removeprefix("mod1.")                 # mod1.conv1, mod1.bn1
        is_norm = re.search(r"(bn\d|downsample\.1)\.weight$", new)
        renamed[new] = value.abs() + 1e-5 if is_norm else value
    return renamed


def load_backbone_file(net, path):
    """Load ImageNet weights into a torchvision network; the file may lack its 1000-way head.

    path: torchvision's .pth or Mapillary's resnet*_iabn_sync.pth.tar.
    Raises InputError that names the first missing and the first unexpected key.
    """
    if not Path(path).exists():
        raise InputError(f"--pretrained {path}: no such file")
    check_file(path)
    # torchvision's names end with the file's digest
    if named := re.search(r"-([0-9a-f]{8})\.pth$", str(path)):
        if not hashlib.sha256(Path(path).read_bytes()).hexdigest().startswith(named[1]):
            raise InputError(f"--pretrained {path}: damaged, its digest is not the one in its name")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = from_mapillary(state) or state
    except Exception as error:                              # of a wrong file torch raises anything
        raise InputError(f"--pretrained {path}: not a PyTorch weights file ({reason(error)})"
                         ) from None
    own = net.state_dict()
    optional = [k for k in own if k.startswith(("fc.", "classifier."))
                or k.endswith("num_batches_tracked")]
    state = {**{k: own[k] for k in optional}, **state}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    resized = [k for k in own if k in state and getattr(state[k], "shape", 0) != own[k].shape]
    if missing or unexpected or resized:
        kinds = ("missing", missing), ("unexpected", unexpected), ("of another shape", resized)
        first = [f"{len(keys)} {what}, first {keys[0]}" for what, keys in kinds if keys]
        raise InputError(f"--pretrained {path} does not fit this backbone: {'; '.join(first)}")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:                           # a sparse tensor, or one without values
        raise InputError(f"--pretrained {path}: {reason(error)}") from None


def pretrained_network(backbone, pretrained):
    """torchvision's classification network, None for tiny; pretrained as in DeepLabV3."""
    if backbone == "tiny":
        if pretrained is not None:
            raise InputError("--pretrained: the tiny backbone has no ImageNet weights, "
                             "use --pretrained none")
        return None
    net = torchvision.models.get_model(backbone, weights=None)
    if pretrained == "imagenet":
        weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            net.load_state_dict(weights.get_state_dict(progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"could not download the ImageNet weights of {backbone} ({error}): name a file "
                "with --pretrained FILE, or start from scratch with --pretrained none") from None
    elif pretrained is not None:
        load_backbone_file(net, pretrained)
    return net


# ----------------------------------------------------------------------------------- the network

class ASPP(nn.Module):
    """Atrous spatial pyramid pooling as in MiB: the image-pooling branch is added to the others.

    (B, c_in, H, W) -> (B, c, H, W). In training the pooled branch is the global mean; in evaluation
    it is a sliding mean over at most 32 x 32 cells, MiB's constant: the map of a 512 crop, so that
    there a larger image is pooled over as much context as in training.
    """

    def __init__(self, c_in, c, rates):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(c_in, c, 1, bias=False)] + [
            nn.Conv2d(c_in, c, 3, padding=d, dilation=d, bias=False) for d in rates])
        self.merge = nn.Sequential(norm_act(4 * c), nn.Conv2d(4 * c, c, 1, bias=False))
        self.pool = nn.Sequential(nn.Conv2d(c_in, c, 1, bias=False), norm_act(c),
                                  nn.Conv2d(c, c, 1, bias=False))
        self.out = norm_act(c)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_normal_(m.weight, nn.init.calculate_gain("leaky_relu", SLOPE))

    def forward(self, x):
        H, W = x.shape[2:]
        y = self.merge(torch.cat([branch(x) for branch in self.branches], dim=1))
        window = (H, W) if self.training else (min(H, 32), min(W, 32))
        pooled = self.pool(F.avg_pool2d(x, window, stride=1))
        h, w = H - pooled.shape[2], W - pooled.shape[3]
        if pooled.shape[2:] != (1, 1):                      # (1, 1) is broadcast
            pooled = F.pad(pooled, (w // 2, w - w // 2, h // 2, h - h // 2), mode="replicate")
        return self.out(y + pooled)


class DeepLabV3(nn.Module):
    """Segmentation network that grows by one classifier per learning step.

    backbone:         resnet101, resnet50, resnet18, mobilenet_v2 (output stride 16) or tiny (8)
    classes_per_step: outputs of each step, background in the first: [16, 1, 1, 1, 1, 1] for 15-1
    pretrained:       None, "imagenet" (torchvision's download) or a weights file of the backbone

    forward: (B, 3, H, W) normalised images -> (B, C_t, H / stride, W / stride) logits, C_t the sum
    of classes_per_step. Upsampling is the caller's. With features=True also the backbone's output.
    """

    def __init__(self, backbone, classes_per_step, pretrained=None):
        super().__init__()
        if backbone not in BACKBONES:
            raise InputError(f"unknown backbone {backbone!r}: choose from {', '.join(BACKBONES)}"
                             + nearest(backbone, BACKBONES))
        self.backbone = backbone
        body, width, rates = BACKBONES[backbone]
        self.body, channels = body(pretrained_network(backbone, pretrained))
        self.head = ASPP(channels, width, rates)
        self.classifiers = nn.ModuleList(nn.Conv2d(width, n, 1) for n in classes_per_step)
        # The weights decide the layout of all activations: 1.3 to 1.5 times faster.
        self.to(memory_format=torch.channels_last)

    @property
    def classes_per_step(self):
        return [classifier.out_channels for classifier in self.classifiers]

    def forward(self, x, features=False):
        body = self.body(x)                                             # (B, channels, h, w)
        head = self.head(body)                                          # (B, width, h, w)
        logits = torch.cat([classifier(head) for classifier in self.classifiers], dim=1)
        return (logits, body) if features else logits

    @torch.no_grad()
    def add_classes(self, n, init):
        """Append a classifier with n outputs for the next step.

        init="background" (MiB): every new class starts with the background's weights, and the
        background's probability is shared out evenly: over n + 1 outputs with bias b - log(n + 1).
        init="random": torch's default initialisation; the old outputs stay as they are.
        """
        if init not in ("background", "random"):
            raise InputError(f"unknown classifier init {init!r}: choose background or random")
        old = self.classifiers[0]
        new = nn.Conv2d(old.in_channels, n, 1).to(old.weight.device)
        if init == "background":
            old.bias[0] -= math.log(n + 1)
            new.weight[:] = old.weight[:1]
            new.bias[:] = old.bias[0]
        self.classifiers.append(new)


def upsample(logits, like):
    """Logits (B, C, h, w) at the size of `like` (..., H, W), bilinearly, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, like.shape[-2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------- checkpoints

def save_model(model, path, **about):
    """Write a step's checkpoint: weights, and what load_model and a reader need to know of them."""
    write_atomically(path, lambda p: torch.save(
        {**about, "model": model.state_dict(), "backbone": model.backbone,
         "classes_per_step": model.classes_per_step}, p))


def read_checkpoint(path, way_out):
    """What torch.save wrote to a file, whose zip checksums are verified first.

    A flipped byte would load without a word. Raises InputError that names the file and the way out.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # torch neither compresses nor sets attributes, which its reader would heed
            odd = any(i.compress_type or i.external_attr or i.is_dir() for i in archive.infolist())
            if odd or archive.testzip():
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError
        return checkpoint
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    except Exception as error:                              # of a wrong file torch raises anything
        short_memory(error)
        raise InputError(f"{path}: damaged, or no file of train.py; {way_out}") from None


def short_memory(error):
    """Raise an error that says nothing of the file again."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise error


THIS_STEP_AGAIN = "remove it, its .json, those of later steps, and run the same command again"


def load_model(path, device="cpu", expected=None, way_out=THIS_STEP_AGAIN):
    """A checkpoint of save_model -> (model in evaluation mode, the rest of it as a dict).

    expected: {key of the checkpoint: the value it must have}, such as the classes of this run
    """
    checkpoint = read_checkpoint(path, way_out)
    try:
        sizes, classes = checkpoint["classes_per_step"], checkpoint["classes"]
        state = checkpoint.pop("model")
        if not sum(sizes) == len(classes) <= 256 or min(sizes) < 1 or not all(
                bool(v.isfinite().all()) for v in state.values()):
            raise ValueError
        checkpoint["classes"] = [printable(name) for name in classes]
        model = DeepLabV3(checkpoint["backbone"], sizes)
        model.load_state_dict(state)
        differing = [key for key, value in (expected or {}).items() if checkpoint[key] != value]
        inversion = checkpoint["inversion"]
        whole = [checkpoint["crop"], inversion["steps"], *inversion["sizes"]]
        numbers = [inversion[name] for name in ("lr", "tv", "bn", "spectrum")]
        numbers += checkpoint["seconds"].values()
        if not (all(isinstance(v, (int, float)) and 0 <= v <= 1e12 for v in numbers)
                and all(isinstance(v, int) and 0 < v <= 10 ** 6 for v in whole)
                and len(inversion) == 6 and checkpoint["crop"] <= 10 ** 4
                and isinstance(checkpoint["method"], str) and "objective" in checkpoint):
            raise ValueError
    except Exception as error:
        short_memory(error)
        raise InputError(f"{path}: damaged, or no file of train.py; {way_out}") from None
    if differing:
        raise InputError(f"{path}: its {differing[0]} differs from this command's; it is of "
                         f"another task, data set or network")
    return model.to(device).eval(), checkpoint
