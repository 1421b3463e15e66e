"""Data sets become the tensors they should, and what is missing or damaged is named."""

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from small_data import cifar10, image_folder, unpacked
from storage import InputError
from utils import Request, expert_folder, load_dataset


def folder_request(root, **more):
    return Request("Folder", root, **({"resolution": 16} | more))


def test_digits_are_split_the_same_way_every_time_and_stratified():
    dataset = load_dataset(Request("Digits", "unused"))
    assert dataset.train.pixels.shape == (1437, 1, 8, 8) and dataset.test.pixels.shape == (360, 1, 8, 8)
    assert dataset.train.pixels.dtype == torch.uint8 and dataset.train.labels.dtype == torch.int64
    counts = dataset.test.labels.bincount()
    assert counts.min() >= 35 and counts.max() <= 37
    again = load_dataset(Request("Digits", "unused"))
    assert torch.equal(again.test.pixels, dataset.test.pixels)
    train = {image.numpy().tobytes() for image in dataset.train.pixels}
    assert sum(image.numpy().tobytes() in train for image in dataset.test.pixels) == 0


def test_cifar10_in_torchvisions_own_format(tmp_path, monkeypatch):
    dataset = load_dataset(Request("CIFAR10", cifar10(tmp_path, monkeypatch)))
    assert dataset.train.pixels.shape == (50, 3, 32, 32) and dataset.test.pixels.shape == (20, 3, 32, 32)
    assert dataset.classes[:2] == ["airplane", "automobile"]
    # the published normalisation, and label by label the level that the class was drawn with
    expected = (dataset.train.pixels.double() / 255 - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / (
        torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    )
    torch.testing.assert_close(dataset.transform(dataset.train.pixels).double(), expected, atol=1e-5, rtol=1e-5)
    levels = [dataset.train.pixels[dataset.train.labels == c].float().mean().item() for c in range(10)]
    assert levels == sorted(levels)


def test_cifar10_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    datasets = utils.import_torchvision()

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="CIFAR10 is not complete in --data_path .*no network.*place there"):
        load_dataset(Request("CIFAR10", tmp_path))


def test_a_folder_is_resized_by_its_short_side_and_cropped_in_the_centre(tmp_path):
    root = image_folder(tmp_path)
    left_to_right = np.zeros((20, 60, 3), np.uint8)
    left_to_right[:, 20:40] = 255
    Image.fromarray(left_to_right).save(root / "train" / "cat" / "wide.png")
    dataset = load_dataset(folder_request(root, resolution=20))
    assert dataset.classes == ["cat", "dog", "eel"]
    assert dataset.train.pixels.shape == (13, 3, 20, 20) and len(dataset.test) == 6
    assert (dataset.train.pixels[4] == 255).all()  # the white third in the middle


def test_a_folders_normalisation_is_measured_on_its_training_set(tmp_path):
    dataset = load_dataset(folder_request(image_folder(tmp_path)))
    whitened = dataset.transform(dataset.train.pixels)
    torch.testing.assert_close(whitened.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(dataset.transform.undo(whitened) * 255, dataset.train.pixels.float(), atol=1e-3, rtol=0)


def test_a_second_start_decodes_nothing_and_a_changed_file_is_seen(tmp_path, monkeypatch):
    root = image_folder(tmp_path)
    first = load_dataset(folder_request(root))
    decoded = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda path: decoded.append(path) or opened(path))
    second = load_dataset(folder_request(root))
    assert torch.equal(first.train.pixels, second.train.pixels) and not decoded
    Image.new("RGB", (16, 16), "white").save(root / "train" / "cat" / "0.png")
    third = load_dataset(folder_request(root))
    assert decoded and (third.train.pixels[0] == 255).all()


def test_a_damaged_cache_is_rebuilt(tmp_path):
    root = image_folder(tmp_path)
    first = load_dataset(folder_request(root))
    for path in (root / "cache").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert torch.equal(load_dataset(folder_request(root)).train.pixels, first.train.pixels)


def test_initial_images_are_real_ones_of_their_class(tmp_path):
    dataset = load_dataset(Request("Digits", "unused"))
    images = dataset.sample(3, utils.generator(0, "s"))
    assert images.shape == (30, 1, 8, 8)
    real = dataset.transform(dataset.train.pixels)
    for i, image in enumerate(images):
        same = (real == image).flatten(1).all(1)
        assert (dataset.train.labels[same] == i // 3).any()
    assert len({image.numpy().tobytes() for image in images}) == 30


def test_expert_folders(tmp_path):
    root = image_folder(tmp_path / "pets")
    where = lambda *args, **kw: str(expert_folder("b", Request(*args, **kw), "ConvNetD3"))  # noqa: E731
    assert where("CIFAR10", "d", zca=True) == "b/CIFAR10/ConvNetD3"
    assert where("CIFAR10", "d") == "b/CIFAR10_NO_ZCA/ConvNetD3"
    assert where("CIFAR10", "d", resolution=32) == "b/CIFAR10_NO_ZCA/ConvNetD3"
    assert where("CIFAR10", "d", resolution=16) == "b/CIFAR10_NO_ZCA_res16/ConvNetD3"
    assert where("Digits", "d") == "b/Digits/ConvNetD3"
    first = where("Folder", root, resolution=16)
    assert first.startswith("b/Folder/pets_") and first.endswith("_res16/ConvNetD3")
    other = image_folder(tmp_path / "elsewhere" / "pets", classes=("x", "y"))
    assert where("Folder", other, resolution=16) != first


def test_real_cifar10_images_through_folder(tmp_path):
    root = unpacked("cifar10-jpeg.tar.xz", "cifar10", tmp_path)
    dataset = load_dataset(folder_request(root, resolution=32))
    assert dataset.train.pixels.shape == (50000, 3, 32, 32) and dataset.test.pixels.shape == (10000, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    # re-encoded as JPEG, the pixels still have CIFAR-10's published mean to within a level or so
    torch.testing.assert_close(dataset.transform.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.005, rtol=0)


# --- what is wrong is named


def broken(root, what):
    if what == "no train":
        (root / "train").rename(root / "training")
    elif what == "no test":
        (root / "val").rename(root / "validation")
    elif what == "one class":
        for split in ("train", "val"):
            for name in ("dog", "eel"):
                (root / split / name).rename(root / f"{split}-{name}")
    elif what == "empty class":
        for path in (root / "train" / "dog").iterdir():
            path.unlink()
    elif what == "other classes":
        (root / "val" / "dog").rename(root / "val" / "fox")
    elif what == "not an image":
        (root / "train" / "dog" / "0.png").write_bytes(b"no image")
    elif what == "cut off":
        path = root / "train" / "dog" / "0.png"
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "what, says",
    [
        ("no train", r"has no folder train/; .* needs train/<class>/\*"),
        ("no test", r"has no folder val/ or test/"),
        ("one class", r"train has 1 class folders; it needs at least 2"),
        ("empty class", r"train/dog holds no images"),
        ("other classes", r"must hold the same classes, but differ in 'dog'"),
        ("not an image", r"train/dog/0.png cannot be decoded"),
        ("cut off", r"train/dog/0.png cannot be decoded"),
    ],
)
def test_broken_folders_are_named(tmp_path, what, says):
    root = image_folder(tmp_path)
    broken(root, what)
    with pytest.raises(InputError, match=says):
        load_dataset(folder_request(root))


def test_names_with_spaces_and_unicode_work(tmp_path):
    root = image_folder(tmp_path / "mes données", classes=("chat d'été", "犬", "x y"))
    assert load_dataset(folder_request(root)).classes == sorted(["chat d'été", "犬", "x y"])
