import functools
import os
import sys
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from performance import tf32  # noqa: E402


def devices():
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    return ["cpu", pytest.param("cuda", marks=cuda)]


@pytest.fixture(params=devices())
def device(request):
    with tf32(False):  # bounds are for float32 arithmetic
        yield torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Nobody pulls the plug here, and the digits do not change."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        monkeypatch.setattr(sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits))
        yield


def draw_blanks(monkeypatch):
    """Pictures of one pixel, where nobody looks at them: drawing takes longer than small runs do."""
    import pictures
    import storage

    def draw(path, *content):
        with storage.atomic_path(path) as temporary:
            Image.new("L", (1, 1)).save(temporary, "png")

    for name in ("curves", "grid", "strip", "pool"):
        monkeypatch.setattr(pictures, name, draw)


@pytest.fixture
def blank_pictures(monkeypatch):
    draw_blanks(monkeypatch)


@pytest.fixture(scope="session")
def buffers(tmp_path_factory):
    """Two experts of three epochs on digits."""
    from small_runs import make_experts

    folder = tmp_path_factory.mktemp("buffers")
    make_experts(folder)
    return folder
