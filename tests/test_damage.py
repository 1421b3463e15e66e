"""Damaged, foreign and hostile files in place of every file the scripts read: each is refused by name, and nothing in it
is executed. A damaged cache is made again."""

import re
import shutil

import pytest
import torch

import buffer_ATT
import distill_ATT
import storage
from damage import DAMAGES, refused
from small_data import image_folder
from small_runs import DIGITS, FAST, distil
from utils import Request, load_dataset

pytestmark = pytest.mark.usefixtures("blank_pictures")

EXPERT = "b/Digits/ConvNetW32/replay_buffer_0.pt"


@pytest.fixture(scope="module")
def finished(buffers, tmp_path_factory):
    """Experts in b/, and a run on them in run/."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(buffers, root / "b")
    distil(root / "b", root, "--Iteration=2", "--num_eval=1", "--baseline_draws=0", "--run_name=r")
    (root / "Digits" / "r").rename(root / "run")
    return root


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distilling(*flags):
    return distill_ATT, [*DIGITS, *FAST, "--num_eval=1", "--baseline_draws=0", "--seed=1", "--buffer_path=b", *flags]


def judging(path):
    return distill_ATT, [*DIGITS, "--eval_only", f"--load_syn={path}", "--num_eval=1", "--epoch_eval_train=1"]


TRAINING = buffer_ATT, [*DIGITS, "--num_experts=2", "--train_epochs=3", "--batch_train=256", "--seed=0", "--buffer_path=b"]
READERS = [  # the file, and a command that reads it
    (EXPERT, TRAINING),
    ("run/checkpoint.pt", distilling("--resume=run")),
    ("run/synthetic_best.pt", judging("run")),
    ("run/images_best.pt", judging("run/images_best.pt")),
    ("run/labels_best.pt", judging("run/images_best.pt")),
    ("run/lr_best.pt", judging("run/images_best.pt")),
    ("run/transform.pt", judging("run")),
]
TELLING = ["flipped bit in its structure", "torch file that runs code"]  # all are read by one function
CASES = [(EXPERT, distilling(), how) for how in DAMAGES] + [(*case, how) for case in READERS for how in TELLING]


@pytest.mark.parametrize("name, reader, how", CASES, ids=lambda v: v if isinstance(v, str) else v[0].__name__)
def test_a_damaged_file_is_refused_by_name_and_not_executed(place, capsys, name, reader, how):
    DAMAGES[how](place / name)
    err = refused(*reader, place, capsys)
    # of a run's folder, the sentence may name the file that is missing there
    assert (place / name).name in err, err
    assert not list(place.rglob("owned"))


def test_the_undamaged_files_are_taken(place):
    for script, flags in (TRAINING, distilling("--resume=run"), judging("run"), judging("run/images_best.pt")):
        script.main(flags)


# --- sound files with wrong content


def change(path, *keys, to):
    """Sets a value of a stored dict."""
    content = inner = torch.load(path, weights_only=True)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    torch.save(content, path)


def test_another_format_is_refused_by_name(place, capsys):
    shutil.copy(place / EXPERT, place / "run" / "checkpoint.pt")
    err = refused(*distilling("--resume=run"), place, capsys)
    assert "run/checkpoint.pt holds att-expert, where a file of format att-checkpoint is needed" in err


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("images", lambda t: t[..., :4], "images_best.pt holds images of 1x8x4, and this command needs 1x8x8"),
        ("labels", lambda t: t + 1, "images_best.pt has labels beyond the 10 classes"),
        ("labels", lambda t: t - 1, "images_best.pt has labels beyond the 10 classes"),
        ("labels", torch.Tensor.float, "labels_best.pt holds no labels: whole numbers .N,., or finite logits or probabilities"),
        ("lr", lambda t: -t, "lr_best.pt holds no learning rate"),
    ],
)
def test_a_bare_set_that_does_not_fit_is_refused_by_name(place, capsys, name, change, says):
    path = place / "run" / f"{name}_best.pt"
    storage.save_tensor(path, change(torch.load(path, weights_only=True)))
    err = refused(*judging("run/images_best.pt"), place, capsys)
    assert re.search(says, err), err


def test_an_expert_with_fewer_epochs_than_it_says_does_not_count_as_finished(place, capsys):
    content = torch.load(place / EXPERT, weights_only=True)
    content |= {name: content[name][:3].clone() for name in ("trajectory", "checksums")}
    torch.save(content, place / EXPERT)
    assert "was made with --train_epochs 2, and this command says 3" in refused(*TRAINING, place, capsys)


def test_a_published_file_is_taken(place):
    rows = storage.load_expert(place / EXPERT).rows
    torch.save([[[row[:9000].clone(), row[9000:].clone()] for row in rows]], place / EXPERT)
    script, flags = distilling("--Iteration=0", "--max_files=1")
    script.main(flags)


def test_a_published_file_for_another_network_is_refused(place, capsys):
    torch.save([[[torch.zeros(3, 2), torch.zeros(4)]] * 4], place / EXPERT)
    says = f"{EXPERT} was made for a network of 10 parameters, and this command's has 19338"
    assert says in refused(*distilling(), place, capsys)


# --- metrics.jsonl, which resuming goes on with


@pytest.mark.parametrize("how", ["gone", "shorter"])
def test_metrics_that_lack_lines_are_named_on_resuming(place, capsys, how):
    path = place / "run" / "metrics.jsonl"
    content = path.read_bytes()
    path.unlink()
    if how == "shorter":
        path.write_bytes(content[:-1])
    err = refused(*distilling("--resume=run"), place, capsys)
    assert "run/metrics.jsonl lacks lines that the checkpoint beside it knows of" in err


# --- caches: never trusted, and made again


def cached_data(root, kind):
    if kind == "zca":
        pytest.importorskip("kornia")
        return load_dataset(Request("Digits", root, zca=True))
    return load_dataset(Request("Folder", root, resolution=16))


def same_data(a, b):
    assert torch.equal(a.train.pixels, b.train.pixels) and torch.equal(a.train.labels, b.train.labels)
    assert torch.equal(a.test.pixels, b.test.pixels) and torch.equal(a.test.labels, b.test.labels)
    assert torch.equal(a.transform(a.test.pixels), b.transform(b.test.pixels))


def other_version(path):
    torch.save(torch.load(path, weights_only=True) | {"version": 0}, path)


@pytest.mark.parametrize("how", [*TELLING, "folder", "other version"])
@pytest.mark.parametrize("kind", ["decoded", "zca"])
def test_a_damaged_cache_is_made_again_and_never_executed(tmp_path, kind, how):
    root = image_folder(tmp_path / "pets", sizes=((16, 16),), test=1) if kind == "decoded" else tmp_path / "digits"
    sound = cached_data(root, kind)
    files = sorted((root / "cache").glob(f"{kind}-*.pt"))
    assert len(files) == (2 if kind == "decoded" else 1)
    kept = {path: torch.load(path, weights_only=True) for path in files}
    for path in files:
        (DAMAGES | {"other version": other_version})[how](path)
    same_data(cached_data(root, kind), sound)
    assert not list(tmp_path.rglob("owned"))
    if how != "folder":  # in whose place nothing can be put
        for path in files:
            again = torch.load(path, weights_only=True)
            assert all(torch.equal(kept[path][k], v) for k, v in again.items() if isinstance(v, torch.Tensor))


# --- made for something else


OTHER = [[0.5], [0.25]]
THIS = r"of mean and std \[\[0.5\], \[0.25\]\], and those of this command have \[\[0.3.*\], \[.*\]\]"
IMAGES = "from other training images than --data_path holds now"
MADE = [  # the file, a command that reads it, where it says what it was made with, another value, what the sentence says
    *((EXPERT, distilling(), ["settings", name], value, says) for name, value, says in (
        ("dataset", "MNIST", "with --dataset MNIST, and this command says Digits"),
        ("class_count", 3, "for 3 classes, and this command has 10"),
        ("classes", "00000000", "for other classes than --data_path holds now"),
        ("resolution", 16, "with --res 16, and this command says 8"),
        ("zca", True, "with --zca, and this command is without it"),
        ("images", "0" * 16, IMAGES),
        ("normalisation", OTHER, THIS),
        ("normalisation", [[0.5] * 3, [0.25] * 3], "of mean and std"),
        ("model", "ConvNetW64", "with --model ConvNetW64, and this command says ConvNetW32"),
    )),
    (EXPERT, TRAINING, ["settings", "normalisation"], OTHER, f"{THIS}: use the same settings, or another --buffer_path"),
    (EXPERT, TRAINING, ["settings", "augmentation"], ["flip"], "with --dsa_strategy flip, and this command says color_crop"),
    ("run/checkpoint.pt", distilling("--resume=run"), ["identity", "images"], "0" * 16, f"{IMAGES}; give it the data"),
    ("run/synthetic_best.pt", judging("run"), ["identity", "images"], "0" * 16, IMAGES),
    ("run/synthetic_best.pt", judging("run"), ["identity", "normalisation"], OTHER, THIS),
    ("run/transform.pt", judging("run/images_best.pt"), ["identity", "zca"], True, "with --zca, and this"),
]  # fmt: skip


@pytest.mark.parametrize("name, reader, keys, value, says", MADE)
def test_a_file_made_for_something_else_is_refused_in_the_commands_words(place, capsys, name, reader, keys, value, says):
    change(place / name, *keys, to=value)
    err = refused(*reader, place, capsys)
    assert re.search(f"{name.replace('transform', 'images_best')} was made .*{says}", err), err


def test_means_that_another_decoder_of_images_would_measure_are_the_same(place):
    (mean,), std = torch.load(place / EXPERT, weights_only=True)["settings"]["normalisation"]
    change(place / EXPERT, "settings", "normalisation", to=[[mean + 0.0005], std])
    script, flags = distilling("--Iteration=0")
    script.main(flags)
