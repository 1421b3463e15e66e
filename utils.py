"""Data sets as tensors, their normalisation or ZCA whitening, DiffAugment, seeds and the device.

A loaded data set is one uint8 tensor of images and one of labels for each split. `Dataset.transform` takes pixels to
the networks' input space, and its `undo` takes images back to [0, 1].
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import storage
from performance import reuse_freed_memory, tf32
from storage import InputError, content_hash, read_cache, write_cache

# --- Seeds and device ------------------------------------------------------------------------------------------------


def generator(seed: int, *stream) -> torch.Generator:
    """The random stream of one purpose, such as ("batches", iteration). Streams are independent of each other and of
    how often any other is used; they are drawn on the CPU, so that every device sees the same numbers."""
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextlib.contextmanager
def seeded(seed: int, *stream):
    """Torch's global CPU generator, from which modules draw their initial parameters, seeded for one block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, *stream).initial_seed())
        yield


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one; under torchrun, `cuda` is that of the process. Raises InputError
    for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
        if device.type == "cpu":
            reuse_freed_memory()
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are made on the current one
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available here; use auto, cpu, cuda or cuda:N.") from error
    return device


# --- From pixels to the networks' input space and back ---------------------------------------------------------------


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) / std per channel; mean and std are (C,) on the scale of [0, 1]."""

    mean: Tensor
    std: Tensor
    formula = "images = (pixels - mean) / std per channel, for pixels in [0, 1]"

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N,C,H,W) to float32."""
        mean, std = (v.to(pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def undo(self, images: Tensor) -> Tensor:
        mean, std = (v.to(images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return images * std + mean

    def summary(self) -> dict:
        tensors = {"mean": self.mean, "std": self.std}
        return {"kind": "normalisation", "formula": self.formula, "fingerprint": content_hash(*tensors.values())} | tensors

    state = summary


@dataclass(frozen=True)
class Whitening:
    """ZCA: (x - mean) @ matrix over flattened images in [0, 1]; mean (D,), matrix and inverse (D, D)."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor
    rows = 5000  # images at a time: bounds the float copy of the pixels
    formula = (
        "images = (pixels.flatten(1) - mean) @ matrix, for pixels in [0, 1], and back: images.flatten(1) @ inverse + mean; "
        "the file transform.pt with this fingerprint holds mean, matrix and inverse"
    )

    @tf32(False)  # which containers may allow in matrix products
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N,C,H,W) to float32."""
        mean, matrix = self.mean.to(pixels.device), self.matrix.to(pixels.device)
        out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        for chunk, part in zip(pixels.split(self.rows), out.split(self.rows)):
            part.copy_((((chunk.flatten(1).float() / 255) - mean) @ matrix).view_as(chunk))
        return out

    @tf32(False)
    def undo(self, images: Tensor) -> Tensor:
        inverse = self.inverse.to(images.device)
        return (images.flatten(1) @ inverse + self.mean.to(images.device)).view_as(images)

    def state(self) -> dict:
        return self.summary() | self.tensors()

    def summary(self) -> dict:
        """The state without what is large."""
        return {"kind": "zca", "eps": ZCA_EPS, "formula": self.formula, "fingerprint": self.fingerprint}

    @functools.cached_property
    def fingerprint(self) -> str:
        return content_hash(*self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}


def stored_transform(state: dict | None) -> Normalisation | Whitening | None:
    """From what `state` gave; None where the tensors are not in it, as in what `summary` gave for a whitening."""
    for made in (Normalisation, Whitening):
        names = [field.name for field in fields(made)]
        if state and state.keys() >= set(names):
            return made(*(state[name] for name in names))
    return None


ZCA_EPS = 0.1
ZCA_MAX_RESOLUTION = 64


def fit_whitening(pixels: Tensor, cache: Path) -> Whitening:
    """ZCA of a training set (N,C,H,W) uint8 as the field fits it, with kornia; read from `cache` where it was fitted
    before on the same pixels."""
    path = cache / f"zca-{storage.checksum(pixels):08x}-{'x'.join(map(str, pixels.shape))}-eps{ZCA_EPS}.pt"
    if cached := stored_transform(read_cache(path, "zca")):
        return cached
    try:
        from kornia.enhance import ZCAWhitening
    except ImportError as error:
        raise InputError("--zca needs kornia, which is not installed: pip install kornia.") from error
    zca = ZCAWhitening(eps=ZCA_EPS, compute_inv=True).fit(pixels.float().div_(255))
    whitening = Whitening(zca.mean_vector.reshape(-1), zca.transform_matrix, zca.transform_inv)
    write_cache(path, "zca", whitening.tensors())
    return whitening


# --- Data sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    content: str = ""  # hash of the files and labels they were read from, where there are files

    def __len__(self):
        return len(self.labels)

    def part(self, chosen: Tensor) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Request:
    """What the command line says about the data."""

    name: str
    path: Path
    subset: str = "imagenette"
    resolution: int | None = None  # None: the data set's own
    zca: bool = False

    def __post_init__(self):
        """Raises InputError for what no data could satisfy."""
        if self.name == "Folder" and self.resolution is None:
            raise InputError("--dataset Folder needs --res, the side in pixels to bring its images to.")
        if self.zca and self.side > ZCA_MAX_RESOLUTION:
            raise InputError(
                f"--zca is limited to {ZCA_MAX_RESOLUTION} pixels, where its covariance still fits in memory, and "
                f"{self.name} is at {self.side}: leave out --zca or lower --res."
            )

    @property
    def side(self) -> int:
        return self.resolution or SOURCES[self.name].resolution

    @property
    def resized(self) -> bool:
        return self.side != SOURCES[self.name].resolution

    @property
    def cache(self) -> Path:
        return self.path / "cache"


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: list[str]  # in label order
    train: Images
    test: Images
    transform: Normalisation | Whitening
    identity: dict  # what experts and synthetic sets made for this data must agree on, as plain values

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    @property
    def resolution(self) -> int:
        return self.train.pixels.shape[2]

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, classes and resolution: what a network is built for."""
        return self.channels, len(self.classes), self.resolution

    def on(self, device, images: Images) -> tuple[Tensor, Tensor]:
        """Images in network input space and their labels, on a device."""
        return self.transform(images.pixels.to(device)), images.labels.to(device)

    def sample(self, per_class: int, random: torch.Generator) -> Tensor:
        """`per_class` random training images of each class, (classes * per_class, C, H, W) in network input space,
        grouped by class in label order; without repetition while a class lasts."""
        order = torch.randperm(len(self.train), generator=random)
        labels = self.train.labels[order]
        members = (order[labels == c] for c in range(len(self.classes)))
        chosen = torch.cat([m.repeat(-(-per_class // len(m)))[:per_class] for m in members])
        return self.transform(self.train.pixels[chosen])


def read_digits(request: Request):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, test = (Images(pixels[part], labels[part]) for part in parts)
    return train, test, [str(c) for c in digits.target_names]


def import_torchvision():
    """torchvision.datasets, also where a torchvision built for CUDA stands beside a torch built for the CPU."""
    try:
        import torchvision.datasets
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        # On import torchvision registers fake versions of two operators, and raises where its compiled part, which
        # declares them, did not load. Nothing here calls them: declaring them is enough.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision.datasets
    return torchvision.datasets


def read_torchvision(request: Request):
    datasets = import_torchvision()
    kind = getattr(datasets, request.name)
    splits = ({"split": "train"}, {"split": "test"}) if request.name == "SVHN" else ({"train": True}, {"train": False})
    try:
        parts = [kind(request.path, download=True, **split) for split in splits]
    except Exception as error:  # no network, no permission, a damaged archive: the way out is the same
        raise InputError(
            f"{request.name} is not complete in --data_path {request.path} and could not be downloaded "
            f"({error}); place there the files that torchvision.datasets.{request.name} expects."
        ) from error
    classes = getattr(parts[0], "classes", [str(c) for c in range(10)])
    return *map(_tensors, parts), list(classes)


def _tensors(part) -> Images:
    """SVHN is (N,C,H,W) already, CIFAR (N,H,W,C) and MNIST (N,H,W)."""
    pixels = torch.as_tensor(part.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels
    labels = part.targets if hasattr(part, "targets") else part.labels
    return Images(pixels.contiguous(), torch.as_tensor(labels).long())


# --- Images in files -------------------------------------------------------------------------------------------------


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def subfolders(folder: Path) -> list[str]:
    """Names in sorted order, hidden ones aside. Raises InputError where `folder` is not a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}.")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def images_below(folder: Path) -> list[str]:
    """Paths of the image files anywhere below a folder, in sorted order."""
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    )


Files = list[tuple[str, int]]  # path and label of every image of a split


def class_folders(root: Path, classes: list[str]) -> Files:
    """`root/<class>/**`; raises InputError for a class without images."""
    files = [(path, label) for label, name in enumerate(classes) for path in images_below(root / name)]
    for label in sorted({*range(len(classes))} - {label for _, label in files}):
        raise InputError(f"{root / classes[label]} holds no images; every class needs some there.")
    return files


def squash(image, side: int):
    return image.resize((side, side), resample=2)  # 2: bilinear


def squash_unfiltered(image, side: int):
    """Each pixel from the four nearest, without antialiasing, as torchvision 0.14 resized tensors for the paper."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float()
    return F.interpolate(pixels, (side, side), mode="bilinear")[0].round().byte().permute(1, 2, 0).numpy()


def centre_crop(image, side: int):
    """Short side to `side`, then the centre square."""
    from PIL import ImageOps

    return ImageOps.fit(image, (side, side), method=2)


def read_pictures(paths: Sequence[str], side: int, fit: Callable) -> tuple[Tensor, list[bytes]]:
    """Image files as RGB uint8 (N,3,side,side), decoded in parallel, and the hash of each file. Raises InputError naming
    a file that cannot be decoded."""
    import numpy as np
    from PIL import Image

    def read(path):
        data = Path(path).read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as image:
                image = image.convert("RGB")
                return hashlib.blake2b(data).digest(), np.asarray(image if image.size == (side, side) else fit(image, side))
        except Exception as error:  # PIL raises a dozen kinds for damaged files
            raise InputError(f"{path} cannot be decoded as an image ({error}); repair it or move it away.") from error

    pixels, digests = torch.empty(len(paths), 3, side, side, dtype=torch.uint8), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, (digest, image) in enumerate(pool.map(read, paths)):
            digests.append(digest)
            pixels[i] = torch.from_numpy(image.copy()).permute(2, 0, 1)
    return pixels, digests


def decode(files: Files, request: Request) -> Images:
    """Image files as a data set brings them to its resolution, decoded once and then read from a cache while the files stay
    the same. Their content is known by the files' bytes: the decoders of JPEG differ between machines."""
    side, fit = request.side, SOURCES[request.name].fit
    stats = ((path, label, os.stat(path)) for path, label in files)
    known_by = [f"{path}\0{label} {stat.st_size} {stat.st_mtime_ns}\n" for path, label, stat in stats]
    fingerprint = content_hash(f"{side} {fit.__name__}".encode(), "".join(known_by).encode(errors="surrogateescape"))
    paths, labels = zip(*files)
    path, labels = request.cache / f"decoded-{fingerprint}.pt", torch.tensor(labels)
    cached = read_cache(path, "decoded")
    if cached and "content" in cached:  # versions 1 and 2 did not keep it
        return Images(cached["pixels"], labels, cached["content"])

    pixels, digests = read_pictures(paths, side, fit)
    content = content_hash(labels, *digests)
    write_cache(path, "decoded", {"pixels": pixels, "content": content})
    return Images(pixels, labels, content)


def folder_split(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    wanted = " or ".join(f"{name}/" for name in names)
    raise InputError(f"{root} has no folder {wanted}; --dataset Folder needs train/<class>/* and val/ or test/ there.")


def read_folder(request: Request):
    root = request.path
    if not root.is_dir():
        raise InputError(f"--data_path {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    train, test = folder_split(root, "train"), folder_split(root, "val", "test")
    classes, tested = subfolders(train), subfolders(test)
    if len(classes) < 2:
        raise InputError(f"{train} has {len(classes)} class folders; it needs at least 2.")
    for name in sorted({*classes} ^ {*tested}):
        there, lacking = (train, test) if name in classes else (test, train)
        raise InputError(f"Class {name!r} has a folder in {there} and none in {lacking}.")
    parts = [class_folders(folder, classes) for folder in (train, test)]
    return *(decode(part, request) for part in parts), classes


TINY_PLACE = (
    "get http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there, so that --data_path holds "
    "tiny-imagenet-200/ with train/ and val/"
)


def read_tiny(request: Request):
    """tiny-imagenet-200/ as it is distributed, or with val/ sorted into class folders; --data_path is that folder or
    the one around it. Labels are the wnids in sorted order."""
    root = request.path / "tiny-imagenet-200"
    root = root if root.is_dir() else request.path
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        raise InputError(f"There is no Tiny ImageNet in --data_path {request.path}: {TINY_PLACE}.")
    classes = subfolders(root / "train")
    if not classes:
        raise InputError(f"{root / 'train'} holds no class folders: {TINY_PLACE}.")
    train = class_folders(root / "train", classes)
    annotations = root / "val" / "val_annotations.txt"
    if annotations.is_file() and (root / "val" / "images").is_dir():
        test = annotated_files(annotations, {name: label for label, name in enumerate(classes)})
    else:
        test = class_folders(root / "val", classes)
    return *(decode(part, request) for part in (train, test)), classes


def annotated_files(annotations: Path, labels: dict[str, int]) -> Files:
    """The files beside val_annotations.txt: a line each, name and wnid first, separated by tabs."""
    files = []
    for number, line in enumerate(annotations.read_text("utf-8", "surrogateescape").splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        path = annotations.parent / "images" / name
        if wnid not in labels or not path.is_file():
            wrong = f"there is no class {wnid!r} in train/" if wnid not in labels else f"{path} does not exist"
            raise InputError(f"{annotations} line {number} cannot be used: {wrong}.")
        files.append((str(path), labels[wnid]))
    if not files:
        raise InputError(f"{annotations} names no images.")
    return files


def read_imagenet(request: Request):
    """The ten classes of a subset from any tree with train/<wnid>/ and val/<wnid>/: all of ImageNet, or a folder with
    just these ten, as Imagenette is distributed."""
    wnids = SUBSETS[request.subset]
    roots = [request.path, request.path / "imagenet", request.path / "ImageNet", request.path / request.subset]
    roots += sorted(request.path.glob(f"{request.subset}*/")) if request.path.is_dir() else []
    for root in roots:
        if all((root / split / wnid).is_dir() for split in ("train", "val") for wnid in wnids):
            parts = [class_folders(root / split, wnids) for split in ("train", "val")]
            return *(decode(part, request) for part in parts), list(wnids)
    raise InputError(
        f"There is no {request.subset} in --data_path {request.path}: it needs train/<wnid>/ and val/<wnid>/ there for "
        f"{', '.join(wnids)}; get ImageNet (ILSVRC 2012) from https://image-net.org, its validation images sorted into "
        "wnid folders."
    )


WNIDS = {  # --subset -> in label order
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257",
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 n02105641",
    "imagefruit": "n07753275 n07753592 n07745940 n07747607 n07749582 n07768694 n07753113 n07720875 n07718472 n07742313",
    "imagemeow": "n02123045 n02123159 n02123394 n02123597 n02124075 n02129165 n02129604 n02128925 n02128757 n02127052",
    "imagesquawk": "n01806143 n02007558 n01818515 n02051845 n02056570 n01614925 n01843383 n01518878 n01860187 n01819313",
    "imageyellow": "n02206856 n12057211 n07753592 n07749582 n12144580 n04146614 n03530642 n02129165 n01773157 n01531178",
}
SUBSETS = {name: wnids.split() for name, wnids in WNIDS.items()}


@dataclass(frozen=True)
class Source:
    """What differs between data sets."""

    read: Callable  # Request -> (train Images, test Images, class names)
    resolution: int | None  # the data set's own; None: only --res says
    resize: str = "bilinear with antialiasing, rounded to whole levels"  # how images come to another resolution
    fit: Callable = squash  # the same for a picture: (PIL image, side) to (side, side, 3) of levels, or an image of them
    mean: tuple | None = None  # None: measured on the training set
    std: tuple | None = None


CIFAR = dict(read=read_torchvision, resolution=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
SQUASHED = "width and height to the resolution, whatever the aspect (PIL, bilinear)"
UNFILTERED = "width and height to the resolution, whatever the aspect (bilinear without antialiasing, as torch interpolates)"
CROPPED = "short side to the resolution, then the centre square (PIL.ImageOps.fit, bilinear)"
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SOURCES = {
    "CIFAR10": Source(**CIFAR),
    "CIFAR100": Source(**CIFAR),
    "Tiny": Source(read_tiny, resolution=64, resize=SQUASHED, **IMAGENET),
    "ImageNet": Source(read_imagenet, resolution=128, resize=UNFILTERED, fit=squash_unfiltered, **IMAGENET),
    "MNIST": Source(read_torchvision, resolution=28, mean=(0.1307,), std=(0.3081,)),
    "FashionMNIST": Source(read_torchvision, resolution=28, mean=(0.2861,), std=(0.3530,)),
    "SVHN": Source(read_torchvision, resolution=32, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)),
    "Digits": Source(read_digits, resolution=8),
    "Folder": Source(read_folder, resolution=None, resize=CROPPED, fit=centre_crop),
}


def load_dataset(request: Request, transform: Normalisation | Whitening | None = None) -> Dataset:
    """Reads a data set whole, to be seen through `transform` (default: its own normalisation or whitening). Raises
    InputError where it is missing, incomplete or cannot be decoded."""
    source = SOURCES[request.name]
    train, test, classes = source.read(request)
    content, names = train.content or content_hash(train.labels, train.pixels), json.dumps(classes).encode()
    train, test = (Images(resize(part.pixels, request.side), part.labels) for part in (train, test))
    mean, std = (source.mean, source.std) if source.mean or request.zca else channel_statistics(train.pixels)
    if transform is None and request.zca:
        transform = fit_whitening(train.pixels, request.cache)
    elif transform is None:
        transform = Normalisation(torch.tensor(mean), torch.tensor(std))
    identity = {
        "dataset": request.name,
        "resolution": request.side,
        "zca": request.zca,
        "class_count": len(classes),
        "classes": hashlib.blake2b(names, digest_size=4).hexdigest(),
        "images": content_hash(names, content.encode()),  # of the training set
        "normalisation": None if request.zca else [[round(v, 6) for v in part] for part in (mean, std)],
    }
    return Dataset(request.name, classes, train, test, transform, identity)


def resize(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    resized = [
        F.interpolate(chunk.float(), (side, side), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        for chunk in pixels.split(5000)
    ]
    return torch.cat(resized)


def channel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and population std per channel on the scale of [0, 1]; a constant channel counts as std 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in pixels.transpose(0, 1)]).double()
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels.square() - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


# --- DiffAugment and textures ----------------------------------------------------------------------------------------
# Each operation takes images (N,C,H,W) and u (N,3) uniform in [0, 1), one row an image, and is differentiable in the
# images. Drawing and applying are apart, so that a step can be replayed exactly.


def _column(u: Tensor, i: int) -> Tensor:
    return u[:, i].view(-1, 1, 1, 1)


def aug_color(x, u):
    """Brightness + (u - 0.5), saturation x 2u around each pixel's grey, contrast x (u + 0.5) around the image's mean."""
    x = x + (_column(u, 0) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * _column(u, 1)) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (_column(u, 2) + 0.5) + mean


def _integers(u: Tensor, count: int) -> Tensor:
    """Uniform in 0..count-1."""
    return (u * count).long().clamp_(max=count - 1)


def aug_crop(x, u):
    """A shift by up to an eighth of each side in whole pixels, zeros outside."""
    n, c, h, w = x.shape
    index, inside = [], []
    for axis, side in enumerate((h, w)):
        reach = int(side * 0.125 + 0.5)
        position = torch.arange(side, device=x.device) + (_integers(u[:, axis], 2 * reach + 1) - reach)[:, None]
        inside.append((position >= 0) & (position < side))
        index.append(position.clamp_(0, side - 1))
    flat = (index[0][:, :, None] * w + index[1][:, None, :]).view(n, 1, h * w).expand(-1, c, -1)
    mask = (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)
    return x.flatten(2).gather(2, flat).view_as(x) * mask


def aug_cutout(x, u):
    """One zero square of half the side, its centre uniform over the image, clipped at the border."""
    covered = []
    for axis, side in enumerate(x.shape[2:]):
        size = int(side * 0.5 + 0.5)
        start = _integers(u[:, axis], side + 1 - size % 2)[:, None] - size // 2
        position = torch.arange(side, device=x.device)
        covered.append((position >= start) & (position < start + size))
    return x * ~(covered[0][:, :, None] & covered[1][:, None, :]).unsqueeze(1)


def aug_flip(x, u):
    return torch.where(_column(u, 0) < 0.5, x.flip(3), x)


def _warp(x, matrix):
    """Resamples with a 2x2 matrix per image that multiplies the sampling grid; zeros outside."""
    affine = F.pad(matrix, (0, 1)).to(x.dtype)
    grid = F.affine_grid(affine, x.shape, align_corners=True)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=True)


def aug_scale(x, u):
    low, high = 1 / 1.2, 1.2
    return _warp(x, torch.diag_embed(u[:, :2] * (high - low) + low))


def aug_rotate(x, u):
    angle = (u[:, 0] - 0.5) * 2 * math.radians(15)
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2))


AUGMENTATIONS = {
    "color": aug_color, "crop": aug_crop, "cutout": aug_cutout, "flip": aug_flip, "scale": aug_scale, "rotate": aug_rotate,
}  # fmt: skip


@dataclass(frozen=True)
class Augmentation:
    """One call of DiffAugment with its parameters drawn: the same function each time it is applied."""

    name: str
    u: Tensor  # (N, 3)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (n,C,H,W), n <= N."""
        return AUGMENTATIONS[self.name](x, self.u[: len(x)])


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """'color_crop' -> ('color', 'crop'); 'none' -> (). Raises ValueError for an unknown operation."""
    names = () if strategy.lower() in ("", "none") else tuple(strategy.split("_"))
    for name in names:
        if name not in AUGMENTATIONS:
            raise ValueError(f"{name!r} is no augmentation; there are {', '.join(AUGMENTATIONS)}, joined by _")
    return names


@dataclass(frozen=True)
class Canvas:
    """A texture: a synthetic image `size` times as wide and high as what a network sees, which is `side` pixels. A
    network sees `samples` random crops of it at a time, wrapped around at the borders."""

    side: int
    size: int
    samples: int


@dataclass(frozen=True)
class Crops:
    """Crops of canvases with their places drawn: (n,C,S,S) to (samples * n, C, side, side), sample after sample."""

    side: int
    places: Tensor  # int64 (samples, N, 2), upper left corners

    def __call__(self, x: Tensor) -> Tensor:
        n, c, full, _ = x.shape
        along = torch.arange(self.side, device=x.device)
        rows, columns = ((self.places[:, :n, axis, None] + along) % full for axis in (0, 1))
        flat = (rows[..., :, None] * full + columns[..., None, :]).flatten(2)  # (samples, n, side²)
        source = x.flatten(2).expand(len(flat), -1, -1, -1)
        crops = source.gather(3, flat[:, :, None].expand(-1, -1, c, -1))
        return crops.reshape(-1, c, self.side, self.side)


@dataclass(frozen=True)
class View:
    """How a network sees a batch, with everything drawn: the same map each time it is applied, differentiable in x."""

    crops: Crops | None = None
    augmentation: Augmentation | None = None
    mirrored: bool = False  # all images, before anything else

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n,C,S,S) and their labels to what is trained on; with crops, several of each."""
        if self.mirrored:
            x = x.flip(-1)
        if self.crops:
            x, y = self.crops(x), torch.cat([y] * len(self.crops.places))
        return (self.augmentation(x) if self.augmentation else x), y


@dataclass(frozen=True)
class Views:
    """How a network sees the images it trains on: crops of a canvas where there is one, then DiffAugment."""

    strategy: tuple[str, ...] = ()
    canvas: Canvas | None = None

    def draw(self, calls: int, batch: int, random: torch.Generator, device) -> list[View]:
        """The views of `calls` batches of up to `batch` images. Per call one operation of the strategy is drawn
        uniformly, per image its parameters. All parameters go to the device in one transfer."""
        crops = augmentations = [None] * calls
        samples = self.canvas.samples if self.canvas else 1
        if self.strategy:
            choices = torch.randint(len(self.strategy), (calls,), generator=random).tolist()
            u = torch.rand(calls, samples * batch, 3, generator=random).to(device, non_blocking=True)
            augmentations = [Augmentation(self.strategy[choice], row) for choice, row in zip(choices, u)]
        if self.canvas:
            full = self.canvas.side * self.canvas.size
            places = torch.randint(full, (calls, samples, batch, 2), generator=random).to(device, non_blocking=True)
            crops = [Crops(self.canvas.side, place) for place in places]
        return [View(*parts) for parts in zip(crops, augmentations)]
