"""The published way of doing each part, in our own words: the baseline that the benchmarks compare with.

Eager modules with nn.GroupNorm; augmentation parameters built image by image; data sets in DataLoaders and a wait for
the device in every batch; networks trained one by one; the student's whole path kept as one graph of autograd.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


def convnet(channels=3, classes=10, resolution=32, width=128, depth=3):
    layers = []
    for block in range(depth):
        layers += [
            nn.Conv2d(channels if block == 0 else width, width, 3, padding=1),
            nn.GroupNorm(width, width, affine=True),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2, 2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (resolution // 2**depth) ** 2, classes))


# --- data: every image through its transform, one after another, into a list; the loader of the test set keeps its own


def load(dataset, path, resolution, device):
    from utils import import_torchvision

    datasets = import_torchvision()
    from torchvision import transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    if dataset == "Folder":
        steps = [transforms.Resize(resolution), transforms.CenterCrop(resolution), *steps]
        test = "val" if (path / "val").is_dir() else "test"
        sets = [datasets.ImageFolder(path / split, transforms.Compose(steps)) for split in ("train", test)]
    else:
        kind = getattr(datasets, dataset)
        sets = [kind(path, train=train, transform=transforms.Compose(steps)) for train in (True, False)]
    train, test = sets
    images, labels = [], []
    for i in range(len(train)):
        image, label = train[i]
        images.append(image.unsqueeze(0))
        labels.append(label)
    images, labels = torch.cat(images).to(device), torch.tensor(labels, device=device)
    return images, labels, DataLoader(test, batch_size=256, shuffle=False)


# --- augmentation: one operation a call


def color(x):
    n = len(x)
    x = x + (torch.rand(n, 1, 1, 1, device=x.device) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (torch.rand(n, 1, 1, 1, device=x.device) * 2) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (torch.rand(n, 1, 1, 1, device=x.device) + 0.5) + mean


def pixel_grid(x, height, width):
    axes = torch.arange(len(x)), torch.arange(height), torch.arange(width)
    return [axis.to(x.device) for axis in torch.meshgrid(*axes, indexing="ij")]


def crop(x):
    n, _, h, w = x.shape
    reach = int(h * 0.125 + 0.5)
    down, right = (torch.randint(-reach, reach + 1, (n, 1, 1), device=x.device) for _ in range(2))
    image, row, column = pixel_grid(x, h, w)
    row, column = (row + down + 1).clamp(0, h + 1), (column + right + 1).clamp(0, w + 1)
    return F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)[image, row, column].permute(0, 3, 1, 2)


def cutout(x):
    n, _, h, w = x.shape
    size = int(h * 0.5 + 0.5)
    top, left = (torch.randint(0, side + (1 - size % 2), (n, 1, 1), device=x.device) for side in (h, w))
    image, row, column = pixel_grid(x, size, size)
    mask = torch.ones(n, h, w, device=x.device)
    mask[image, (row + top - size // 2).clamp(0, h - 1), (column + left - size // 2).clamp(0, w - 1)] = 0
    return x * mask.unsqueeze(1)


def flip(x):
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def warp(x, matrices):
    grid = F.affine_grid(torch.tensor(matrices, dtype=x.dtype, device=x.device), x.shape, align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def scale(x):
    low, high = 1 / 1.2, 1.2
    sx, sy = (torch.rand(len(x)) * (high - low) + low for _ in range(2))
    return warp(x, [[[float(sx[i]), 0, 0], [0, float(sy[i]), 0]] for i in range(len(x))])


def rotate(x):
    angles = (torch.rand(len(x)) - 0.5) * 2 * 15 / 180 * math.pi
    return warp(x, [[[math.cos(a), math.sin(-a), 0], [math.sin(a), math.cos(a), 0]] for a in map(float, angles)])


AUGMENTATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def augment(x):
    names = list(AUGMENTATIONS)
    return AUGMENTATIONS[names[int(torch.randint(len(names), ()))]](x)


# --- the parts


def epoch(net, loader, optimizer=None, device="cpu"):
    """One pass over a loader: training with an optimizer, testing without. Mean loss and accuracy."""
    net.train(optimizer is not None)
    loss_sum, correct, count = 0.0, 0, 0
    for x, y in loader:
        x, y = x.float().to(device), y.long().to(device)
        if optimizer:
            x = augment(x)
        with torch.set_grad_enabled(optimizer is not None):
            out = net(x)
            loss = F.cross_entropy(out, y)
        correct += int((out.detach().cpu().argmax(1) == y.cpu()).sum())
        loss_sum += loss.item() * len(y)
        count += len(y)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss_sum / count, correct / count


def loader(images, labels, batch, shuffle):
    return DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=shuffle, num_workers=0)


def train_network(net, images, labels, lr, epochs, batch, momentum=0.0, weight_decay=0.0):
    """`epochs` passes over a training set that lies on the CPU or where the network is."""
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    batches = loader(images, labels, batch, shuffle=True)
    for _ in range(epochs):
        epoch(net, batches, optimizer, device)


def test_network(net, images, labels, batch=256):
    return epoch(net, loader(images, labels, batch, shuffle=False), device=next(net.parameters()).device)[1]


def distillation_iteration(net, start, target, images, labels, lr, steps):
    """Unrolls the student with a graph through all steps and matches the last. Gradients of images and lr."""
    parameters = dict(net.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    sizes = [p.numel() for p in parameters.values()]
    images = images.detach().clone().requires_grad_()
    lr = torch.tensor(lr, device=images.device, requires_grad=True)
    path = [start.detach().clone().requires_grad_()]
    for _ in range(steps):
        chosen = torch.randperm(len(images), device=images.device)
        x, y = augment(images[chosen]), labels[chosen]
        pieces = {name: piece.view(shapes[name]) for name, piece in zip(parameters, path[-1].split(sizes))}
        loss = F.cross_entropy(functional_call(net, pieces, (x,)), y)
        (gradient,) = torch.autograd.grad(loss, path[-1], create_graph=True)
        path.append(path[-1] - lr * gradient)
    grand_loss = (path[-1] - target).square().sum() / (start - target).square().sum()
    grad_images, grad_lr = torch.autograd.grad(grand_loss, (images, lr))
    return grand_loss.item(), grad_images, grad_lr.item()
