import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def devices():
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    return ["cpu", pytest.param("cuda", marks=cuda)]


@pytest.fixture(params=devices())
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # bounds are for float32 arithmetic
    return torch.device(request.param)


@pytest.fixture(scope="session")
def buffers(tmp_path_factory):
    """Two experts of three epochs on digits."""
    from small_runs import make_experts

    folder = tmp_path_factory.mktemp("buffers")
    make_experts(folder)
    return folder
