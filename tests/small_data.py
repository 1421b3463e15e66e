"""Small data sets in their sources' own formats, and real ones where they lie beside the project."""

import hashlib
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def unpacked(archive: str, top: str, into: Path) -> Path:
    """The folder `top` of an archive of real images. Skips the test where there is no such archive."""
    if not (SHARED / archive).exists():
        pytest.skip(f"no {archive} in {SHARED}")
    with tarfile.open(SHARED / archive) as tar:
        tar.extractall(into, filter="data")
    return into / top


def picture(rng, label: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise around a level that tells the class."""
    noise = rng.normal(40 + 20 * (label % 10), 25, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noise).convert(mode)


def image_folder(root: Path, classes=("cat", "dog", "eel"), train=4, test=2, sizes=((40, 32), (32, 50)), suffix="png"):
    """DIR/train/<class>/*, DIR/val/<class>/* with images of several sizes and modes."""
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "P") if suffix == "png" else ("RGB", "L", "CMYK")
    for split, count in (("train", train), ("val", test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(rng, label, sizes[i % len(sizes)], modes[i % len(modes)])
                image.save(folder / f"{i}.{suffix}")
    return root


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def real_cifar10(per_class: int):
    """Real pixels, class by class in CIFAR-10's order: uint8 arrays (per_class, 32, 32, 3). None where there are none."""
    if not (SHARED / "cifar10-jpeg.tar.xz").exists():
        return None
    found = {name: [] for name in CIFAR10_CLASSES}
    with tarfile.open(SHARED / "cifar10-jpeg.tar.xz") as tar:
        for member in tar:
            name = Path(member.name).parent.name
            if name in found and len(found[name]) < per_class:
                found[name].append(np.asarray(Image.open(tar.extractfile(member))))
            if all(len(images) == per_class for images in found.values()):
                return [np.stack(found[name]) for name in CIFAR10_CLASSES]
    raise AssertionError("the archive holds fewer images than asked for")


def real_tiny(into: Path, classes=3) -> Path | None:
    """The first classes of real Tiny ImageNet in its official layout; None where there is none."""
    if not (SHARED / "tiny-imagenet-mini.tar.xz").exists():
        return None
    with tarfile.open(SHARED / "tiny-imagenet-mini.tar.xz") as tar:
        tar.extractall(into, filter="data")
    top = into / "tiny-imagenet-200"
    kept = sorted(path.name for path in (top / "train").iterdir())[:classes]
    for path in (top / "train").iterdir():
        if path.name not in kept:
            shutil.rmtree(path)
    annotations = top / "val" / "val_annotations.txt"
    lines = annotations.read_text().splitlines(keepends=True)
    annotations.write_text("".join(line for line in lines if line.split("\t")[1] in kept))
    return into


def cifar(root: Path, monkeypatch, name="CIFAR10", per_class=5, real=None):
    """CIFAR's batches as torchvision expects them, smaller; `monkeypatch` tells torchvision their checksums. `real`:
    images of each class to use instead of noise."""
    import utils

    kind = getattr(utils.import_torchvision(), name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = CIFAR10_CLASSES if name == "CIFAR10" else [f"class {i:02}" for i in range(100)]
    key = "labels" if name == "CIFAR10" else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(copies):
        labels = [label for _ in range(copies) for label in range(len(names))]
        images = [real[c][rng.integers(len(real[c]))] if real else np.asarray(picture(rng, c, (32, 32))) for c in labels]
        return {"data": np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images]), key: labels}

    if name == "CIFAR10":
        monkeypatch.setattr(kind, "train_list", [write(f"data_batch_{i}", batch(per_class // 5)) for i in range(1, 6)])
        monkeypatch.setattr(kind, "test_list", [write("test_batch", batch(2))])
        meta, md5 = write("batches.meta", {"label_names": names})
        monkeypatch.setattr(kind, "meta", {"filename": meta, "key": "label_names", "md5": md5})
    else:
        monkeypatch.setattr(kind, "train_list", [write("train", batch(per_class))])
        monkeypatch.setattr(kind, "test_list", [write("test", batch(1))])
        meta, md5 = write("meta", {"fine_label_names": names})
        monkeypatch.setattr(kind, "meta", {"filename": meta, "key": "fine_label_names", "md5": md5})
    return root


def mnist(root: Path, name="MNIST", train=40, test=20):
    """The uncompressed idx files that torchvision reads."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.stack([np.asarray(picture(rng, label, (28, 28), "L")) for label in labels])
        head = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes())
    return root


def svhn(root: Path, monkeypatch, train=40, test=20):
    """The .mat files that torchvision reads; `monkeypatch` tells it their checksums."""
    import utils

    kind = utils.import_torchvision().SVHN
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        pixels = np.stack([np.asarray(picture(rng, label, (32, 32))) for label in labels], axis=-1)
        name = f"{split}_32x32.mat"
        scipy.io.savemat(root / name, {"X": pixels, "y": np.where(labels == 0, 10, labels)[:, None]})
        splits[split] = ["", name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(kind, "split_list", splits)
    return root


def tiny(root: Path, classes=("n02", "n01", "n03"), official=True, train=4, test=2):
    """Tiny ImageNet as distributed, or with val/ sorted into class folders; some images are grayscale."""
    top, rng, lines = root / "tiny-imagenet-200", np.random.default_rng(0), []
    for label, wnid in enumerate(sorted(classes)):
        (top / "train" / wnid / "images").mkdir(parents=True)
        (top / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image")
        for i in range(train):
            image = picture(rng, label, (64, 64), "L" if i == 0 else "RGB")
            image.save(top / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        folder = top / "val" / "images" if official else top / "val" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(test):
            name = f"val_{label + i * len(classes)}.JPEG"
            picture(rng, label, (64, 64)).save(folder / name)
            lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    if official:
        (top / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
    return root


def imagenet(root: Path, wnids, extra=("n99999999",), train=3, test=2):
    """train/<wnid>/, val/<wnid>/ with JPEGs of several sizes and modes, and wnids that no subset has."""
    return image_folder(root, (*wnids, *extra), train, test, sizes=((160, 120), (100, 200), (128, 128)), suffix="JPEG")
