"""Small data sets in their sources' own formats, and real ones where they lie beside the project."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
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


def cifar10(root: Path, monkeypatch, train=50, test=20):
    """CIFAR-10's batches as torchvision expects them, smaller; `monkeypatch` tells torchvision their checksums."""
    import utils

    kind = utils.import_torchvision().CIFAR10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count):
        labels = [i % 10 for i in range(count)]
        pixels = [np.asarray(picture(rng, label, (32, 32))).transpose(2, 0, 1).reshape(-1) for label in labels]
        return {"data": np.stack(pixels), "labels": labels}

    per_batch = train // 5
    lists = [write(f"data_batch_{i}", batch(per_batch)) for i in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", lists)
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch(test))])
    name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root
