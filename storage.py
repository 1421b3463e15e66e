"""How files are written and read: formats, versions, checks, files that appear whole or not at all; and experts' files.

A file of ours is a torch zip archive of plain tensors, numbers, strings, lists and dicts, with `format` and `version`
in it. Nothing here executes what a file says: every load is `weights_only`. What cannot be read raises InputError.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import zipfile
import zlib
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from networks import OTHER_NAMES

FORMAT_VERSION = 3
SMALL_RECORD = 1 << 20  # bytes; a memory-mapped file's records up to this size are checked on opening
PREFIX = {"raw": "", "ema": "ema_"}  # of a run's files, and of names in wandb


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence that names it and says what would be right."""


class RunError(Exception):
    """A run cannot go on, though what it was given was right. The message is one sentence."""


class WriteError(RunError):
    """A file cannot be written: a full disk, a lost permission. What was there before is still there."""


# --- Writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path):
    """Turns what the system says against writing into a WriteError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise WriteError(f"{path} cannot be written ({reason}); make room or permit it, and go on.") from error


@contextlib.contextmanager
def atomic_path(path: Path, folder: bool = False):
    """Yields a temporary file or folder beside `path`, which takes its place, fsynced, when the block ends without an error;
    a folder that is there must be empty. Raises WriteError."""
    path = Path(path).absolute() if folder else Path(path)  # the name of "." is in its absolute form alone
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir() if folder else temporary.touch()  # the system says here whether it may be written
            yield temporary
            for each in (*temporary.rglob("*"), temporary):  # of a file, itself alone
                _fsync(each)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            _remove(temporary)


def _remove(path: Path):
    """A file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _fsync(path: Path):
    """Of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensor(path: Path, tensor: torch.Tensor):
    """A bare tensor on the CPU with storage of its own, as the field's tools load it."""
    with atomic_path(path) as temporary:
        torch.save(tensor.detach().cpu().clone(), temporary)


def save(path: Path, kind: str, content: dict):
    header = {"format": f"att-{kind}", "version": FORMAT_VERSION, "made_with": made_with()}
    with atomic_path(path) as temporary:
        torch.save(header | content, temporary)


@functools.cache
def made_with() -> dict:
    """Versions of what wrote a file."""
    home = Path(__file__).parent
    git = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"]
    project = "unknown"
    if (home / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            project = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"project": project, "torch": str(torch.__version__), "python": platform.python_version()}


def save_json(path: Path, content: dict):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def locked(folder: Path):
    """Makes a folder and keeps other processes that ask out of it. Raises InputError where one is in it already, or
    where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another process; wait for it or choose another folder.") from error
        except OSError:  # a file system without locks
            pass
        else:
            for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
                _remove(left)
        yield


# --- Reading ---------------------------------------------------------------------------------------------------------


def _check_archive(path: Path, largest: int | None):
    """Compares records of up to `largest` bytes (None: all) with their stored CRC-32; torch itself does not."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if largest is None or record.file_size <= largest:
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass


def load_any(path: Path, mmap: bool = False):
    """The object in a torch file, tensors on the CPU. Raises InputError, naming the file, where it is missing, damaged,
    or holds anything but tensors and plain Python values."""
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        _check_archive(path, SMALL_RECORD if mmap else None)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged or hostile file provokes in zipfile, pickle and torch
        raise InputError(
            f"{path} is damaged, or a file of another program ({type(error).__name__}); move it away and make it again."
        ) from error


def load(path: Path, kind: str) -> dict:
    """The content of a file written by `save` as `kind`. Raises InputError as `load_any`, and for another format."""
    return checked(load_any(path), path, kind)


def checked(content, path: Path, kind: str) -> dict:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != f"att-{kind}":
        raise InputError(f"{path} holds {found}, where a file of format att-{kind} is needed.")
    version = content.get("version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise InputError(f"{path} has format version {version}, and this program reads versions 1 to {FORMAT_VERSION}.")
    for before in range(version, FORMAT_VERSION):
        content = UPGRADES.get((kind, before), dict)(content)
    return content


def _upgrade_settings(settings: dict) -> dict:
    """Version 1 called "fp32" what PyTorch does by itself; the student was strict."""
    precision = settings.get("precision", "fp32")
    return settings | {"precision": "auto" if precision == "fp32" else precision}


def _upgrade_checkpoint(content: dict) -> dict:
    state, settings = dict(content["state"]), _upgrade_settings(content["settings"]) | {"student_precision": "fp32"}
    results = {name: state.pop(name) for name in ("best", "last")}
    return content | {"state": state, "settings": settings, "results": results}


UPGRADES = {  # from a version to the next
    ("expert", 1): lambda content: content | {"settings": _upgrade_settings(content["settings"])},
    ("checkpoint", 1): _upgrade_checkpoint,
}
UNSAID = ("images", "class_count")  # in files of versions 1 and 2


def require_same(path: Path, made: dict, wanted: dict, remedy: str = ""):
    """Raises InputError where the file at `path` was made with other settings than a command wants, naming the first in
    the words of the command line. What the file does not say is not compared: `on_trust` tells it."""
    for name, value in wanted.items():
        if name not in made and name in UNSAID:
            continue
        if made.get(name) != value and not (name == "normalisation" and _close(made.get(name), value)):
            raise InputError(f"{path} was made {_difference(name, made.get(name), value)}{remedy}.")


def _close(made, wanted) -> bool:
    """Of means and deviations, which are measured on images that two machines decode to slightly different pixels."""
    try:
        return np.shape(made) == np.shape(wanted) != () and np.allclose(made, wanted, rtol=0, atol=1e-3)
    except (TypeError, ValueError):  # no numbers, or not as many for every channel
        return False


def _difference(name: str, made, wanted) -> str:
    """In the words of the command line."""
    if name == "augmentation":
        name, made, wanted = "dsa_strategy", "_".join(made or []) or "none", "_".join(wanted) or "none"
    flag = "--res" if name == "resolution" else f"--{name}"
    if isinstance(made, bool) or isinstance(wanted, bool):
        return f"{'with' if made else 'without'} {flag}, and this command is {'with' if wanted else 'without'} it"
    said = {
        "images": "from other training images than --data_path holds now",
        "classes": "for other classes than --data_path holds now",
        "class_count": f"for {made} classes, and this command has {wanted}",
        "parameters": f"for a network of {made} parameters, and this command's has {wanted}",
        "normalisation": f"for images of mean and std {made}, and those of this command have {wanted}",
    }
    return said.get(name) or f"with {flag} {made}, and this command says {wanted}"


def on_trust(path: Path, identity: dict) -> list[str]:
    """The sentence on a file that does not say on which images it was made; none where it does."""
    return [] if "images" in identity else [f"{path} does not say from which images it was made; this is taken on trust."]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it holds all its values: neither sparse nor quantised."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def read_cache(path: Path, kind: str) -> dict | None:
    """What `write_cache` wrote; None where there is none, or it is damaged: it can be made again."""
    with contextlib.suppress(InputError, OSError):
        return load(path, kind)
    return None


def write_cache(path: Path, kind: str, content: dict):
    """Caches only save time: a folder that cannot be written to, or a full disk, costs a line on screen."""
    try:
        save(path, kind, content)
    except WriteError as error:
        print(f"Not cached for the next start: {error}")


def content_hash(*parts: bytes | torch.Tensor) -> str:
    """16 hex digits of bytes and of the values of tensors on the CPU."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.contiguous().view(-1).numpy() if isinstance(part, torch.Tensor) else part)
    return digest.hexdigest()


def load_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error


def read_metrics(path: Path, keys) -> tuple[dict[str, tuple[array, array]], list[dict]]:
    """Of metrics.jsonl, key to iterations and values, and what each evaluation found: model, variant, iteration, mean, std,
    accs. Reads line by line: a file may have a million. Raises InputError for a damaged line."""
    values, evaluations = {key: (array("d"), array("d")) for key in keys}, []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise InputError(f"{path} line {number} is damaged; restore the file.") from error
            if result := line.get("eval"):
                evaluations.append({"iteration": line["iteration"], **result})
                continue
            for key, (x, y) in values.items():
                if line.get(key) is not None:
                    x.append(line["iteration"])
                    y.append(line[key])
    return values, evaluations


# --- Experts ---------------------------------------------------------------------------------------------------------
# File k holds expert k, one row of parameters per stored epoch

EXPERT_FILE = re.compile(r"replay_buffer_(\d+)\.pt")


def expert_folder(buffer_path: Path, request, model: str, identity: dict, published: bool = False) -> tuple[Path, str]:
    """Where the experts for the data of a utils.Request and a network lie, the same from both scripts. Where the only ones
    that fit lie in a folder as it was named before, or, if they are only to be read, as `published` code names it, that
    folder and a line that says so."""
    root, name = Path(buffer_path), request.name
    mark = "_ZCA" if request.zca else ""
    if name in ("CIFAR10", "CIFAR100"):  # the published names
        mark = "" if request.zca else "_NO_ZCA"
    size = f"_res{request.side}" if request.resized else ""
    if name == "ImageNet":
        root, name = root / name, request.subset
    if name == "Folder":  # known by its images: two of the same name must not mix, and one may be renamed
        root, name = root / name, identity["images"][:8]
    folder = root / f"{name}{mark}{size}" / model
    before = [root / f"{name}{size}" / model] if mark == "_ZCA" else []  # whitened and plain had one folder
    if request.name == "Folder":
        before = sorted(root.glob(f"*_{identity['classes']}{size}/{model}"))
        before.sort(key=lambda path: not path.parent.name.startswith(f"{request.path.resolve().name}_"))
    others = [(path, "its name in earlier versions") for path in before]
    if published:
        other = OTHER_NAMES.get(model, model)
        others.append((folder.with_name(other), f"which is {model} as well"))
        if request.name == "ImageNet" and not request.zca:
            others += [(root / name / str(request.side) / one, "as published code names it") for one in (model, other)]
    if not expert_files(folder):
        for place, why in others:
            if has_experts_for(place, identity):
                return place, f"There are no experts in {folder}; those in {place}, {why}, are used."
    return folder, ""


def expert_files(folder: Path) -> dict[int, Path]:
    """Number to path of the expert files in a folder, in order; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    matches = (EXPERT_FILE.fullmatch(path.name) for path in folder.iterdir())
    return dict(sorted((int(m[1]), folder / m[0]) for m in matches if m))


def checksum(row: torch.Tensor) -> int:
    return zlib.crc32(row.contiguous().numpy().data)


def save_expert(
    folder: Path, k: int, trajectory: torch.Tensor, settings: dict, test_accuracy: list[float], cost: dict | None = None
):
    """`trajectory`: (epochs + 1, P) float32 on the CPU, row e = the parameters after e epochs; `cost`: seconds and
    memory_gb of its training."""
    content = {"trajectory": trajectory, "checksums": torch.tensor([checksum(row) for row in trajectory])}
    content |= {"settings": settings, "test_accuracy": test_accuracy, "cost": cost}
    save(folder / f"replay_buffer_{k}.pt", "expert", content)


@dataclass(frozen=True)
class Expert:
    """One trajectory, memory-mapped: only the epochs that are read are loaded."""

    path: Path
    rows: list  # epoch -> (P,) float32, or a list of parameter tensors in a published file
    checksums: list[int] | None  # None in a published file
    settings: dict | None  # None in a published file
    cost: dict | None = None  # seconds and memory_gb of its training, where the file says

    @property
    def epochs(self) -> int:
        return len(self.rows) - 1

    @property
    def size(self) -> int:
        """Number of parameters, P."""
        first = self.rows[0]
        return first.numel() if isinstance(first, torch.Tensor) else sum(p.numel() for p in first)

    def snapshot(self, epoch: int) -> torch.Tensor:
        """Parameters after `epoch` epochs, (P,) float32, a copy. Raises InputError if they are not those stored."""
        row = self.rows[epoch]
        if not isinstance(row, torch.Tensor):
            row = torch.cat([p.detach().reshape(-1).float() for p in row])
            if not row.isfinite().all():
                raise InputError(f"{self.path} holds parameters that are not finite in epoch {epoch}; leave it out.")
            return row
        row = row.clone()
        if self.checksums is not None and checksum(row) != self.checksums[epoch]:
            raise InputError(
                f"{self.path} is damaged: the parameters of epoch {epoch} do not match their checksum; remove the file "
                "and run buffer_ATT.py again to remake this expert."
            )
        return row

    def in_memory(self, epochs: int) -> "Expert":
        """Read as far as `epochs`."""
        return replace(self, rows=[self.snapshot(epoch) for epoch in range(epochs + 1)])


def load_expert(path: Path) -> Expert:
    """An expert file of this project. Raises InputError where it is anything else."""
    content = load_any(path, mmap=True)
    if isinstance(content, list):
        raise InputError(f"{path} is of published code: distil with what lies there, or choose another --buffer_path.")
    return _expert(content, path)


def _expert(content, path: Path) -> Expert:
    content = checked(content, path, "expert")
    return Expert(path, list(content["trajectory"]), content["checksums"].tolist(), content["settings"], content.get("cost"))


def has_experts_for(folder: Path, identity: dict) -> bool:
    """Whether there are experts in a folder, and the first was made for this data, as far as it says."""
    if not (files := expert_files(folder)):
        return False
    first = next(iter(files.values()))
    try:
        content = load_any(first, mmap=True)
        if not isinstance(content, list):
            require_same(first, _expert(content, first).settings, identity)
        return True
    except InputError:
        return False


def load_experts(
    folder: Path, max_files: int | None = None, max_experts: int | None = None, command: str = "python buffer_ATT.py"
) -> list[Expert]:
    """The experts of a folder in order of their files, at most `max_files` of them.

    A file of the published code holds a list of experts, each a list of epochs, each a list of parameter tensors; of
    one such file at most `max_experts` are taken. Raises InputError for a file that is neither, and where there is none;
    `command` would make them.
    """
    experts = []
    for path in expert_files(folder).values():
        content = load_any(path, mmap=True)
        if isinstance(content, list):
            _check_published(content, path)
            experts += [Expert(path, epochs, None, None) for epochs in content[:max_experts]]
        else:
            experts.append(_expert(content, path))
    if not experts:
        others = sorted({str(path.parent) for path in folder.parent.parent.glob("*/*/replay_buffer_*.pt")})
        there = f" ({', '.join(others[:3])} {'has' if len(others) == 1 else 'have'} some, for other data or settings)"
        raise InputError(f"There are no experts in {folder}{there if others else ''}; make them with: {command}")
    return experts[:max_files]


def check_experts(experts: list[Expert], made_for: dict, last_epoch: int) -> list[str]:
    """Raises InputError where an expert was trained for other settings than `made_for`, or does not reach `last_epoch`.
    Returns what could not be checked, as `experts_on_trust`."""
    for expert in experts:
        if expert.epochs < last_epoch:
            raise InputError(
                f"{expert.path} holds {expert.epochs} epochs, and {last_epoch} are needed (--max_start_epoch - 1 + "
                "--expert_epochs); lower one of the two or train experts for longer."
            )
        made = made_for if expert.settings is None else expert.settings  # a published file does not say
        require_same(expert.path, made | {"parameters": expert.size}, made_for)
    return experts_on_trust(experts, made_for["dataset"])


def experts_on_trust(experts: list[Expert], dataset: str) -> list[str]:
    """One sentence on all experts that do not say on which images they were trained; none where each does. Published ones
    say nothing, but the folders of CIFAR tell whether they are whitened."""
    if not (unsaid := [expert for expert in experts if "images" not in (expert.settings or {})]):
        return []
    published = any(expert.settings is None for expert in unsaid) and not dataset.startswith("CIFAR")
    zca = ", nor whether with --zca" if published else ""
    which = f"{len(unsaid)} of {len(experts)} experts in {unsaid[0].path.parent}"
    return [f"{which} do not say on which images they were trained{zca}; this is taken on trust."]


def fingerprint(experts: list[Expert]) -> str:
    """Tells one list of experts from another: by their files' names and checksums."""
    return content_hash(repr([(e.path.name, e.epochs, e.checksums) for e in experts]).encode())


def _check_published(content: list, path: Path):
    """Raises InputError unless it is a list of experts, each of epochs, each of parameters of the same shapes."""
    epochs = [epoch for expert in content if isinstance(expert, list) for epoch in expert]
    sound = (
        all(isinstance(expert, list) and expert for expert in content)
        and all(isinstance(epoch, list) and epoch for epoch in epochs)
        and all(isinstance(p, torch.Tensor) and is_dense(p) and p.is_floating_point() for e in epochs for p in e)
        and len({tuple(p.shape for p in epoch) for epoch in epochs}) == 1
    )
    if not sound:
        raise InputError(
            f"{path} is damaged: it holds no list of experts with parameters of the same shapes after every epoch."
        )
