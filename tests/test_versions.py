"""Files of earlier format versions are still read, and go on as if they had been written today; later ones are refused.
What they do not say is told once, on screen and in config.json."""

import contextlib
import io
import shutil

import pytest
import torch

import distill_ATT
import storage
from damage import refused
from small_runs import DIGITS, distil, make_experts, same_run, stopped

pytestmark = pytest.mark.usefixtures("blank_pictures")

FLAGS = ["--num_eval=1", "--baseline_draws=0", "--run_name=r"]
EXPERTS = "b/Digits/ConvNetW32"


def as_version(version, path):
    """Writes a file as that version did. Neither said on which images it was made, and a set held its transform. In
    version 1 "fp32" was what PyTorch does by itself, an expert and a checkpoint did not say whether steps were compiled,
    and a checkpoint had the evaluations in its state."""
    content = torch.load(path, weights_only=True) | {"version": version}
    kind = content["format"].removeprefix("att-")
    settings = dict(content["config" if kind == "synthetic" else "settings"])
    for name in ("images", "class_count"):
        del (settings if kind == "expert" else content["identity"])[name]
    if kind == "synthetic":
        transform = torch.load(path.with_name("transform.pt"), weights_only=True)
        content["transform"] = {name: transform[name] for name in ("kind", "mean", "std")}
        for name in ("pixels", "network", "evaluation", "resize", "canvas"):
            del content[name]
    if kind == "checkpoint":
        content["results"] = {name: content["results"][name] for name in ("best", "last")}
        for name in ("select_on", "full_data", "log_artifact", "experts_per_iter", "mirror_experts"):
            del settings[name]
    if version == 1:
        assert settings["precision"] == "auto"
        settings["precision"] = "fp32"
        settings.pop("compile" if kind == "expert" else "student_precision")
        if kind == "checkpoint":
            del settings["compile"]
            content["state"] |= content.pop("results")
    content["config" if kind == "synthetic" else "settings"] = settings
    torch.save(content, path)


@pytest.fixture(scope="module")
def whole(buffers, tmp_path_factory):
    return distil(buffers, tmp_path_factory.mktemp("whole"), *FLAGS)


@pytest.fixture(scope="module")
def fresh(buffers, tmp_path_factory):
    """Experts in b/ and a run that was stopped in its middle."""
    root = tmp_path_factory.mktemp("fresh")
    shutil.copytree(buffers, root / "b")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        folder = stopped(4, root / "b", root, *FLAGS)
    assert "trust" not in out.getvalue() and storage.load_json(folder / "config.json")["starts"][-1]["unchecked"] == []
    return root


@pytest.fixture(params=[1, 2])
def old(request, fresh, tmp_path):
    """The same with files of an earlier version."""
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "Digits" / "r"
    for path in (*tmp_path.rglob("replay_buffer_*.pt"), folder / "checkpoint.pt", folder / "synthetic_best.pt"):
        as_version(request.param, path)
    (folder / "transform.pt").unlink()
    return tmp_path


def unsaid(root, count=2, of=2):
    which = f"{count} of {of} experts in {root / EXPERTS}"
    return f"{which} do not say on which images they were trained; this is taken on trust."


def test_a_run_goes_on_to_the_same_bits_and_tells_what_it_takes_on_trust(whole, old, capsys):
    folder = distil(old / "b", old, "--resume=auto", *FLAGS)
    same_run(whole, folder)
    settings = storage.load(folder / "checkpoint.pt", "checkpoint")["settings"]
    assert (settings["compile"], settings["experts_per_iter"], settings["mirror_experts"]) == ("off", 1, False)
    told = [unsaid(old), f"{folder / 'checkpoint.pt'} does not say from which images it was made; this is taken on trust."]
    assert [line for line in capsys.readouterr().out.splitlines() if "trust" in line] == told
    assert storage.load_json(folder / "config.json")["starts"][-1]["unchecked"] == told
    assert (folder / "transform.pt").exists()


def test_experts_are_added(old, capsys):
    make_experts(old / "b", "--num_experts=3")
    out = capsys.readouterr().out
    assert "2 of 3 experts already there" in out and out.count(unsaid(old)) == out.count("trust") == 1
    found_by = distill_ATT.parse_args(out.strip().rpartition("; distill_ATT.py finds them with ")[2].split())
    assert (found_by.dataset, found_by.model, found_by.buffer_path) == ("Digits", "ConvNetW32", old / "b")
    before, added = (storage.load_expert(old / EXPERTS / f"replay_buffer_{k}.pt") for k in (1, 2))
    new = {name: added.settings[name] for name in ("images", "class_count")}
    assert added.settings == before.settings | {"compile": "off"} | new
    folder = distil(old / "b", old, "--Iteration=0", *FLAGS[:2], "--run_name=s")
    assert storage.load_json(folder / "config.json")["starts"][-1]["unchecked"] == [unsaid(old, 2, 3)]


def test_a_set_is_judged(old, capsys):
    distill_ATT.main([*DIGITS, "--eval_only", f"--load_syn={old / 'Digits' / 'r'}", "--num_eval=1", "--epoch_eval_train=1",
                      "--baseline_draws=0", "--seed=0", f"--save_dir={old}"])  # fmt: skip
    out = capsys.readouterr().out
    assert "| ConvNetW32 | synthetic" in out and out.count("pt does not say from which images it was made; this is") == 1


@pytest.mark.parametrize("dataset, nor", [("CIFAR10", ""), ("Tiny", ", nor whether with --zca")])
def test_published_experts_are_taken_on_trust_in_one_line(tmp_path, dataset, nor):
    torch.save([[[torch.zeros(3)]] * 3] * 2, tmp_path / "replay_buffer_0.pt")
    experts = storage.load_experts(tmp_path)
    told = storage.check_experts(experts, {"dataset": dataset, "parameters": 3, "images": "0", "zca": True}, 1)
    says = f"2 of 2 experts in {tmp_path} do not say on which images they were trained{nor}; this is taken on trust."
    assert told == [says]


def test_a_later_version_is_refused_by_its_number(whole, buffers, tmp_path, capsys):
    path = shutil.copytree(whole, tmp_path / "r") / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    err = refused(distill_ATT, [*DIGITS, f"--buffer_path={buffers}", f"--resume={path.parent}"], tmp_path, capsys)
    assert "checkpoint.pt has format version 99, and this program reads versions 1 to 3" in err
