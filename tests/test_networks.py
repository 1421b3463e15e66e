"""Every network by name: the published parameter counts, and every input size the field uses."""

import pytest
import torch

import networks

COUNTS = {  # at 3x32x32, 10 classes
    "ConvNetD1": 331_530, "ConvNetD2": 233_610, "ConvNetD3": 320_010, "ConvNetD4": 452_490,
    "ConvNetW32": 24_714, "ConvNetW64": 86_282, "ConvNetW256": 1_229_834,
    "ConvNetLN": 663_306, "ConvNetNN": 319_242, "ConvNetNP": 1_610_250,
    "MLP": 411_146, "LeNet": 62_006, "AlexNet": 1_872_202, "VGG11": 9_231_114,
    "ResNet18": 11_173_962, "ResNet18_AP": 11_250_762,
}  # fmt: skip
OTHER_COUNTS = [
    ("ConvNetD3", 3, 100, 32, 504_420),
    ("ConvNetD4", 3, 200, 64, 857_160),
    ("ConvNetD5", 3, 10, 128, 615_690),
    ("ConvNetD3", 1, 10, 28, 317_706),
]
SAME_AS_CONVNET = ["ConvNet", "ConvNetW128", "ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetIN", "ConvNetBN", "ConvNetGN",
                   "ConvNetMP", "ConvNetAP"]  # fmt: skip


def on_meta(*args):
    with torch.device("meta"):
        return networks.build(*args)


def parameters(*args):
    return sum(p.numel() for p in on_meta(*args).parameters())


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_published_parameter_counts(name, count):
    assert parameters(name, 3, 10, 32) == count


@pytest.mark.parametrize("name", SAME_AS_CONVNET)
def test_variants_that_change_no_shape_have_convnets_count(name):
    assert parameters(name, 3, 10, 32) == 320_010


@pytest.mark.parametrize("name, channels, classes, resolution, count", OTHER_COUNTS)
def test_counts_on_other_data_sets(name, channels, classes, resolution, count):
    assert parameters(name, channels, classes, resolution) == count


@pytest.mark.parametrize("name", [n for n in networks.NETWORKS if n not in ("ConvNetD6", "ConvNetD7", "ConvNetD8")])
def test_every_network_takes_every_size_of_the_field(name):
    for resolution in (28, 32, 64, 128):
        for channels in (1, 3):
            out = on_meta(name, channels, 7, resolution)(torch.empty(2, channels, resolution, resolution, device="meta"))
            assert out.shape == (2, 7)


@pytest.mark.parametrize("name", ["LeNet", "AlexNet", "VGG11", "VGG11BN", "ResNet18", "ResNet18_AP", "ResNet18BN_AP"])
def test_counts_do_not_depend_on_the_resolution(name):
    assert len({parameters(name, 3, 10, resolution) for resolution in (32, 64, 128)}) == 1


@pytest.mark.parametrize("name, resolution", [("ConvNetD4", 8), ("ConvNetD8", 128), ("VGG11", 16), ("ResNet18", 8)])
def test_an_image_too_small_for_a_network_is_refused_by_its_size(name, resolution):
    with pytest.raises(ValueError, match=f"at least .* not {resolution}"):
        networks.build(name, 3, 10, resolution)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (networks.GroupNorm(6, 6), torch.nn.GroupNorm(6, 6)),
        (networks.GroupNorm(2, 6), torch.nn.GroupNorm(2, 6)),
        (networks.LayerNorm(6, 5), torch.nn.LayerNorm([6, 5, 5])),
        (networks.BatchNorm(6), torch.nn.BatchNorm2d(6)),
    ],
)
def test_the_plain_formulas_are_torchs_norms(ours, theirs):
    random = torch.Generator().manual_seed(0)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        values = torch.randn(mine.shape, generator=random)
        mine.data.copy_(values)
        other.data.copy_(values.view(other.shape))
    x = torch.randn(4, 6, 5, 5, generator=random) * 3 + 2
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    # evaluation mode: batch norm's running statistics have followed in the same way
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side, brightest", [(32, (0, 0)), (32, (5, 7)), (7, (4, 4)), (3, (0, 0)), (1, (0, 0))])
def test_norms_keep_their_precision_on_the_hardest_images(side, brightest):
    flat = torch.full((2, 4, side, side), 10.0)
    flat[:, :, brightest[0], brightest[1]] = 11.3  # one pixel is all the variance there is
    groups = networks.GroupNorm(4, 4), networks.GroupNorm(2, 4)
    for norm in (*groups, networks.LayerNorm(4, side), networks.BatchNorm(4)):
        exact = norm.double()(flat.double())
        found = norm.float()(flat)
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_convnet_is_what_the_paper_draws():
    """Depth blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear layer."""
    net = networks.build("ConvNetD2", 3, 10, 16)
    kinds = [type(m).__name__ for m in net.features]
    assert kinds[1:4] == kinds[5:] == ["GroupNorm", "ReLU", "AvgPool2d"]
    x = torch.randn(2, 3, 16, 16)
    expected = x
    for conv, norm in ((net.features[0], net.features[1]), (net.features[4], net.features[5])):
        expected = torch.nn.functional.conv2d(expected, conv.weight, conv.bias, padding=1)
        mean = expected.mean((2, 3), keepdim=True)
        std = (expected.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        expected = torch.relu((expected - mean) / std * norm.weight + norm.bias)
        expected = expected.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(net(x), net.classifier(expected.flatten(1)))
