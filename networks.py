"""The networks of the dataset-distillation literature, by name.

`NETWORKS` maps a name to a builder of (channels, classes, resolution); `build` is the way in. At 3x32x32 every network
has the parameter count of the published code; unlike there, each also works at other resolutions: where an image of
32 pixels would reach the classifier as an SxS map, adaptive average pooling brings other resolutions to SxS as well.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad


# --- Normalisation ---------------------------------------------------------------------------------------------------
# By the plain formula rather than by torch's kernels. Under reverse-over-forward differentiation, which trajectory
# matching uses, those of batch and layer norm give a wrong second-order gradient (they treat the saved statistics as
# constants), and that of group norm loses three digits and refuses channels_last.

EPS = 1e-5


def standardise(x, dims, weight=1, bias=0):
    """x with mean 0 and variance 1 over `dims`, times `weight`, plus `bias`. Both moments are taken in one pass, as
    E[d²] - E[d]² with d the distance from the mean of every 16th pixel: that mean is at most 4 standard deviations off, so
    that the difference costs float32 no more than 4 of its bits."""
    d = x - x[..., ::4, ::4].mean(dims, keepdim=True).detach()
    total = d.sum(dims, keepdim=True)
    share = total.numel() / d.numel()  # multiplying the sum is cheaper than dividing each pixel
    mean = total * share
    variance = d.square().sum(dims, keepdim=True) * share - mean.square()
    scale = torch.rsqrt(variance + EPS) * weight
    return d * scale + (bias - mean * scale)


class GroupNorm(nn.Module):
    """Standardises each of `groups` groups of channels of each image; affine per channel."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        if self.groups == x.shape[1]:
            return standardise(x, (2, 3), self.weight, self.bias)
        weight, bias = (p.unflatten(0, (self.groups, -1)) for p in (self.weight, self.bias))
        return standardise(x.unflatten(1, (self.groups, -1)), (2, 3, 4), weight, bias).flatten(1, 2)


class LayerNorm(nn.Module):
    """Standardises each image's map; affine per element."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, size, size))
        self.bias = nn.Parameter(torch.zeros(channels, size, size))

    def forward(self, x):
        return standardise(x, (1, 2, 3)) * self.weight + self.bias


class BatchNorm(nn.BatchNorm2d):
    """Standardises each channel over the batch, with torch's running statistics where they are tracked. These are
    assigned, not written in place, so that under `functional_call` they are outputs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if self.track_running_stats:
            variance, mean = torch.var_mean(x.detach().to(self.running_mean.dtype), (0, 2, 3))
            self.running_mean = torch.lerp(self.running_mean, mean, self.momentum)
            self.running_var = torch.lerp(self.running_var, variance, self.momentum)
        return standardise(x, (0, 2, 3), self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1))


NORMS = {  # name -> builder of (channels, side of the map)
    "none": lambda channels, size: nn.Identity(),
    "instance": lambda channels, size: GroupNorm(channels, channels),
    "group": lambda channels, size: GroupNorm(4, channels),
    "layer": LayerNorm,
    "batch": lambda channels, size: BatchNorm(channels),
}
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "leaky": partial(nn.LeakyReLU, negative_slope=0.01)}
POOLINGS = {"none": nn.Identity, "max": partial(nn.MaxPool2d, 2), "avg": partial(nn.AvgPool2d, 2)}


def first_padding(resolution: int, kernel: int) -> int:
    """Padding that keeps the side, but brings 28x28 images (MNIST, FashionMNIST) to 32x32 in the first layer."""
    return kernel // 2 + (2 if resolution == 28 else 0)


def adaptive_pool(side_now: int, side: int) -> nn.Module:
    return nn.Identity() if side_now == side else nn.AdaptiveAvgPool2d(side)


class ImageConv2d(nn.Conv2d):
    """The first convolution of a network, of stride 1. `of_patches` computes it as a 1x1 convolution of the image's patches:
    with three channels, the kernels of a convolution's weight gradient are slow. Under forward-mode differentiation of the
    parameters the images are constant, and no tangent of theirs, which is zero, is convolved."""

    of_patches = False

    def forward(self, x):
        if not self.of_patches:
            return super().forward(x)
        (rows, columns), (down, across) = self.kernel_size, self.padding
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, across, across, down, down))  # channels last
        height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
        patches = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
        weight = [self.weight.permute(0, 2, 3, 1).flatten(1)]
        if self.bias is not None:  # the factor of a channel that is 1 everywhere
            patches.append(x.new_ones(len(x), height, width, 1))
            weight.append(self.bias[:, None])
        patches, weight = torch.cat(patches, 3).permute(0, 3, 1, 2), torch.cat(weight, 1)[:, :, None, None]
        weight, tangent = forward_ad.unpack_dual(weight)
        out = F.conv2d(patches, weight)
        return out if tangent is None else forward_ad.make_dual(out, F.conv2d(patches, tangent))


# --- ConvNet ---------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """`depth` blocks of 3x3 convolution, norm, activation and pooling, then one linear layer."""

    def __init__(self, channels, classes, resolution, *, width=128, depth=3, norm="instance", act="relu", pooling="avg"):
        super().__init__()
        side = resolution + 2 * (first_padding(resolution, 3) - 1)
        if pooling != "none" and side < 2**depth:
            raise ValueError(
                f"a ConvNet of depth {depth} halves the image {depth} times and needs at least "
                f"{2**depth} pixels a side, not {resolution}"
            )
        layers, features = [], channels
        for block in range(depth):
            padding = first_padding(resolution, 3) if block == 0 else 1
            layers += [
                (nn.Conv2d if block else ImageConv2d)(features, width, kernel_size=3, padding=padding),
                NORMS[norm](width, side),
                ACTIVATIONS[act](),
                POOLINGS[pooling](),
            ]
            features = width
            side = side if pooling == "none" else side // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


# --- The networks of cross-architecture tables -----------------------------------------------------------------------


def mlp(channels, classes, resolution):
    hidden = [nn.Flatten(), nn.Linear(channels * resolution**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, classes))


def lenet(channels, classes, resolution):
    padding = 2 if resolution == 28 else 0
    side = ((resolution + 2 * padding - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"LeNet needs at least 16 pixels a side, not {resolution}")
    return nn.Sequential(
        ImageConv2d(channels, 6, kernel_size=5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        adaptive_pool(side, 5), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def alexnet(channels, classes, resolution):
    padding = first_padding(resolution, 5)
    side = (resolution + 2 * padding - 4) // 8
    if side < 1:
        raise ValueError(f"AlexNet halves the image 3 times and needs at least 8 pixels a side, not {resolution}")
    return nn.Sequential(
        ImageConv2d(channels, 128, kernel_size=5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 192, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 256, kernel_size=3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 192, kernel_size=3, padding=1), nn.ReLU(),
        nn.Conv2d(192, 192, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        adaptive_pool(side, 4), nn.Flatten(), nn.Linear(192 * 4 * 4, classes),
    )  # fmt: skip


VGG11_WIDTHS = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def vgg11(channels, classes, resolution, *, norm="instance"):
    side = resolution + 2 * (first_padding(resolution, 3) - 1)
    if side < 32:
        raise ValueError(f"VGG11 halves the image 5 times and needs at least 32 pixels a side, not {resolution}")
    layers, features = [], channels
    for width in VGG11_WIDTHS:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            side //= 2
        else:
            conv = nn.Conv2d if layers else ImageConv2d
            padding = 1 if layers else first_padding(resolution, 3)
            layers += [conv(features, width, kernel_size=3, padding=padding), NORMS[norm](width, side), nn.ReLU()]
            features = width
    return nn.Sequential(*layers, adaptive_pool(side, 1), nn.Flatten(), nn.Linear(512, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. Halves the side by a stride of 2, or with `pooled` by average pooling
    after convolutions of stride 1."""

    def __init__(self, features, width, halve, norm, pooled):
        super().__init__()
        stride = 2 if halve and not pooled else 1
        pool = [nn.AvgPool2d(2)] if halve and pooled else []
        self.body = nn.Sequential(
            nn.Conv2d(features, width, kernel_size=3, stride=stride, padding=1, bias=False),
            NORMS[norm](width, None),
            nn.ReLU(),
            *pool,
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            NORMS[norm](width, None),
        )
        self.shortcut = nn.Identity()
        if halve or features != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(features, width, kernel_size=1, stride=stride, bias=False), *pool, NORMS[norm](width, None)
            )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(channels, classes, resolution, *, norm="instance", pooled=False):
    if resolution < 16:
        # below, the last maps have one pixel, and normalising one pixel leaves nothing
        raise ValueError(f"ResNet18 halves the image 3 times and needs at least 16 pixels a side, not {resolution}")
    layers = [ImageConv2d(channels, 64, kernel_size=3, padding=1, bias=False), NORMS[norm](64, resolution), nn.ReLU()]
    features = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(BasicBlock(features, width, stage > 0 and block == 0, norm, pooled))
            features = width
    # strides round a side up, pooling rounds it down
    halved = resolution // 8 if pooled else math.ceil(resolution / 8)
    side = (3 if resolution == 28 else 4) if pooled else 1
    return nn.Sequential(*layers, adaptive_pool(halved, side), nn.Flatten(), nn.Linear(512 * side**2, classes))


# --- The table -------------------------------------------------------------------------------------------------------

NETWORKS = {
    "ConvNet": ConvNet,
    **{f"ConvNetD{depth}": partial(ConvNet, depth=depth) for depth in range(1, 9)},
    **{f"ConvNetW{width}": partial(ConvNet, width=width) for width in (32, 64, 128, 256, 512, 1024)},
    **{f"ConvNetA{act[0].upper()}": partial(ConvNet, act=act) for act in ACTIVATIONS},
    **{f"ConvNet{norm[0].upper()}N": partial(ConvNet, norm=norm) for norm in NORMS},
    **{f"ConvNet{pooling[0].upper()}P": partial(ConvNet, pooling=pooling) for pooling in POOLINGS},
    **dict.fromkeys(("KIP", "ConvNetKIP"), partial(ConvNet, width=1024, norm="none")),
    "MLP": mlp,
    "LeNet": lenet,
    "AlexNet": alexnet,
    "VGG11": vgg11,
    "VGG11BN": partial(vgg11, norm="batch"),
    "ResNet18": resnet18,
    "ResNet18_AP": partial(resnet18, pooled=True),
    "ResNet18BN": partial(resnet18, norm="batch"),
    "ResNet18BN_AP": partial(resnet18, norm="batch", pooled=True),
}

OTHER_NAMES = {"ConvNet": "ConvNetD3", "ConvNetD3": "ConvNet"}  # of the same network, in folders of published experts


def build(name: str, channels: int, classes: int, resolution: int) -> nn.Module:
    """A network with fresh parameters drawn from torch's global generator, as the field initialises them.

    Takes images (N, channels, resolution, resolution) to logits (N, classes). Raises ValueError for an unknown name
    and for a resolution too small for the network.
    """
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](channels, classes, resolution)


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether an image's logits depend on the other images of its batch while training."""
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
