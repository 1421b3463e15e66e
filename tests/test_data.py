"""Data sets become the tensors they should, and what is missing or damaged is named."""

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from small_data import cifar, image_folder, imagenet, mnist, svhn, tiny, unpacked
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
