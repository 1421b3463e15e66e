"""Trains a network on a synthetic set as its file says, and tests it on the real test images, in plain torch.

    python use_set.py logged_files/CIFAR10/<run>/synthetic_best.pt data

It takes any set of this project: normalised, whitened with ZCA, or textures. The second argument is --data_path.
"""

import argparse
from pathlib import Path

import torch

import networks
import sets
import utils

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("path", type=Path, help="synthetic_best.pt of a run")
parser.add_argument("data_path", type=Path, help="where the real images are")
parser.add_argument("--dataset", choices=utils.SOURCES, help="of the test images (default: the one it was made from)")
args = parser.parse_args()
path, data_path, dataset = args.path, args.data_path, args.dataset
# --- as in README.md
best, device = torch.load(path, weights_only=True), "cuda" if torch.cuda.is_available() else "cpu"
images, labels = best["images"].to(device), best["labels"].to(device)
config, recipe, network, canvas = (best[k] for k in ("config", "evaluation", "network", "canvas"))
request = utils.Request(dataset or config["dataset"], data_path, config["subset"], config["res"], zca=config["zca"])
kept = utils.stored_transform(sets.load_transform(path.parent))  # else measured on the training images again
data = utils.load_dataset(request, kept)
x = data.transform(data.test.pixels)  # normalised or whitened: transform["formula"]
size = (network[k] for k in ("channels", "classes", "resolution"))
net = networks.build(best["accuracy"]["model"], *size).to(device)
crops = utils.Canvas(network["resolution"], **canvas) if canvas else None
views = utils.Views(tuple(recipe["augmentation"]), crops)  # DiffAugment, after random crops of a texture
for epoch in range(recipe["epochs"]):
    if epoch in (0, recipe["drop_after"]):  # then lr / 10, and momentum from zero
        lr, mu, decay = recipe["lr"] / (10 if epoch else 1), recipe["momentum"], recipe["weight_decay"]
        optimizer = torch.optim.SGD(net.parameters(), lr, mu, weight_decay=decay)
    for batch in torch.randperm(len(images)).split(recipe["batch"]):
        view = views.draw(1, len(batch), torch.default_generator, device)[0]
        seen, classes = view(images[batch], labels[batch])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(seen), classes).backward()
        optimizer.step()
net.eval()
with torch.no_grad():
    right = torch.cat([net(part.to(device)).argmax(1).cpu() for part in x.split(256)]) == data.test.labels
print(f"test accuracy {right.float().mean():.1%}")
