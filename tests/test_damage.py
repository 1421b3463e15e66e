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
    (EXPERT, distilling()),
    ("run/checkpoint.pt", distilling("--resume=run")),
    ("run/synthetic_best.pt", judging("run")),
    ("run/images_best.pt", judging("run/images_best.pt")),
    ("run/labels_best.pt", judging("run/images_best.pt")),
    ("run/lr_best.pt", judging("run/images_best.pt")),
]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name, reader", READERS, ids=lambda v: v if isinstance(v, str) else v[0].__name__)
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


def change(path, *keys, to=None, drop=False):
    """Sets or drops a value of a stored dict."""
    content = torch.load(path, weights_only=True)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if drop:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to(inner[keys[-1]]) if callable(to) else to
    torch.save(content, path)


NAN = float("nan")
spoil = lambda tensor: tensor.index_fill(0, torch.tensor([0]), NAN)  # noqa: E731
sparse = lambda tensor: tensor.to_sparse()  # noqa: E731
WRONG = [  # the kind of file, keys, what they are changed to (...: dropped), what the sentence says
    ("checkpoint", ["format"], "att-expert", "holds att-expert, where a file of format att-checkpoint is needed"),
    ("checkpoint", ["version"], 2, "has format version 2, and this program reads version 1"),
    *(("checkpoint", [part], ..., "damaged") for part in ("state", "tracker", "settings", "identity")),
    ("checkpoint", ["experts"], ..., "began with other experts"),
    ("checkpoint", ["state"], [], "damaged: it lacks a part of a checkpoint"),
    ("checkpoint", ["settings", "seed"], ..., "damaged: it lacks a part of a checkpoint"),
    ("checkpoint", ["settings", "seed"], 5, "was made with seed 5, and this command says 1"),
    ("checkpoint", ["tracker", "metrics_bytes"], "many", "damaged: it lacks a part of a checkpoint"),
    ("checkpoint", ["tracker"], {}, "damaged: it lacks a part of a checkpoint"),
    ("checkpoint", ["tracker", "metrics_bytes"], 10**9, "metrics.jsonl lacks lines that the checkpoint"),
    *(("checkpoint", ["state", part], ..., "damaged") for part in ("images", "momentum", "iteration", "best")),
    ("checkpoint", ["state", "more"], 1, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "images"], spoil, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "ema"], torch.Tensor.double, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "momentum"], lambda t: t[1:], "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "images"], lambda t: t[..., :4], "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "images"], sparse, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "iteration"], -1, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "iteration"], 1.5, "damaged: it lacks a part of a checkpoint"),
    ("checkpoint", ["state", "syn_lr"], 0.0, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "syn_lr"], NAN, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "best"], {}, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "last", "raw/ConvNetW32"], 0.5, "damaged: it holds no state of this run"),
    ("checkpoint", ["state", "best", "raw/ConvNetW32", "accs"], [], "damaged: it holds no state of this run"),
    ("synthetic", ["images"], spoil, "holds no synthetic set: it needs finite images"),
    ("synthetic", ["images"], torch.Tensor.long, "holds no synthetic set"),
    ("synthetic", ["images"], sparse, "holds no synthetic set"),
    ("synthetic", ["images"], lambda t: t[0], "holds no synthetic set"),
    ("synthetic", ["images"], ..., "holds no synthetic set"),
    ("synthetic", ["images"], lambda t: t[..., :4], "holds images of 1x8x4, and this command needs 1x8x8"),
    ("synthetic", ["labels"], lambda t: t[1:], "holds no synthetic set: .* a whole number as the label of each"),
    ("synthetic", ["labels"], torch.Tensor.float, "holds no synthetic set: .* a whole number as the label of each"),
    ("synthetic", ["labels"], torch.Tensor.tolist, "holds no synthetic set"),
    ("synthetic", ["labels"], lambda t: t + 1, "has labels that Digits with its 10 classes has not"),
    ("synthetic", ["labels"], lambda t: t - 1, "has labels that Digits with its 10 classes has not"),
    ("synthetic", ["syn_lr"], NAN, "holds no learning rate, which would be one number above 0"),
    ("synthetic", ["syn_lr"], -0.1, "holds no learning rate"),
    ("synthetic", ["syn_lr"], "fast", "holds no learning rate"),
    ("synthetic", ["identity"], ..., "does not say what data it was made for"),
    ("expert", ["trajectory"], ..., "damaged: it holds no complete trajectory"),
    ("expert", ["trajectory"], torch.Tensor.half, "damaged: it holds no complete trajectory"),
    ("expert", ["trajectory"], lambda t: t[:, :-1].clone(), "was made with parameters 19337, and this command says 19338"),
    ("expert", ["trajectory"], lambda t: t[:-1], "damaged: it holds no complete trajectory"),
    ("expert", ["checksums"], torch.tensor(3), "damaged: it holds no complete trajectory"),
    ("expert", ["settings"], None, "damaged: it holds no complete trajectory"),
]  # fmt: skip
KINDS = {
    "checkpoint": ("run/checkpoint.pt", distilling("--resume=run")),
    "synthetic": ("run/synthetic_best.pt", judging("run")),
    "expert": (EXPERT, distilling()),
}


@pytest.mark.parametrize("kind, keys, to, says", WRONG)
def test_a_sound_file_with_wrong_content_is_refused_by_name(place, capsys, kind, keys, to, says):
    name, reader = KINDS[kind]
    change(place / name, *keys, to=to, drop=to is ...)
    err = refused(*reader, place, capsys)
    assert re.search(says, err), err
    assert any(part in err for part in (name, "run/metrics.jsonl", "run began with")), err


def test_an_expert_with_fewer_epochs_than_it_says_does_not_count_as_finished(place, capsys):
    content = torch.load(place / EXPERT, weights_only=True)
    content |= {name: content[name][:3].clone() for name in ("trajectory", "checksums")}
    torch.save(content, place / EXPERT)
    assert "was made with train_epochs 2, and this command says 3" in refused(*TRAINING, place, capsys)


def epochs(shapes=((3, 2), (4,)), count=4):
    return [[torch.zeros(shape) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize(
    "content",
    [
        [],
        [[]],
        [epochs(), []],
        [epochs(), "expert"],
        [epochs(count=3) + epochs([(3, 2), (5,)], 1)],
        [epochs(count=3) + epochs([(10,)], 1)],
        [epochs(), epochs([(4,), (3, 2)])],
        [epochs(count=3) + [[]]],
        [epochs(count=3) + [[1.0, 2.0]]],
        [epochs(count=3) + [[torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4)]]],
        [epochs(count=3) + [[torch.zeros(3, 2).to_sparse(), torch.zeros(4)]]],
    ],
)
def test_a_published_file_must_hold_the_same_shapes_after_every_epoch(place, capsys, content):
    torch.save(content, place / EXPERT)
    err = refused(*distilling(), place, capsys)
    assert f"{EXPERT} is damaged: it holds no list of experts with parameters of the same shapes after every epoch" in err


@pytest.mark.parametrize("how", [None, *DAMAGES])
def test_a_damaged_published_file_is_refused_by_name(place, capsys, how):
    rows = storage.load_expert(place / EXPERT).rows
    torch.save([[[row[:9000].clone(), row[9000:].clone()] for row in rows]], place / EXPERT)
    script, flags = distilling("--Iteration=0", "--max_files=1")
    if how is None:
        script.main(flags)
    else:
        DAMAGES[how](place / EXPERT)
        assert EXPERT in refused(script, flags, place, capsys)
    assert not list(place.rglob("owned"))


def test_a_published_file_for_another_network_and_one_that_is_not_finite_are_refused(place, capsys):
    torch.save([epochs()], place / EXPERT)
    assert f"{EXPERT} was made with parameters 10, and this command says 19338" in refused(*distilling(), place, capsys)
    torch.save([epochs(count=1) + [[torch.full((3, 2), NAN), torch.zeros(4)]]], place / EXPERT)
    expert, *_ = storage.load_experts((place / EXPERT).parent)
    assert expert.snapshot(0).tolist() == [0] * 10
    with pytest.raises(storage.InputError, match="replay_buffer_0.pt holds parameters that are not finite in epoch 1"):
        expert.snapshot(1)


# --- metrics.jsonl, which resuming goes on with and the curves are drawn from


def replace_line(path, number, line: bytes):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line.ljust(len(lines[number - 1]))  # of the same length, so that only the content is wrong
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    "line", [b"{", b"", b"\xff\x00", b"[1]", b"3", b'{"grand_loss": 1}', b'{"iteration": 1, "eval": 3}']
)
def test_a_damaged_line_of_metrics_is_named_on_resuming(place, capsys, line):
    replace_line(place / "run" / "metrics.jsonl", 2, line)
    assert "run/metrics.jsonl line 2 is damaged; restore the file." in refused(*distilling("--resume=run"), place, capsys)


@pytest.mark.parametrize("how", ["gone", "shorter", "folder"])
def test_metrics_that_lack_lines_are_named_on_resuming(place, capsys, how):
    path = place / "run" / "metrics.jsonl"
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "shorter":
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


CONTENTS = {  # of a cache: sound files that are wrong
    "other shape": lambda content: {k: v[:-1] if isinstance(v, torch.Tensor) else v for k, v in content.items()},
    "other type": lambda content: {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in content.items()},
    "nothing": lambda content: {k: v for k, v in content.items() if not isinstance(v, torch.Tensor)},
    "no tensors": lambda content: {k: "x" if isinstance(v, torch.Tensor) else v for k, v in content.items()},
    "not finite": lambda content: {k: v / 0 if isinstance(v, torch.Tensor) else v for k, v in content.items()},
    "other format": lambda content: content | {"format": "att-expert"},
    "other version": lambda content: content | {"version": 0},
}


@pytest.mark.parametrize("how", [*DAMAGES, *CONTENTS])
@pytest.mark.parametrize("kind", ["decoded", "zca"])
def test_a_damaged_cache_is_made_again_and_never_executed(tmp_path, kind, how):
    root = image_folder(tmp_path / "pets", sizes=((16, 16),), test=1) if kind == "decoded" else tmp_path / "digits"
    sound = cached_data(root, kind)
    files = sorted((root / "cache").glob(f"{kind}-*.pt"))
    assert len(files) == (2 if kind == "decoded" else 1)
    kept = {path: path.read_bytes() for path in files}
    for path in files:
        if how in DAMAGES:
            DAMAGES[how](path)
        else:
            torch.save(CONTENTS[how](torch.load(path, weights_only=True)), path)
    same_data(cached_data(root, kind), sound)
    assert not list(tmp_path.rglob("owned"))
    if how != "folder":  # in whose place nothing can be put
        same = {path: torch.load(path, weights_only=True) for path in files}
        for path in files:
            path.write_bytes(kept[path])
            again = torch.load(path, weights_only=True)
            assert all(torch.equal(same[path][k], v) for k, v in again.items() if isinstance(v, torch.Tensor))


# --- made for something else


OTHERWISE = {  # a setting -> another value of it
    "dataset": "MNIST",
    "classes": "00000000",
    "resolution": 16,
    "zca": True,
    "normalisation": [[0.5], [0.25]],
    "model": "ConvNetW64",
}
FLAGS = {"resolution": "res"}  # where the settings of a run have another name for it


@pytest.mark.parametrize(
    "kind, setting",
    # a synthetic set may be judged with any network
    [(kind, setting) for kind in KINDS for setting in OTHERWISE if (kind, setting) != ("synthetic", "model")],
)
def test_a_file_made_for_something_else_is_refused_by_the_setting(place, capsys, kind, setting):
    name, reader = KINDS[kind]
    path, value = place / name, OTHERWISE[setting]
    stored = torch.load(path, weights_only=True)
    own = {"expert": "settings", "checkpoint": "identity", "synthetic": "identity"}[kind]
    if kind == "checkpoint" and setting in ("dataset", "zca", "model", "resolution"):
        own, setting = "settings", FLAGS.get(setting, setting)
    before = stored[own][setting]
    change(path, own, setting, to=value)
    err = refused(*reader, place, capsys)
    assert f"{name} was made with {setting} {value}, and this command says {before}" in err


def test_experts_made_with_another_normalisation_are_refused_when_more_are_trained(place, capsys):
    change(place / EXPERT, "settings", "normalisation", to=OTHERWISE["normalisation"])
    assert f"{EXPERT} was made with normalisation [[0.5], [0.25]], and" in refused(*TRAINING, place, capsys)


def test_experts_for_other_data_are_refused_from_end_to_end(tmp_path, capsys):
    root = image_folder(tmp_path / "pets")
    common = ["--dataset=Folder", "--model=ConvNetW32", "--res=16", f"--data_path={root}", f"--buffer_path={tmp_path}"]
    buffer_ATT.main([*common, "--num_experts=1", "--train_epochs=3"])
    flags = [*common, *FAST, "--zca", f"--save_dir={tmp_path / 'out'}"]
    pytest.importorskip("kornia")
    capsys.readouterr()
    err = refused(distill_ATT, flags, tmp_path, capsys, but=root / "cache")
    assert "replay_buffer_0.pt was made with zca False, and this command says True" in err
