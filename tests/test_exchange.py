"""Sets and experts of the field's other tools, written here just as those write them, are used as ours are; and a set of
ours is written for other tools, and comes back as it was."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import distill_ATT
import networks
import reproduce
import sets
import storage
from damage import refused
from evaluation import Recipe, Trainer
from performance import Compute
from small_data import image_folder
from small_runs import DIGITS, distil, lines, make_experts, same_run, tensors
from storage import InputError
from utils import Canvas, Request, Views, generator, import_torchvision, load_dataset

pytestmark = pytest.mark.usefixtures("blank_pictures")

JUDGE = ["--eval_only", "--num_eval=1", "--epoch_eval_train=20", "--baseline_draws=0", "--seed=0", "--device=cpu"]


@pytest.fixture(scope="module")
def finished(buffers, tmp_path_factory):
    """plain/ and texture/: runs on digits, the second of two canvases per class."""
    root = tmp_path_factory.mktemp("exchange")
    flags = ["--Iteration=2", "--eval_it=3", "--num_eval=1", "--baseline_draws=0", "--epoch_eval_train=3"]
    distil(buffers, root, *flags, "--run_name=plain")
    distil(buffers, root, *flags, "--run_name=texture", "--texture", "--ipc=2", "--lr_teacher=0.02")
    return root / "Digits"


@pytest.fixture
def tensor_set(finished):
    """Images, labels and lr of a set."""
    content = storage.load(finished / "plain" / "synthetic_best.pt", "synthetic")
    return content["images"], content["labels"], content["syn_lr"]


def judged(path, out, *flags, capsys=None) -> list[float]:
    """The accuracies that --eval_only finds, and what it says if `capsys` is given."""
    name = f"e{len(list(out.glob('Digits/*')))}"
    distill_ATT.main([*DIGITS, *JUDGE, f"--load_syn={path}", f"--save_dir={out}", f"--run_name={name}", *flags])
    accs = [one["accs"] for one in storage.load_json(out / "Digits" / name / "results.json")["evaluations"]]
    return (accs, capsys.readouterr().out) if capsys else accs


def write(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        torch.save(value, folder / f"{name}.pt")
    return folder / "images_best.pt"


# --- sets of others


def parts_of_five(folder, images, labels, lr):
    """MTT's Tiny ImageNet at 50 images per class."""
    for n, (x, y) in enumerate(zip(images.split(2), labels.split(2))):
        write(folder, **{f"images_best_{n}": x, f"labels_best_{n}": y})
    return folder


def one_hot(labels):
    return F.one_hot(labels, 10).float()


FAMILIES = {  # name -> (writer, whether it brings its lr, what is said of its labels)
    "MTT": (lambda folder, x, y, lr: write(folder, images_best=x, labels_best=y), False, None),
    "FTD and ATT, lr a number": (lambda f, x, y, lr: write(f, images_best=x, labels_best=y, lr_best=lr), True, None),
    "TESLA": (lambda f, x, y, lr: write(f, images_best=x, labels_best=one_hot(y)), False, "probabilities, used as they are"),
    "DATM, PAD and EDF": (
        lambda f, x, y, lr: write(
            f, images_best=x.requires_grad_(), labels_best=(200 * one_hot(y) - 7).requires_grad_(),
            lr_best=torch.tensor(lr, dtype=torch.float64),
        ), True, "logits, of which the softmax is used",
    ),
    "five parts": (parts_of_five, False, None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_set_is_judged_as_the_same_set_of_ours(finished, tensor_set, tmp_path, capsys, family):
    ours = torch.load(finished / "plain" / "synthetic_best.pt", weights_only=True)
    torch.save(ours | {"iteration": None}, tmp_path / "ours.pt")  # which the others do not say, and draws depend on
    expected = judged(tmp_path / "ours.pt", tmp_path)
    writer, has_lr, said_of_labels = FAMILIES[family]
    images, labels, lr = tensor_set
    path = writer(tmp_path / "theirs", images, labels, lr)
    read = sets.load_synthetic(path)
    assert torch.equal(read.images, images) and read.syn_lr == (pytest.approx(lr) if has_lr else None)
    assert torch.equal(read.labels, one_hot(labels) if said_of_labels else labels)
    capsys.readouterr()
    found, said = judged(path, tmp_path, f"--lr_teacher={0.5 if has_lr else lr!r}", capsys=capsys)
    assert found == expected
    assert (f"{path} comes without a learning rate; --lr_teacher" in said) == (not has_lr)
    assert ("soft labels" in said) == bool(said_of_labels) and (said_of_labels or "") in said
    assert "does not say from which images it was made" in said and "Warning" not in said


def test_parts_are_joined_in_order_and_a_missing_one_is_named(tensor_set, tmp_path):
    folder = parts_of_five(tmp_path / "tiny_50", *tensor_set)
    found = sets.load_synthetic(folder)
    assert torch.equal(found.images, tensor_set[0]) and torch.equal(found.labels, tensor_set[1])
    (folder / "images_best_2.pt").unlink()
    with pytest.raises(InputError, match="tiny_50 lacks a part of its set: images_best_2.pt"):
        sets.load_synthetic(folder)


def digits(tmp_path):
    return load_dataset(Request("Digits", tmp_path))


BAD = {  # what is changed -> the sentence
    "labels_best": {
        "labels_best.pt has 9 labels, and .*images_best.pt has 10 images": torch.arange(9),
        "has soft labels of 7 classes, and the data set has 10": torch.full((10, 7), 1 / 7),
        "labels_best.pt holds no labels: whole numbers": torch.full((10, 10), float("nan")),
        "labels beyond the 10 classes": torch.arange(10) + 1,
    },
    "lr_best": {"lr_best.pt holds no learning rate": torch.zeros(3)},
    "images_best": {
        "holds images of 3x8x8, and this command needs 1x8x8": torch.randn(10, 3, 8, 8),
        "holds no synthetic set: it needs finite images": torch.zeros(10, 1, 8, 8, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("name, says, value", [(n, s, v) for n, bad in BAD.items() for s, v in bad.items()])
def test_what_does_not_fit_is_told_in_one_sentence(tensor_set, tmp_path, capsys, name, says, value):
    images, labels, lr = tensor_set
    path = write(tmp_path / "set", **{"images_best": images, "labels_best": labels, "lr_best": lr, name: value})
    err = refused(distill_ATT, [*DIGITS, *JUDGE, f"--load_syn={path}"], tmp_path, capsys)
    assert re.search(says, err), err


@pytest.mark.parametrize("scale", [1, 255])
def test_pixels_that_were_not_normalised_are_warned_of(tensor_set, tmp_path, scale):
    dataset = digits(tmp_path)
    pixels = dataset.transform.undo(dataset.sample(1, generator(0))) * scale
    path = write(tmp_path, images_best=pixels, labels_best=torch.arange(10))
    _, (_, warning) = sets.prepare(sets.load_synthetic(path), dataset)
    assert warning.startswith(f"Warning: {path} has values of mean") and "--zca" in warning
    for sound in (tensor_set[0], tensor_set[0] * 3, torch.randn(10, 1, 8, 8)):
        path = write(tmp_path, images_best=sound, labels_best=torch.arange(10))
        assert len(sets.prepare(sets.load_synthetic(path), dataset)[1]) == 1


@pytest.mark.parametrize("canvas", [None, Canvas(side=8, size=2, samples=3)])
def test_soft_labels_train_by_torchs_cross_entropy_with_probabilities(canvas):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 8 * (2 if canvas else 1), 8 * (2 if canvas else 1), generator=random)
    labels, views = torch.rand(12, 10, generator=random).softmax(1), Views((), canvas)
    trainer = Trainer("ConvNetW32", (1, 10, 8), Recipe(3, 5, 0.9, 5e-4), Compute())
    theta = trainer.fresh(0, "net")
    net = networks.build("ConvNetW32", 1, 10, 8)
    for parameter, value in zip(net.parameters(), trainer.flat.parameters(theta)):
        parameter.data.copy_(value)
    *_, trained = trainer.train(theta, images, labels, 0.05, views, generator(1))

    optimizer, draws = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4), generator(1)
    for _ in range(3):
        order = torch.randperm(12, generator=draws)
        for batch, view in zip(order.split(5), views.draw(3, 5, draws, "cpu")):
            seen = view(images[batch], labels[batch])[0]
            loss = torch.nn.CrossEntropyLoss()(net(seen), labels[batch].repeat(len(seen) // len(batch), 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter, value in zip(net.parameters(), trainer.flat.parameters(trained.theta)):
        torch.testing.assert_close(parameter.data, value, rtol=1e-4, atol=1e-5)


# --- starting from a set


def test_a_distillation_starts_from_a_set(buffers, finished, tensor_set, tmp_path):
    images, labels, _ = tensor_set
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "set", images_best=images[shuffled], labels_best=labels[shuffled])
    more = "--Iteration=0", "--num_eval=1", "--baseline_draws=0"
    for given in (finished / "plain", path):
        folder = distil(buffers, tmp_path, *more, f"--pix_init={given}")
        assert torch.equal(tensors(folder)["images_0.pt"], images)
    (unchecked,) = storage.load_json(folder / "config.json")["starts"]
    assert any("images_best.pt does not say from which images" in said for said in unchecked["unchecked"])
    path.unlink()
    distill_ATT.main([f"--resume={folder}", "--num_eval=2"])  # the set is needed no more


@pytest.mark.parametrize(
    "labels, says",
    [
        (torch.arange(10) // 2, "has 0 to 2 images per class, and --ipc is 1"),
        (torch.full((10, 10), 0.1), "has soft labels; a distillation starts from images of a class each"),
    ],
)
def test_a_set_that_cannot_be_started_from_is_refused(buffers, tensor_set, tmp_path, capsys, labels, says):
    path = write(tmp_path / "set", images_best=tensor_set[0], labels_best=labels)
    more = ["--max_start_epoch=2", "--expert_epochs=1", f"--buffer_path={buffers}", f"--save_dir={tmp_path / 'out'}"]
    err = refused(distill_ATT, [*DIGITS, *more, "--wandb=disabled", f"--pix_init={path}"], tmp_path, capsys)
    assert f"--pix_init {path} {says}" in err


# --- experts of others


def published(experts: list[storage.Expert], model: str, path):
    """A file as buffer.py of MTT, FTD, TESLA and DATM saves it: experts, each of epochs, each of parameters."""
    shapes = [p.shape for p in networks.build(model, 1, 10, 8).parameters()]
    shapes = [s[:1] if len(s) == 3 else s for s in shapes]  # torch's GroupNorm has vectors
    sizes = [s.numel() for s in shapes]
    content = [
        [[p.view(s) for p, s in zip(expert.snapshot(e).split(sizes), shapes)] for e in range(expert.epochs + 1)]
        for expert in experts
    ]
    path.parent.mkdir(parents=True)
    torch.save(content, path)


def test_published_experts_in_groups_give_the_same_distillation_under_either_name_of_the_network(tmp_path, capsys):
    make_experts(tmp_path / "b", "--model=ConvNetD3", "--num_experts=2", "--train_epochs=2", "--batch_train=512")
    experts = storage.load_experts(tmp_path / "b" / "Digits" / "ConvNetD3")
    published(experts, "ConvNetD3", tmp_path / "theirs" / "Digits" / "ConvNet" / "replay_buffer_0.pt")
    runs = []
    for name, model in (("b", "ConvNetD3"), ("b", "ConvNet"), ("theirs", "ConvNetD3"), ("theirs", "ConvNet")):
        flags = ["--Iteration=0", "--syn_steps=2", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0"]
        runs.append(distil(tmp_path / name, tmp_path / "out", *flags, f"--model={model}", f"--run_name={name}{model}"))
    said = capsys.readouterr().out
    for folder, other in (("b/Digits/ConvNet", "ConvNetD3"), ("theirs/Digits/ConvNetD3", "ConvNet")):
        folder, there = tmp_path / folder, (tmp_path / folder).with_name(other)
        assert f"There are no experts in {folder}; those in {there}, which is {folder.name} as well, are used." in said
    assert "2 of 2 experts in" in said and "do not say on which images they were trained" in said
    same_run(runs[0], runs[2])
    same_run(runs[1], runs[3])
    found = reproduce.collect("Digits-1", runs[2], [tmp_path / "not judged"])
    assert found["experts"] == 2 and "experts" not in found["parts"]  # they do not say what they cost
    flags += ["--model=ConvNetD3", "--load_all", "--run_name=all"]
    folder = distil(tmp_path / "theirs", tmp_path / "out", *flags)
    distill_ATT.main([f"--resume={folder}", "--Iteration=1"])
    assert [line["iteration"] for line in lines(folder) if "grand_loss" in line] == [0, 1]


def test_no_experts_are_added_to_published_ones(tmp_path):
    published([], "ConvNetW32", tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_0.pt")
    with pytest.raises(storage.InputError, match="replay_buffer_0.pt is of published code: distil with what lies there"):
        make_experts(tmp_path)


def test_published_experts_of_imagenet_lie_below_their_resolution(tmp_path):
    path = tmp_path / "ImageNet" / "imagewoof" / "128" / "ConvNetD5" / "replay_buffer_0.pt"
    path.parent.mkdir(parents=True)
    torch.save([[[torch.zeros(3)]] * 3], path)
    request = Request("ImageNet", tmp_path, "imagewoof")
    folder, said = storage.expert_folder(tmp_path, request, "ConvNetD5", {}, published=True)
    assert folder == path.parent and "as published code names it" in said
    assert storage.expert_folder(tmp_path, request, "ConvNetD5", {})[0] == tmp_path / "ImageNet" / "imagewoof" / "ConvNetD5"


# --- for others


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "set"
    distill_ATT.main([f"--load_syn={finished / 'plain'}", f"--export={folder}"])
    return folder


def test_an_exported_set_is_opened_by_other_tools(finished, tensor_set, exported, capsys):
    images, labels, lr = tensor_set
    found = {name: torch.load(exported / f"{name}.pt", weights_only=True) for name in ("images", "labels", "lr")}
    assert torch.equal(found["images"], images) and torch.equal(found["labels"], labels)
    assert found["lr"].shape == () and found["lr"].item() == pytest.approx(lr)
    folder = import_torchvision().ImageFolder(exported / "pictures")
    assert folder.classes == [str(c) for c in range(10)] and folder.targets == labels.tolist()
    transform = torch.load(exported / "transform.pt", weights_only=True)
    pixels = images * transform["std"].view(-1, 1, 1) + transform["mean"].view(-1, 1, 1)
    with open(exported / "labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == labels.tolist() and rows[3]["class"] == "3"
    for row, expected in zip(rows, pixels.clamp(0, 1)):
        with Image.open(exported / row["file"]) as picture:
            assert picture.size == (8, 8) and picture.mode == "L"
            shown = torch.from_numpy(np.array(picture))[None] / 255
        torch.testing.assert_close(shown, expected, rtol=0, atol=0.5 / 255 + 1e-6)
    content = storage.load(finished / "plain" / "synthetic_best.pt", "synthetic")
    text = (exported / "README.md").read_text()
    accuracy = f"{100 * content['accuracy']['mean']:.1f} ± 0.0 % on the test images"
    recipe = "momentum 0.9", "4 epochs; after 3", "DiffAugment (color"
    for fact in (accuracy, f"{lr:.6g} (lr.pt)", "mean [0.", "ConvNetW32", "10, 1 per class", *recipe):
        assert fact in text, fact
    (snippet,) = re.findall("```python\n(.*?)```", text, re.S)
    names = {}
    exec(snippet.replace('f"{name}.pt"', f'f"{exported}/{{name}}.pt"'), names)
    torch.testing.assert_close(names["pixels"], pixels)


def test_an_exported_set_comes_back(finished, exported, tmp_path, capsys):
    train = ["--num_eval=3", "--epoch_eval_train=60"]
    (whole,) = judged(exported, tmp_path, *train)
    capsys.readouterr()
    (pictures,), said = judged(exported / "pictures", tmp_path, *train, capsys=capsys)
    assert sum(whole) / 3 > 0.3 and abs(sum(whole) - sum(pictures)) / 3 < 0.01
    assert "trust" not in said and "without a learning rate" not in said
    flags = re.search("`python distill_ATT.py (.*) --load_syn=FOLDER --data_path=DATA`", (exported / "README.md").read_text())[1]
    assert {"--dataset=Digits", "--model=ConvNetW32", "--epoch_eval_train=3", "--eval_only"} <= set(flags.split())
    (again,) = judged(exported, tmp_path)
    distill_ATT.main([*flags.split(), *JUDGE, f"--load_syn={exported}", f"--save_dir={tmp_path}", "--run_name=card"])
    assert storage.load_json(tmp_path / "Digits" / "card" / "results.json")["evaluations"][0]["accs"] == again


def test_textures_soft_labels_and_odd_class_names_are_exported_too(finished, tmp_path):
    distill_ATT.main([f"--load_syn={finished / 'texture'}", f"--export={tmp_path / 'texture'}"])
    with Image.open(tmp_path / "texture" / "pictures" / "0" / "00001.png") as picture:
        assert picture.size == (16, 16)
    text = (tmp_path / "texture" / "README.md").read_text()
    assert "the images are canvases, 2 times as wide and high" in text and "--lr_teacher=0.02" in text
    path = write(tmp_path / "soft", images_best=torch.randn(10, 1, 8, 8), labels_best=torch.randn(10, 10))
    out = tmp_path / "empty"
    out.mkdir()
    distill_ATT.main([*DIGITS, f"--load_syn={path}", f"--export={out}"])
    found = sets.load_synthetic(out)
    assert torch.equal(found.labels, sets.load_synthetic(path).labels) and found.identity is None
    assert "soft labels" in (out / "README.md").read_text() and not (out / "lr.pt").exists()
    assert sets.folder_name("T-shirt/top") == "T-shirt_top" and not list(tmp_path.glob(".*"))


def test_pictures_come_to_the_data_sets_resolution_by_class(tmp_path):
    dataset = load_dataset(Request("Folder", image_folder(tmp_path / "pets"), resolution=16))
    found, _ = sets.prepare(sets.load_synthetic(tmp_path / "pets" / "train"), dataset)
    assert torch.equal(found.images, dataset.transform(dataset.train.pixels))
    assert torch.equal(found.labels, dataset.train.labels)
    shutil.move(tmp_path / "pets" / "train" / "eel", tmp_path / "pets" / "train" / "fox")
    with pytest.raises(InputError, match="train/fox is no class of Folder, such as cat; name the folders so"):
        sets.prepare(sets.load_synthetic(tmp_path / "pets" / "train"), dataset)
