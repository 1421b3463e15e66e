"""Data sets become the tensors they should, and what is missing or damaged is named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import storage
import utils
from small_data import cifar, image_folder, imagenet, mnist, svhn, tiny, unpacked
from storage import InputError
from utils import Request, load_dataset


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
    dataset = load_dataset(Request("CIFAR10", cifar(tmp_path, monkeypatch)))
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


def test_initial_images_are_real_ones_of_their_class(tmp_path):
    dataset = load_dataset(Request("Digits", "unused"))
    images = dataset.sample(3, utils.generator(0, "s"))
    assert images.shape == (30, 1, 8, 8)
    real = dataset.transform(dataset.train.pixels)
    for i, image in enumerate(images):
        same = (real == image).flatten(1).all(1)
        assert (dataset.train.labels[same] == i // 3).any()
    assert len({image.numpy().tobytes() for image in images}) == 30


# --- data known by their content


def swap(root, a="train/cat/0.png", b="train/dog/0.png"):
    """Two files trade places, with their times and sizes."""
    (root / a).rename(root / "kept")
    (root / b).rename(root / a)
    (root / "kept").rename(root / b)


def identity(root, **more):
    return load_dataset(folder_request(root, **more)).identity


@pytest.mark.parametrize("zca", [False, True])
def test_a_folder_is_known_by_its_files_wherever_they_are_and_whatever_they_are_called(tmp_path, zca):
    if zca:
        pytest.importorskip("kornia")
    root = image_folder(tmp_path / "pets")
    found = identity(root, zca=zca, resolution=8)
    renamed = shutil.copytree(root, tmp_path / "animals", ignore=shutil.ignore_patterns("cache"))
    for path in list((renamed / "train" / "dog").iterdir()):
        path.rename(path.with_stem(f"dog {path.stem}"))
    assert identity(renamed, zca=zca, resolution=8) == found and found["class_count"] == 3
    swap(renamed, b="train/dog/dog 0.png")
    assert identity(renamed, zca=zca, resolution=8)["images"] != found["images"]


def test_images_are_known_with_their_order_and_classes_at_any_resolution_and_without_the_test_set(tmp_path):
    root = image_folder(tmp_path / "pets")
    found = identity(root)["images"]
    assert identity(root, resolution=8)["images"] == found
    (root / "val" / "cat" / "0.png").unlink()
    assert identity(root)["images"] == found
    swap(root, "train/cat/0.png", "train/cat/1.png")
    assert identity(root)["images"] != found
    swap(root, "train/cat/0.png", "train/cat/1.png")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "bat")
    assert identity(root)["images"] != found


def test_the_same_pixels_in_other_bytes_are_other_images_and_other_decoders_change_nothing(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "pets")
    found = identity(root)
    shutil.rmtree(root / "cache")
    monkeypatch.setitem(utils.SOURCES, "Folder", replace(utils.SOURCES["Folder"], fit=utils.squash))
    decoded_otherwise = identity(root)
    assert decoded_otherwise["normalisation"] != found["normalisation"] and decoded_otherwise["images"] == found["images"]
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes() + b"no pixel")
    assert identity(root)["images"] != found["images"]


def test_a_cached_start_reads_no_image_and_an_old_cache_is_made_again(tmp_path, monkeypatch):
    root = image_folder(tmp_path)
    found = identity(root)
    reading, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reading.append(path) or read(path))
    assert identity(root) == found and not reading
    for path in (root / "cache").iterdir():
        content = torch.load(path, weights_only=True) | {"version": 2}
        del content["content"]
        torch.save(content, path)
    assert identity(root) == found and len(reading) == 18
    assert identity(root) == found and len(reading) == 18


def test_data_that_are_no_files_are_known_by_their_pixels_and_labels(tmp_path, monkeypatch):
    found = load_dataset(Request("CIFAR10", cifar(tmp_path, monkeypatch))).identity["images"]
    assert load_dataset(Request("CIFAR10", tmp_path, resolution=16)).identity["images"] == found
    read = utils._tensors

    def changed(part):
        images = read(part)
        if len(images) == 50:  # of the training set
            (images.pixels[7, 0, 0] if what == "pixels" else images.labels)[:2] += 1
        return images

    monkeypatch.setattr(utils, "_tensors", changed)
    others = set()
    for what in ("pixels", "labels"):
        others.add(load_dataset(Request("CIFAR10", tmp_path)).identity["images"])
    assert len(others | {found}) == 3


# --- the folder of the experts


def where(name, path="d", identity=None, **more):
    folder, said = storage.expert_folder("b", Request(name, path, **more), "ConvNetD3", identity or {})
    return str(folder), said


def test_expert_folders():
    folder = {"images": "0123456789abcdef", "classes": "c"}
    named = {
        "b/CIFAR10/ConvNetD3": ("CIFAR10", dict(zca=True)),
        "b/CIFAR10_NO_ZCA/ConvNetD3": ("CIFAR10", dict(resolution=32)),
        "b/CIFAR100_NO_ZCA_res16/ConvNetD3": ("CIFAR100", dict(resolution=16)),
        "b/Digits/ConvNetD3": ("Digits", {}),
        "b/Digits_ZCA/ConvNetD3": ("Digits", dict(zca=True)),
        "b/Tiny_ZCA_res32/ConvNetD3": ("Tiny", dict(zca=True, resolution=32)),
        "b/ImageNet/imagewoof/ConvNetD3": ("ImageNet", dict(subset="imagewoof")),
        "b/Folder/01234567_res16/ConvNetD3": ("Folder", dict(identity=folder, resolution=16)),
    }  # fmt: skip
    for folder, (name, more) in named.items():
        assert where(name, **more) == (folder, "")


def expert_at(folder, settings, k=0):
    storage.save_expert(folder, k, torch.zeros(3, 5), settings, [0.1, 0.2])


def test_a_folders_experts_are_found_whatever_it_is_called_and_those_of_earlier_names_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "pets")
    made = identity(root)
    now, said = where("Folder", root, made, resolution=16)
    assert now == f"b/Folder/{made['images'][:8]}_res16/ConvNetD3" and not said
    renamed = root.rename(tmp_path / "animals")
    assert where("Folder", renamed, identity(renamed), resolution=16) == (now, "")

    before = {name: value for name, value in made.items() if name not in ("images", "class_count")}
    other = tmp_path / "b" / "Folder" / f"fish_{made['classes']}_res16" / "ConvNetD3"
    expert_at(other, before | {"normalisation": [[0.1] * 3, [0.2] * 3]})  # of other images of these classes
    assert where("Folder", renamed, made, resolution=16) == (now, "")
    for name in ("pets", "zebras"):
        expert_at(tmp_path / "b" / "Folder" / f"{name}_{made['classes']}_res16" / "ConvNetD3", before)
    old = f"b/Folder/pets_{made['classes']}_res16/ConvNetD3"
    says = f"There are no experts in {now}; those in {old}, its name in earlier versions, are used."
    assert where("Folder", renamed, made, resolution=16) == (old, says)
    zebras = renamed.rename(tmp_path / "zebras")
    assert where("Folder", zebras, made, resolution=16)[0] == old.replace("pets", "zebras")
    assert where("Folder", zebras, made | {"resolution": 32}, resolution=32)[1] == ""
    expert_at(Path(now), made)
    assert where("Folder", renamed, made, resolution=16) == (now, "")


def test_whitened_experts_are_looked_for_where_they_were_before_and_plain_ones_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, now, made = Path("b/Tiny/ConvNetD3"), "b/Tiny_ZCA/ConvNetD3", {"dataset": "Tiny", "zca": True}
    expert_at(old, made | {"zca": False})
    assert where("Tiny", identity=made, zca=True) == (now, "")
    expert_at(old, made)
    says = f"There are no experts in {now}; those in {old}, its name in earlier versions, are used."
    assert where("Tiny", identity=made, zca=True) == (str(old), says)
    torch.save([[[torch.zeros(3)]] * 2], old / "replay_buffer_0.pt")  # a published file, which does not say
    assert where("Tiny", identity=made, zca=True) == (str(old), says)
    old.joinpath("replay_buffer_0.pt").write_bytes(b"damaged")
    assert where("Tiny", identity=made, zca=True) == (now, "")


@pytest.mark.long
def test_real_cifar10_images_through_folder(tmp_path):
    root = unpacked("cifar10-jpeg.tar.xz", "cifar10", tmp_path)
    dataset = load_dataset(folder_request(root, resolution=32))
    assert dataset.train.pixels.shape == (50000, 3, 32, 32) and dataset.test.pixels.shape == (10000, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    # re-encoded as JPEG, the pixels still have CIFAR-10's published mean to within a level or so
    torch.testing.assert_close(dataset.transform.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.005, rtol=0)


# --- every data set of the field in its own format


def test_cifar100(tmp_path, monkeypatch):
    dataset = load_dataset(Request("CIFAR100", cifar(tmp_path, monkeypatch, "CIFAR100")))
    assert dataset.train.pixels.shape == (500, 3, 32, 32) and len(dataset.classes) == 100
    assert dataset.test.labels.tolist() == list(range(100))


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist(tmp_path, name):
    dataset = load_dataset(Request(name, mnist(tmp_path, name)))
    assert dataset.train.pixels.shape == (40, 1, 28, 28) and len(dataset.classes) == 10
    assert dataset.train.labels.tolist() == [i % 10 for i in range(40)]


def test_svhn(tmp_path, monkeypatch):
    dataset = load_dataset(Request("SVHN", svhn(tmp_path, monkeypatch)))
    assert dataset.train.pixels.shape == (40, 3, 32, 32) and dataset.classes == [str(c) for c in range(10)]
    levels = [dataset.train.pixels[dataset.train.labels == c].float().mean().item() for c in range(10)]
    assert levels == sorted(levels)


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet_in_both_layouts_from_inside_and_outside(tmp_path, official, inside):
    root = tiny(tmp_path, official=official)
    dataset = load_dataset(Request("Tiny", root / "tiny-imagenet-200" if inside else root))
    assert dataset.classes == ["n01", "n02", "n03"]
    assert dataset.train.pixels.shape == (12, 3, 64, 64) and len(dataset.test) == 6
    grey = dataset.train.pixels[0]
    assert torch.equal(grey[0], grey[1]) and not torch.equal(dataset.train.pixels[1][0], dataset.train.pixels[1][1])
    levels = [dataset.test.pixels[dataset.test.labels == c].float().mean().item() for c in range(3)]
    assert levels == sorted(levels)


@pytest.mark.parametrize("subset", ["imagenette", "imageyellow"])  # the latter is in no order
def test_imagenet_subsets_in_published_label_order(tmp_path, subset):
    root = imagenet(tmp_path, utils.SUBSETS[subset], train=1, test=1)
    dataset = load_dataset(Request("ImageNet", root, subset))
    assert dataset.classes == utils.SUBSETS[subset]
    assert dataset.train.pixels.shape == (10, 3, 128, 128) and dataset.train.pixels.dtype == torch.uint8
    levels = [dataset.train.pixels[dataset.train.labels == c].float().mean().item() for c in range(10)]
    assert levels == sorted(levels)


def test_imagenet_is_squashed_whatever_the_aspect(tmp_path):
    wnids = utils.SUBSETS["imagenette"]
    root = imagenet(tmp_path, wnids, train=1, test=1)
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 150:] = 255
    Image.fromarray(wide).save(root / "train" / wnids[0] / "0.JPEG")
    dataset = load_dataset(Request("ImageNet", root, "imagenette", resolution=64))
    assert dataset.train.pixels[0, :, :, :28].max() < 20 and dataset.train.pixels[0, :, :, 36:].min() > 235


def test_imagenet_is_resized_without_antialiasing(tmp_path):
    wnids = utils.SUBSETS["imagenette"]
    root = imagenet(tmp_path, wnids, train=1, test=1)
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(root / "train" / wnids[0] / "0.JPEG", "png")  # pixels as they are
    pixels = load_dataset(Request("ImageNet", root, "imagenette", resolution=32)).train.pixels[0]
    rows = noise[1::3].astype(float)  # the middle one of three; of four columns, the mean of the middle two
    near = (rows[:, 1::4] + rows[:, 2::4]) / 2
    assert np.abs(pixels.permute(1, 2, 0).numpy() - near).max() <= 0.5


def test_another_resolution_resizes_tensors_too(tmp_path, monkeypatch):
    dataset = load_dataset(Request("CIFAR10", cifar(tmp_path, monkeypatch), resolution=16))
    assert dataset.train.pixels.shape == (50, 3, 16, 16) and dataset.identity["resolution"] == 16


# --- ZCA


@pytest.fixture(scope="module")
def whitened(tmp_path_factory):
    pytest.importorskip("kornia")
    return load_dataset(Request("Digits", tmp_path_factory.mktemp("zca"), zca=True))


def test_whitening_is_what_numpy_computes(whitened):
    x = whitened.train.pixels.flatten(1).double().numpy() / 255
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(x) - 1))
    expected = centred @ (vectors / np.sqrt(values + 0.1)) @ vectors.T
    ours = whitened.transform(whitened.train.pixels).flatten(1).double().numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_whitened_images_have_the_covariance_that_eps_allows(whitened):
    ours = whitened.transform(whitened.train.pixels).flatten(1).double()
    covariance = ours.T.cov()
    x = whitened.train.pixels.flatten(1).double() / 255
    values = torch.linalg.eigvalsh(x.T.cov())
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance), values / (values + 0.1), atol=1e-4, rtol=0)


def test_whitening_and_its_inverse_return_the_images(whitened):
    images = whitened.transform(whitened.test.pixels)
    torch.testing.assert_close(whitened.transform.undo(images) * 255, whitened.test.pixels.float(), atol=0.255, rtol=0)


def test_a_fitted_whitening_is_kept(tmp_path, monkeypatch):
    kornia = pytest.importorskip("kornia")
    request = Request("Digits", tmp_path, zca=True)
    first = load_dataset(request).transform
    fits = []
    monkeypatch.setattr(kornia.enhance.ZCAWhitening, "fit", lambda self, x: fits.append(x))
    assert torch.equal(load_dataset(request).transform.matrix, first.matrix) and not fits
