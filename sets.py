"""Synthetic sets in files: ours, those of the field's other tools, pictures by class; and a set as other tools open it."""

import csv
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import storage
from storage import InputError, is_dense, load_any
from utils import SOURCES, Dataset, class_folders, images_below, read_pictures, subfolders

# --- Loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synthetic:
    """A finished synthetic set: images in input space, labels, and the learned lr where the file has one."""

    path: Path
    images: Tensor | None  # (N,C,H,W); None: pictures, which `prepare` reads as images of a data set
    labels: Tensor | None  # (N,) int64, or soft ones: (N, classes) probabilities
    syn_lr: float | None
    identity: dict | None = None  # of the data it was made for; None where the file does not say
    transform: dict | None = None  # of pixels to its images: with its tensors, if they are in the file or in transform.pt
    iteration: int | None = None  # of the run that made it; None where the file does not say
    settings: dict = field(default_factory=dict)  # likewise; empty where the file does not say
    accuracy: dict | None = None  # in that run
    notes: tuple[str, ...] = ()  # how its files were understood, as sentences


SET_FILES = "synthetic_best.pt", "images_best.pt", "images.pt"  # in a folder, the first that is there
IMAGES_FILE = re.compile(r"(?:.*_)?images(?:_.*)?\.pt")
PART = re.compile(r"images_best_(\d+)\.pt")  # MTT's Tiny ImageNet at 50 images per class is in five, from 0


def load_synthetic(path: Path) -> Synthetic:
    """From synthetic_best.pt; an images_<x>.pt with labels_<x>.pt and perhaps lr_<x>.pt beside it, as the field's tools
    write them; a folder with one of these, with parts images_best_<n>.pt of one, or with pictures in a folder for each
    class. With the transform.pt of its run, where that lies beside it. Raises InputError for anything else."""
    files = _files_of(path) if path.is_dir() else [path]
    transform = load_transform((files or [path])[0].parent)
    identity = transform and transform["identity"]
    if not files:
        return Synthetic(path, None, None, _learning_rate(path.parent / "lr.pt"), identity, transform)
    parts = [load_any(file) for file in files]
    if not isinstance(parts[0], Tensor):
        content = storage.checked(parts[0], files[0], "synthetic")
        own = content["transform"]
        if transform and transform["fingerprint"] == own.get("fingerprint"):
            own = transform
        images, labels, lr, identity = (content[name] for name in ("images", "labels", "syn_lr", "identity"))
        run = content["iteration"], content["config"], content["accuracy"]
        return Synthetic(files[0], images, labels, lr, identity, own, *run)
    if not IMAGES_FILE.fullmatch(files[0].name):
        raise InputError(f"{files[0]} holds a bare tensor; the images of a set are called images_<x>.pt.")
    path = path if len(files) > 1 else files[0]
    images, labels = _joined(parts), _joined([load_any(_beside(file, "labels")) for file in files])
    sound = images is not None and images.ndim == 4 and images.is_floating_point() and len(images) > 0
    if not sound or not images.isfinite().all():
        raise InputError(f"{path} holds no synthetic set: it needs finite images (N,C,H,W) and a label for each.")
    where = f"{_beside(files[0], 'labels')}{' and those after it' if len(files) > 1 else ''}"
    labels, notes = _understood(labels, where)
    if len(labels) != len(images):
        raise InputError(f"{where} has {len(labels)} labels, and {path} has {len(images)} images: one is of another set.")
    lr = _learning_rate(_beside(files[0], "lr"))
    return Synthetic(path, images.float(), labels, lr, identity, transform, notes=notes)


def _files_of(folder: Path) -> list[Path]:
    """The tensors of a folder's set: one file, or its parts in order; none where it holds pictures."""
    for name in SET_FILES:
        if (folder / name).is_file():
            return [folder / name]
    parts = {int(match[1]): entry for entry in folder.iterdir() if (match := PART.fullmatch(entry.name))}
    if missing := sorted(set(range(max(parts, default=-1))) - parts.keys()):
        raise InputError(f"{folder} lacks a part of its set: images_best_{missing[0]}.pt.")
    if not parts and not images_below(folder):
        names = ", ".join(SET_FILES)
        raise InputError(f"{folder} holds no synthetic set: neither {names} or images_best_0.pt, nor pictures by class.")
    return [parts[n] for n in sorted(parts)]


def _beside(path: Path, name: str) -> Path:
    return path.with_name(path.name.replace("images", name))


def _joined(parts: list) -> Tensor | None:
    """Parts of a tensor as one; None where they do not fit together."""
    sound = all(isinstance(part, Tensor) and part.ndim and is_dense(part) for part in parts)
    if not sound or len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        return None
    return torch.cat([part.detach() for part in parts])


INTEGERS = torch.int64, torch.int32, torch.int16, torch.uint8


def _understood(labels: Tensor | None, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as classes or probabilities, and what soft ones were taken for. Raises InputError for anything else."""
    if labels is not None and labels.ndim == 1 and labels.dtype in INTEGERS:
        return labels.long(), ()
    soft = labels is not None and labels.ndim == 2 and labels.is_floating_point() and labels.numel() > 0
    if not soft or not labels.isfinite().all():
        raise InputError(f"{where} holds no labels: whole numbers (N,), or finite logits or probabilities (N, classes).")
    labels = labels.float()
    if labels.min() >= 0 and (labels.sum(1) - 1).abs().max() < 0.01:
        return labels, (f"{where} holds soft labels: probabilities, used as they are.",)
    return labels.softmax(1), (f"{where} holds soft labels: logits, of which the softmax is used.",)


def _learning_rate(path: Path) -> float | None:
    """A number or a tensor of one; None where there is no such file. Raises InputError for anything else."""
    if not path.exists():
        return None
    lr = load_any(path)
    lr = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    if not (isinstance(lr, float) and 0 < lr < float("inf")):
        raise InputError(f"{path} holds no learning rate, which would be one number above 0.")
    return lr


def save_transform(folder: Path, state: dict, identity: dict | None):
    """What takes pixels to the input space of a run's images, once for the run: it may be large, so its sets have the
    fingerprint alone."""
    storage.save(folder / "transform.pt", "transform", state | {"identity": identity})


def load_transform(folder: Path) -> dict | None:
    """What `save_transform` saved; None where there is none."""
    path = folder / "transform.pt"
    return storage.load(path, "transform") if path.exists() else None


# --- A set against the data ------------------------------------------------------------------------------------------


def prepare(synthetic: Synthetic, dataset: Dataset, tiles: int = 1) -> tuple[Synthetic, list[str]]:
    """The set for this data, its images `tiles` times as wide and high as those of the data; and what could not be checked
    and how it was understood, as sentences. Raises InputError where it was made for other data, or does not fit it."""
    path, side, classes = synthetic.path, dataset.resolution * tiles, len(dataset.classes)
    made = synthetic.identity or {}  # bare tensors and pictures do not say
    moved = []
    if (source := made.get("dataset", dataset.name)) != dataset.name:  # the command says so, such as a copy of the data
        made = made | {name: dataset.identity[name] for name in ("dataset", "images")}
        moved = [f"{path} was made from images of --dataset {source}, and is used with those of {dataset.name}."]
    storage.require_same(path, made or dataset.identity, dataset.identity)
    pictures = synthetic.images is None
    if pictures:
        images, labels = pictures_by_class(path, dataset, side)
        synthetic = replace(synthetic, images=images, labels=labels)
    images, labels = synthetic.images, synthetic.labels
    if (found := tuple(images.shape[1:])) != (needed := (dataset.channels, side, side)):
        raise InputError(
            f"{path} holds images of {'x'.join(map(str, found))}, and this command needs {'x'.join(map(str, needed))}; "
            "--res, --texture and --canvas_size say which."
        )
    if labels.shape[1:] not in ((), (classes,)):
        raise InputError(f"{path} has soft labels of {labels.shape[1]} classes, and the data set has {classes}.")
    if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"{path} has labels beyond the {classes} classes of the data set.")
    notes = [*synthetic.notes, *moved, *storage.on_trust(path, made)]
    if not made and not pictures:
        notes += unlike_real(synthetic, dataset)
    fingerprint = dataset.transform.summary()["fingerprint"]
    if (synthetic.transform or {}).get("fingerprint", fingerprint) != fingerprint:
        notes.append(
            f"{path} was made with another ZCA whitening than the one fitted here, which may be rounding: its "
            "transform.pt is not beside it."
        )
    return synthetic, notes


def pictures_by_class(folder: Path, dataset: Dataset, side: int) -> tuple[Tensor, Tensor]:
    """Images in input space and labels of `folder/<class>/*`, brought to `side` pixels as the data set's own are. Raises
    InputError where the folders are other than the classes, or a picture cannot be decoded."""
    names = [folder_name(name) for name in dataset.classes]
    if unknown := sorted(set(subfolders(folder)) - set(names)):
        raise InputError(f"{folder / unknown[0]} is no class of {dataset.name}, such as {names[0]}; name the folders so.")
    paths, labels = zip(*class_folders(folder, names))
    pixels, _ = read_pictures(paths, side, SOURCES[dataset.name].fit)
    if dataset.channels == 1:
        pixels = pixels.float().mean(1, keepdim=True).round().byte()
    return dataset.transform(pixels), torch.tensor(labels)


def folder_name(name: str) -> str:
    """Of a class: FashionMNIST has a T-shirt/top."""
    return name.replace("/", "_")


def unlike_real(synthetic: Synthetic, dataset: Dataset) -> list[str]:
    """A warning where a set's values are far from those of real images, as pixels are that were not normalised. Distilled
    images have up to several times the spread of real ones, not half of it."""
    real = dataset.transform(dataset.train.pixels[:: max(1, len(dataset.train) // 1000)])
    (mean, std), (real_mean, real_std) = ((x.mean().item(), x.std().item()) for x in (synthetic.images, real))
    if abs(mean - real_mean) <= real_std and real_std / 2 <= std <= 10 * real_std:
        return []
    said = f"{synthetic.path} has values of mean {mean:.2f} and std {std:.2f}, and real images here {real_mean:.2f} and "
    return [f"Warning: {said}{real_std:.2f}: it was normalised in another way, or --zca is missing or too much."]


def start_images(synthetic: Synthetic, classes: int, ipc: int) -> Tensor:
    """The images of a set, prepared, to start a distillation from, class by class. Raises InputError where they are not
    `ipc` of each class."""
    if synthetic.labels.ndim > 1:
        raise InputError(f"--pix_init {synthetic.path} has soft labels; a distillation starts from images of a class each.")
    counts = synthetic.labels.bincount(minlength=classes).tolist()
    if set(counts) != {ipc}:
        found = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        raise InputError(f"--pix_init {synthetic.path} has {found} images per class, and --ipc is {ipc}.")
    return synthetic.images[synthetic.labels.argsort(stable=True)]


# --- For other tools -------------------------------------------------------------------------------------------------


def export(folder: Path, synthetic: Synthetic, dataset: Dataset, recipe: dict, command: str):
    """Writes a prepared set as tensors, as pictures by class and with a card, into a folder that is new or empty. `recipe`:
    how it is used, as in synthetic_best.pt; `command`: what evaluates it but for --load_syn."""
    from PIL import Image

    pixels = dataset.transform.undo(synthetic.images)
    levels = (pixels.clamp(0, 1) * 255).round().byte()
    outside = ((pixels < 0) | (pixels > 1)).float().mean().item()
    labels = synthetic.labels if synthetic.labels.ndim == 1 else synthetic.labels.argmax(1)
    with storage.atomic_path(folder, folder=True) as temporary:
        rows = []
        for number, (image, label) in enumerate(zip(levels, labels.tolist())):
            name = dataset.classes[label]
            path = Path("pictures", folder_name(name), f"{number:05}.png")
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(temporary / path)
            rows.append((path, label, name))
        with open(temporary / "labels.csv", "w", newline="", errors="surrogateescape") as file:
            csv.writer(file).writerows([("file", "label", "class"), *rows])
        storage.save_tensor(temporary / "images.pt", synthetic.images)
        storage.save_tensor(temporary / "labels.pt", synthetic.labels)
        if synthetic.syn_lr is not None:
            storage.save_tensor(temporary / "lr.pt", torch.tensor(synthetic.syn_lr))
        save_transform(temporary, dataset.transform.state(), synthetic.identity)  # what is not known stays so
        text = card(synthetic, dataset, recipe, command, outside)
        (temporary / "README.md").write_text(text, encoding="utf-8", errors="surrogateescape")


def card(synthetic: Synthetic, dataset: Dataset, recipe: dict, command: str, outside: float) -> str:
    """What a stranger needs to use an exported set, as Markdown. `outside`: share of the values outside [0, 1]."""
    images, labels, evaluation = synthetic.images, synthetic.labels, recipe["evaluation"]
    transform, network, canvas = dataset.transform.summary(), recipe["network"], recipe["canvas"]
    accuracy, per_class = synthetic.accuracy, f"{len(images) / len(dataset.classes):g} per class"
    reached = "not stored with the set"
    if accuracy:
        reached = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} % on the test images in the run that made it "
        reached += f"({len(accuracy['accs'])} networks {accuracy['model']}, iteration {synthetic.iteration})"
    if transform["kind"] == "zca":
        space = "ZCA whitening, no mean and std"
        undo = "pixels = images.flatten(1) @ transform['inverse'] + transform['mean']  # and .view_as(images)"
    else:
        mean, std = ([round(v, 6) for v in transform[name].tolist()] for name in ("mean", "std"))
        space = f"mean {mean} and std {std} per channel"
        undo = "pixels = images * transform['std'].view(-1, 1, 1) + transform['mean'].view(-1, 1, 1)"
    lr, tensors, held = "not stored with the set", "`images.pt`, `labels.pt`", "float32 images in input space, labels"
    if synthetic.syn_lr is not None:
        lr, tensors, held = f"{synthetic.syn_lr:.6g} (lr.pt)", f"{tensors}, `lr.pt`", f"{held}, learned learning rate"
    views = f"DiffAugment ({', '.join(evaluation['augmentation'])})" if evaluation["augmentation"] else "no augmentation"
    train = (
        f"SGD, momentum {evaluation['momentum']}, weight decay {evaluation['weight_decay']}, batch {evaluation['batch']}, "
        f"{evaluation['epochs']} epochs; after {evaluation['drop_after']}, lr / 10 and momentum from zero; {views}"
    )
    facts = {
        "data set": f"{dataset.name}, {len(dataset.classes)} classes, {dataset.channels}x{network['resolution']}x"
        f"{network['resolution']}; other sizes: {recipe['resize']}",
        "images": f"{len(images)}, {per_class}" + ("" if labels.ndim == 1 else "; soft labels (probabilities)"),
        "accuracy": reached,
        "learning rate": lr,
        "input space": f"{space}: {transform['formula']}",
        "network": f"{network['name']} of this project's networks.py",
        "training": train,
    }
    if canvas:
        facts["textures"] = (
            f"the images are canvases, {canvas['size']} times as wide and high as what a network sees, exported whole; "
            f"train on {canvas['samples']} random crops of each, wrapped around at the borders"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# A synthetic set of {dataset.name}, {per_class}

Made with an implementation of [ATT](https://arxiv.org/abs/2407.14245) or read by it from another method's files.

| | |
| --- | --- |
{table}

| file | content |
| --- | --- |
| {tensors} | {held}, for `torch.load` |
| `transform.pt` | from pixels to input space and back; test images go through it as well |
| `pictures/<class>/*.png` | the same as 8-bit pictures; {outside:.1%} of the values lay outside [0, 1] and were cut off |
| `labels.csv` | file, label and class of each picture: its row in the tensors is its number |

```python
import torch

images, labels, transform = (torch.load(f"{{name}}.pt", weights_only=True) for name in ("images", "labels", "transform"))
{undo}
```

- This project: `{command} --load_syn=FOLDER --data_path=DATA`, where FOLDER is this folder, or its `pictures`, and DATA
  where the real images are.
- DD-Ranking: `compute_metrics(image_tensor=images, hard_labels=labels, syn_lr=...)` with the tensors of this folder.
- DC-BENCH: copy `images.pt` and `labels.pt` as `TM/<data set>/IPC<n>/images_best.pt` and `labels_best.pt`.
- `torchvision.datasets.ImageFolder("pictures")` numbers classes by the alphabet; `labels.csv` has the data set's numbers.
"""
