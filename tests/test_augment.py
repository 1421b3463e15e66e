"""DiffAugment: published ranges, what happens at the borders, exact replay."""

import math

import pytest
import torch

from utils import AUGMENTATIONS, Augmentation, Canvas, Views, generator, parse_strategy

LOWEST, HIGHEST = 0.0, 1 - 2**-24  # of u


def u(*columns, n=1):
    return torch.tensor([list(columns) + [0.5] * (3 - len(columns))]).expand(n, -1)


def picture(side=32, channels=3):
    return torch.rand(1, channels, side, side, generator=generator(0, "picture")) + 1  # no zeros


@pytest.mark.parametrize("side, reach", [(32, 4), (28, 4), (64, 8), (128, 16), (8, 1)])
def test_crop_shifts_by_up_to_an_eighth_and_brings_in_zeros(side, reach):
    x = picture(side)
    for draw, shift in ((LOWEST, -reach), (HIGHEST, reach), (0.5, 0)):
        out = AUGMENTATIONS["crop"](x, u(draw, 0.5))
        expected = torch.zeros_like(x)
        source = slice(max(shift, 0), side + min(shift, 0))
        target = slice(max(-shift, 0), side + min(-shift, 0))
        expected[:, :, target] = x[:, :, source]
        assert torch.equal(out, expected)
        assert torch.equal(AUGMENTATIONS["crop"](x.mT, u(0.5, draw)), expected.mT)


def test_crop_draws_every_shift_equally_often():
    n = 9000
    draws = torch.stack([(torch.arange(n) + 0.5) / n, torch.full((n,), 0.5), torch.zeros(n)], 1)
    ramp = torch.arange(1.0, 33).view(1, 1, 32, 1).expand(n, 1, 32, 32)
    centre = AUGMENTATIONS["crop"](ramp, draws)[:, 0, 16, 16]
    assert torch.equal(centre.unique(return_counts=True)[0], torch.arange(13.0, 22))
    assert (centre.unique(return_counts=True)[1] == n // 9).all()


def test_cutout_is_half_the_side_clipped_at_the_border():
    x = picture()
    covered = lambda row, column: (AUGMENTATIONS["cutout"](x, u(row, column)) == 0).all(1)[0]  # noqa: E731
    middle = covered(0.5, 0.5)
    assert middle.sum() == 16 * 16 and middle[8:24, 8:24].all()
    corner = covered(LOWEST, LOWEST)  # the centre lies on the corner: a quarter of the square remains
    assert corner.sum() == 8 * 8 and corner[:8, :8].all()
    other = covered(HIGHEST, HIGHEST)
    assert other.sum() == 8 * 8 and other[24:, 24:].all()


def test_cutout_leaves_the_rest_alone():
    x = picture()
    out = AUGMENTATIONS["cutout"](x, u(0.3, 0.8))
    assert torch.equal(out[out != 0], x[out != 0])


def test_flip_is_horizontal_with_probability_one_half():
    x = picture()
    assert torch.equal(AUGMENTATIONS["flip"](x, u(0.49)), x.flip(3))
    assert torch.equal(AUGMENTATIONS["flip"](x, u(0.5)), x)


def test_color_is_brightness_then_saturation_then_contrast():
    x = picture()
    same = AUGMENTATIONS["color"](x, u(0.5, 0.5, 0.5))
    torch.testing.assert_close(same, x)
    for b, s, c in ((0.0, 0.0, 0.0), (0.9, 0.1, 0.7), (0.2, 1.0, 1.0)):
        expected = x + (b - 0.5)
        grey = expected.mean(1, keepdim=True)
        expected = grey + (expected - grey) * 2 * s
        mean = expected.mean()
        expected = mean + (expected - mean) * (c + 0.5)
        torch.testing.assert_close(AUGMENTATIONS["color"](x, u(b, s, c)), expected)


def test_scale_multiplies_the_sampling_grid_by_up_to_a_fifth_each_way():
    x = torch.ones(1, 1, 31, 31)
    # above 1 the image shrinks: 31 - 1 = 30 steps become 30 / 1.2 = 25, so 26 pixels stay and zeros come in
    shrunk = AUGMENTATIONS["scale"](x, u(HIGHEST, 0.5))[0, 0]
    columns = shrunk[15] > 0.99
    assert columns.sum() == 25 and columns[3:28].all() and shrunk[15, 0] == 0
    # below 1 it grows, and nothing comes in
    assert torch.allclose(AUGMENTATIONS["scale"](x, u(LOWEST, LOWEST)), x)
    ramp = torch.linspace(-1, 1, 31).expand(1, 1, 31, 31)
    grown = AUGMENTATIONS["scale"](ramp, u(LOWEST, HIGHEST))[0, 0, 15]
    torch.testing.assert_close(grown, ramp[0, 0, 0] / 1.2)


def test_rotate_goes_to_fifteen_degrees_each_way():
    row, column = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="ij")
    for draw, degrees in ((LOWEST, -15), (HIGHEST, 15), (0.5, 0)):
        out = AUGMENTATIONS["rotate"](column[None, None], u(draw))[0, 0]
        angle = math.radians(degrees)
        expected = math.cos(angle) * column - math.sin(angle) * row
        torch.testing.assert_close(out[8:25, 8:25], expected[8:25, 8:25], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_has_its_own_parameters_and_replays_exactly(name, device):
    random = generator(1, name)
    x = torch.rand(1, 3, 16, 16, generator=random).expand(6, -1, -1, -1).to(device)
    draws = torch.rand(6, 3, generator=random).to(device)
    augment = Augmentation(name, draws)
    out = augment(x)
    assert torch.equal(out, augment(x))
    assert len({tuple(image.flatten().tolist()) for image in out}) > 1
    for i in range(6):
        single = Augmentation(name, draws[i : i + 1])(x[:1])
        torch.testing.assert_close(out[i : i + 1], single)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_operation_is_affine_in_the_images_and_differentiable(name):
    random = generator(2, name)
    draws = torch.rand(2, 3, generator=random, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, generator=random, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: AUGMENTATIONS[name](x, draws), x)
    y = torch.randn(2, 3, 8, 8, generator=random, dtype=torch.float64)
    f = Augmentation(name, draws)
    torch.testing.assert_close(f(0.3 * x + 0.7 * y), 0.3 * f(x) + 0.7 * f(y))


def test_one_operation_per_call_drawn_uniformly():
    names = parse_strategy("color_crop_cutout_flip_scale_rotate")
    drawn = Views(names).draw(6000, 2, generator(0, "many"), torch.device("cpu"))
    drawn = [view.augmentation for view in drawn]
    counts = [sum(a.name == name for a in drawn) for name in names]
    assert len(drawn) == sum(counts) and all(900 < count < 1100 for count in counts)
    values = torch.stack([a.u for a in drawn])
    assert 0 <= values.min() and values.max() < 1 and abs(values.mean() - 0.5) < 0.01


def test_the_same_stream_draws_the_same():
    names = parse_strategy("crop_flip")
    a, b = (Views(names).draw(5, 3, generator(7, "s"), torch.device("cpu")) for _ in range(2))
    pairs = [(x.augmentation, y.augmentation) for x, y in zip(a, b)]
    assert all(x.name == y.name and torch.equal(x.u, y.u) for x, y in pairs)


def test_strategies():
    assert parse_strategy("none") == parse_strategy("None") == ()
    with pytest.raises(ValueError, match="'blur' is no augmentation; there are color, crop"):
        parse_strategy("color_blur")


def test_crops_of_a_canvas_wrap_around_and_come_sample_after_sample():
    canvas = Canvas(side=4, size=2, samples=3)
    x = torch.rand(5, 3, 8, 8, generator=generator(0, "c"))
    (view,) = Views(canvas=canvas).draw(1, 5, generator(1, "c"), torch.device("cpu"))
    out, labels = view(x, torch.arange(5))
    assert out.shape == (15, 3, 4, 4) and torch.equal(out, view(x, labels)[0]) and labels.tolist() == 3 * list(range(5))
    for sample in range(3):
        for i in range(5):
            row, column = view.crops.places[sample, i].tolist()
            expected = x[i].roll((-row, -column), (1, 2))[:, :4, :4]
            assert torch.equal(out[sample * 5 + i], expected)
    many = Views(canvas=canvas).draw(400, 5, generator(2, "c"), torch.device("cpu"))
    assert torch.stack([view.crops.places for view in many]).unique().tolist() == list(range(8))
