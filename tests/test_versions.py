"""Files of format version 1 are still read, and go on as if they had been written today; later ones are refused."""

import shutil

import pytest
import torch

import distill_ATT
import storage
from damage import refused
from small_runs import DIGITS, distil, make_experts, same_run, stopped

FLAGS = ["--num_eval=1", "--baseline_draws=0", "--run_name=r"]


def as_version_1(path):
    """Writes a file as version 1 did: "fp32" was what PyTorch does by itself, an expert did not say whether its steps were
    compiled, and a checkpoint had the evaluations in its state."""
    content = torch.load(path, weights_only=True) | {"version": 1}
    kind = content["format"].removeprefix("att-")
    settings = dict(content["config" if kind == "synthetic" else "settings"])
    assert settings["precision"] == "auto"
    settings["precision"] = "fp32"
    settings.pop("compile" if kind == "expert" else "student_precision")
    content["config" if kind == "synthetic" else "settings"] = settings
    if kind == "checkpoint":
        content["state"] |= content.pop("results")
    torch.save(content, path)


@pytest.fixture(scope="module")
def whole(buffers, tmp_path_factory):
    return distil(buffers, tmp_path_factory.mktemp("whole"), *FLAGS)


@pytest.fixture
def old(buffers, tmp_path):
    """Experts in b/ and a run that was stopped in its middle, with files of version 1."""
    shutil.copytree(buffers, tmp_path / "b")
    folder = stopped(4, tmp_path / "b", tmp_path, *FLAGS)
    for path in (*tmp_path.rglob("replay_buffer_*.pt"), folder / "checkpoint.pt", folder / "synthetic_best.pt"):
        as_version_1(path)
    return tmp_path


def test_a_run_of_version_1_goes_on_to_the_same_bits(whole, old):
    same_run(whole, distil(old / "b", old, "--resume=auto", *FLAGS))


def test_experts_are_added_to_those_of_version_1(old, capsys):
    make_experts(old / "b", "--num_experts=3")
    assert "2 of 3 experts are already in" in capsys.readouterr().out
    before, added = (storage.load_expert(old / "b" / "Digits" / "ConvNetW32" / f"replay_buffer_{k}.pt") for k in (1, 2))
    assert added.settings == before.settings | {"compile": "off"}


def test_a_set_of_version_1_is_judged(old, capsys):
    distill_ATT.main([*DIGITS, "--eval_only", f"--load_syn={old / 'Digits' / 'r'}", "--num_eval=1", "--epoch_eval_train=1",
                      "--baseline_draws=0", "--seed=0", f"--save_dir={old}"])  # fmt: skip
    assert "ConvNetW32    synthetic" in capsys.readouterr().out


def test_a_later_version_is_refused_by_its_number(old, capsys):
    path = old / "Digits" / "r" / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    err = refused(distill_ATT, [*DIGITS, f"--buffer_path={old / 'b'}", f"--resume={path.parent}"], old, capsys)
    assert "checkpoint.pt has format version 99, and this program reads versions 1 and 2" in err
