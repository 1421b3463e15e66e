"""A finished set is small, and with the transform.pt of its run enough to be used, anywhere and without this project."""

import re
import runpy
import shutil
import sys

import pytest
import torch

import buffer_ATT
import distill_ATT
import judging
import sets
import storage
import utils
from conftest import ROOT
from damage import refused
from small_data import image_folder, unpacked
from small_runs import DIGITS, distil, make_experts

pytest.importorskip("kornia")
FAST = ["--Iteration=1", "--eval_it=2", "--num_eval=1", "--baseline_draws=0", "--run_name=r"]
JUDGE = [*DIGITS, "--eval_only", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0", "--seed=0"]


@pytest.fixture(scope="module")
def finished(buffers, tmp_path_factory):
    """zca/, plain/ and texture/: runs on digits, whitened, not, and of two canvases per class."""
    root = tmp_path_factory.mktemp("sets")
    data = f"--data_path={root}"
    make_experts(root, "--zca", "--num_experts=1", data)
    distil(root, root / "out", "--zca", data, *FAST).rename(root / "zca")
    distil(buffers, root / "out", *FAST).rename(root / "plain")
    distil(buffers, root / "out", *FAST, "--texture", "--lr_img=1").rename(root / "texture")
    return root


@pytest.fixture
def place(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_experts_whitened_and_plain_lie_apart(finished):
    assert (finished / "Digits_ZCA" / "ConvNetW32" / "replay_buffer_0.pt").exists()


@pytest.mark.parametrize("kind", ["zca", "plain"])
def test_a_set_says_how_it_is_used_and_transform_says_the_rest(finished, kind):
    content = storage.load(finished / kind / "synthetic_best.pt", "synthetic")
    kept = sets.load_transform(finished / kind)
    assert content["transform"]["fingerprint"] == kept["fingerprint"] and content["identity"] == kept["identity"]
    large = {"mean", "matrix", "inverse"} if kind == "zca" else set()
    assert kept.keys() - content["transform"].keys() - {"format", "version", "made_with", "identity"} == large
    transform = utils.stored_transform(kept)
    assert torch.equal(content["pixels"], transform.undo(content["images"])) and "images = (pixels" in kept["formula"]
    assert content["network"] == {"name": "ConvNetW32", "channels": 1, "classes": 10, "resolution": 8}
    recipe = {"epochs": 5, "batch": 256, "momentum": 0.9, "weight_decay": 5e-4, "drop_after": 4, "lr": content["syn_lr"]}
    assert recipe.items() <= content["evaluation"].items() and content["evaluation"]["augmentation"][0] == "color"
    assert content["resize"].startswith("bilinear") and content["canvas"] is None


def test_a_set_of_canvases_says_so(buffers, tmp_path):
    folder = distil(buffers, tmp_path, *FAST, "--texture", "--canvas_size=3", "--dsa=False")
    content = storage.load(folder / "synthetic_best.pt", "synthetic")
    assert content["canvas"] == {"size": 3, "samples": 1} and content["evaluation"]["augmentation"] == []
    assert content["images"].shape == content["pixels"].shape == (10, 1, 24, 24)
    distill_ATT.main([*JUDGE, f"--load_syn={folder}", "--canvas_samples=2", f"--save_dir={tmp_path}", "--run_name=j"])
    assert storage.load_json(tmp_path / "Digits" / "j" / "results.json")["config"]["canvas_samples"] == 2


def judged_through(monkeypatch, place, *flags):
    """The transform through which the test images are seen."""
    seen, make = [], judging.make_judge
    monkeypatch.setattr(judging, "make_judge", lambda args, data, *rest: seen.append(data) or make(args, data, *rest))
    distill_ATT.main([*JUDGE, f"--save_dir={place}", *flags])
    return seen[0].transform


@pytest.mark.parametrize("name", ["", "images_best.pt"])
def test_a_whitened_set_is_judged_through_the_transform_beside_it(place, monkeypatch, capsys, name):
    fits = []
    monkeypatch.setattr(utils, "fit_whitening", lambda *args: fits.append(args))
    flags = ["--zca", f"--data_path={place / 'new'}", f"--load_syn={place / 'zca' / name}"]
    found = judged_through(monkeypatch, place, *flags)
    assert not fits and torch.equal(found.matrix, sets.load_transform(place / "zca")["matrix"])
    assert "taken on trust" not in capsys.readouterr().out


def test_without_it_the_whitening_is_fitted_anew_and_another_one_is_told(place, monkeypatch, capsys):
    flags = ["--zca", f"--data_path={place}", f"--load_syn={place / 'zca'}"]
    kept = sets.load_transform(place / "zca")
    (place / "zca" / "transform.pt").unlink()
    found = judged_through(monkeypatch, place, *flags)
    assert found.fingerprint == kept["fingerprint"] and "whitening than" not in capsys.readouterr().out
    fitted = utils.Whitening(found.mean, found.matrix * 1.0001, found.inverse)
    monkeypatch.setattr(utils, "fit_whitening", lambda *args: fitted)
    assert judged_through(monkeypatch, place, *flags) is fitted
    said = capsys.readouterr().out
    assert said.count("synthetic_best.pt was made with another ZCA whitening than the one fitted here") == 1
    # a transform.pt of another run is not taken for its own
    shutil.copy(place / "plain" / "transform.pt", place / "zca")
    assert judged_through(monkeypatch, place, *flags) is fitted


def test_a_set_is_used_with_another_copy_of_its_data_where_the_command_names_that(place, capsys):
    for file in (place / "zca" / name for name in ("synthetic_best.pt", "transform.pt")):
        content = torch.load(file, weights_only=True)
        torch.save(content | {"identity": content["identity"] | {"dataset": "Folder", "images": "0" * 16}}, file)
    flags = [*JUDGE, "--zca", f"--data_path={place}", f"--load_syn={place / 'zca'}"]
    distill_ATT.main([*flags, f"--save_dir={place}", "--run_name=e"])
    said = capsys.readouterr().out
    assert said.count("was made from images of --dataset Folder, and is used with those of Digits.") == 1
    assert storage.load_json(place / "Digits" / "e" / "results.json")["evaluations"][0]["accs"]
    # other classes are others on any data
    path = place / "zca" / "synthetic_best.pt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"identity": content["identity"] | {"classes": "0" * 8}}, path)
    assert "was made for other classes" in refused(distill_ATT, flags, place, capsys)


def test_a_set_of_version_2_brings_its_whitening(place, monkeypatch):
    path, kept = place / "zca" / "synthetic_best.pt", sets.load_transform(place / "zca")
    old = {name: kept[name] for name in ("kind", "mean", "matrix", "inverse")}
    old["matrix"] = old["matrix"] * 2
    torch.save(torch.load(path, weights_only=True) | {"version": 2, "transform": old}, path)
    found = judged_through(monkeypatch, place, "--zca", f"--data_path={place}", f"--load_syn={place / 'zca'}")
    assert torch.equal(found.matrix, old["matrix"])


def test_a_run_goes_on_in_the_input_space_of_its_images(place, monkeypatch):
    kept = sets.load_transform(place / "zca")
    monkeypatch.setattr(utils, "fit_whitening", lambda *args: pytest.fail("fitted anew"))
    (place / "out" / "Digits").mkdir(parents=True, exist_ok=True)
    (place / "zca").rename(place / "out" / "Digits" / "r")
    folder = distil(place, place / "out", "--zca", f"--data_path={place}", *FAST, "--Iteration=2", "--resume=auto")
    assert torch.equal(sets.load_transform(folder)["matrix"], kept["matrix"])


# --- used alone


def used_alone(monkeypatch, capsys, path, data, seed: int) -> float:
    """The accuracy that use_set.py prints."""
    monkeypatch.setattr(sys, "argv", ["use_set.py", str(path), str(data)])
    torch.manual_seed(seed)
    capsys.readouterr()
    runpy.run_path(str(ROOT / "use_set.py"))
    return float(re.fullmatch(r"test accuracy (\d+\.\d)%\n", capsys.readouterr().out)[1]) / 100


def test_the_readmes_snippet_is_the_heart_of_use_set():
    snippet, *_ = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    heart = (ROOT / "use_set.py").read_text().partition("# --- as in README.md\n")[2]
    assert snippet == heart and len(heart.splitlines()) > 20


@pytest.mark.parametrize("kind", ["plain", "zca", "texture", "zca without transform.pt"])
def test_a_set_used_alone_scores_as_by_eval_only(place, monkeypatch, capsys, kind):
    path, epochs, lr = place / kind.split()[0] / "synthetic_best.pt", 60, 0.03
    if "without" in kind:
        path = path.rename(place / "digits_ipc1.pt")
    content = torch.load(path, weights_only=True)
    if kind == "texture":  # from random crops of so small images little is learnt: let each be the first tile, a digit
        monkeypatch.setattr(utils.Crops, "__call__", lambda crops, x: x[..., : crops.side, : crops.side])
    content["evaluation"] |= {"epochs": epochs + 1, "drop_after": epochs // 2 + 2, "lr": lr}
    torch.save(content | {"syn_lr": lr}, path)
    flags = ["--num_eval=5", f"--epoch_eval_train={epochs}", f"--save_dir={place}", "--run_name=e", f"--data_path={place}"]
    distill_ATT.main([*JUDGE, f"--load_syn={path}", *flags])
    inside = torch.tensor(storage.load_json(place / "Digits" / "e" / "results.json")["evaluations"][0]["accs"])
    alone = torch.tensor([used_alone(monkeypatch, capsys, path, place, seed) for seed in range(5)])
    noise = (inside.var() / 5 + alone.var() / 5).sqrt()
    assert inside.mean() > 0.3 and (inside.mean() - alone.mean()).abs() < 3 * noise + 0.01, (inside, alone)


# --- the sets that lie in distilled/


@pytest.mark.parametrize("name", ["digits_ipc1", pytest.param("cifar10_ipc1", marks=pytest.mark.long)])
def test_a_shipped_set_repeats_the_accuracy_in_its_file(tmp_path, name):
    path = ROOT / "distilled" / f"{name}.pt"
    data = unpacked("cifar10-jpeg.tar.xz", "cifar10", tmp_path) if name == "cifar10_ipc1" else tmp_path
    flags = [f"--data_path={data}", f"--save_dir={tmp_path}", "--wandb=disabled", "--baseline_draws=0", "--run_name=e"]
    distill_ATT.main(["--eval_only", f"--load_syn={path}", "--seed=0", *flags])
    (results,) = tmp_path.glob("*/e/results.json")
    found = storage.load_json(results)["evaluations"][0]["mean"]
    assert found == pytest.approx(storage.load(path, "synthetic")["accuracy"]["mean"], abs=0.01)  # rounding differs


def test_shipped_sets_are_small():
    sizes = [path.stat().st_size for path in (ROOT / "distilled").iterdir()]
    assert sizes and max(sizes) < 1_000_000


# --- experts


def test_swapped_images_are_refused_by_name(tmp_path, capsys):
    root = image_folder(tmp_path / "pets")
    common = ["--dataset=Folder", "--res=8", "--model=ConvNetW32", f"--data_path={root}", "--device=cpu"]
    buffer_ATT.main([*common, "--num_experts=1", "--train_epochs=3", f"--buffer_path={tmp_path / 'b'}"])
    run = [*common, "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=2", "--Iteration=0", "--num_eval=1", "--seed=0",
           "--epoch_eval_train=1", "--baseline_draws=0", "--wandb=disabled", f"--save_dir={tmp_path}"]  # fmt: skip
    distill_ATT.main([*run, f"--buffer_path={tmp_path / 'b'}", "--run_name=r"])
    cat, dog = (root / "train" / name / "0.png" for name in ("cat", "dog"))
    content = cat.read_bytes()
    cat.write_bytes(dog.read_bytes())
    dog.write_bytes(content)
    but = root / "cache"
    judge = [*common, "--eval_only", f"--load_syn={tmp_path / 'Folder' / 'r'}", "--num_eval=1"]
    says = "was made from other training images than --data_path holds now"
    assert f"synthetic_best.pt {says}" in refused(distill_ATT, judge, tmp_path, capsys, but)
    resume = [f"--resume={tmp_path / 'Folder' / 'r'}"]
    assert "checkpoint.pt was made from other training images" in refused(distill_ATT, resume, tmp_path, capsys, but)
    # the experts of these images would lie elsewhere, and the command that makes them is complete
    missing = [*run, f"--buffer_path={tmp_path / 'my b'}", "--max_start_epoch=60", "--expert_epochs=4"]
    err = refused(distill_ATT, missing, tmp_path, capsys, but)
    command = f"python buffer_ATT.py --dataset=Folder --res=8 --model=ConvNetW32 --data_path={root}"
    assert err.endswith(f"; make them with: {command} '--buffer_path={tmp_path}/my b' --train_epochs=63 --num_experts=100\n")
