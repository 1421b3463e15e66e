"""Ways to damage a file, and what a script says on refusing it."""

import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import console


class Payload:
    """Unpickled, it would make a file called `owned`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def flip(path: Path, record: str):
    """Flips a bit in the middle of a record of a torch file."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(record))
    content = bytearray(path.read_bytes())
    header = content[info.header_offset : info.header_offset + 30]
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content[info.header_offset + 30 + names + info.file_size // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path, share: float):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def folder(path: Path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: cut(path, 0.5),
    "without its end": lambda path: cut(path, 0.99),
    "flipped bit in its structure": lambda path: flip(path, "data.pkl"),
    "flipped bit in a tensor": lambda path: flip(path, "data/0"),
    "text": lambda path: path.write_text("not a torch file at all"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000)),
    "other zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "pickle that runs code": lambda path: path.write_bytes(pickle.dumps(Payload(path.parent / "owned"))),
    "torch file that runs code": lambda path: torch.save({"format": Payload(path.parent / "owned")}, path),
    "folder": folder,
}


def listing(below: Path, but: Path | None = None) -> dict:
    """Every path with the content of files; what is at or below `but` aside."""
    found = (path for path in sorted(below.rglob("*")) if but not in (path, *path.parents))
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def refused(script, flags, below: Path, capsys, but: Path | None = None) -> str:
    """Runs a script that must refuse with one sentence and exit code 2, and leave what lies `below` as it was. Returns
    the sentence."""
    before = listing(below, but)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        console.run(lambda: script.main(flags))
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1
    assert listing(below, but) == before
    return err
