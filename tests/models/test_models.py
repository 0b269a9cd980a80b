"""The networks: what every model promises, and politically_correct's layers, preprocessing and loss by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, one_hot

import models
from caps_kernels import functional
from models import politically_correct

pytestmark = pytest.mark.filterwarnings("ignore::caps_kernels.backends.FallbackWarning")
every_model = pytest.mark.parametrize("name", models.names())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that share a busy core wait for each other ten times longer than tensors this small take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def build(name: str, classes: int, size: tuple[int, int], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = models.get(name).Network(classes, size)
    return network


def test_models_are_known_by_name() -> None:
    assert models.names()[0] == "logo_capsnet"
    assert models.get("politically_correct").Network is politically_correct.Network
    with pytest.raises(ValueError, match="model must be one of logo_capsnet, politically_correct, got 'alexnet'"):
        models.get("alexnet")
    with pytest.raises(ValueError, match=r"got '\.\./os'"):
        models.get("../os")


@every_model
def test_a_module_says_how_to_train_it(name: str) -> None:
    model = models.get(name)
    height, width = model.IMAGE_SIZE
    assert min(height, width) >= 16
    assert isinstance(model.DEFAULTS, models.Defaults)
    assert min(model.DEFAULTS.epochs, model.DEFAULTS.batch_size) >= 1
    assert 0 < model.DEFAULTS.learning_rate < 1
    assert 0 < model.DEFAULTS.presence_threshold < 1


@every_model
@pytest.mark.parametrize("size", [None, (43, 29)], ids=["default", "odd"])
def test_class_capsules_have_lengths_below_1_and_belong_to_one_image(name: str, size: tuple[int, int] | None) -> None:
    model = models.get(name)
    size = size or model.IMAGE_SIZE
    network, x = build(name, 5, size), model.preprocess(random_images(3, *size))
    with torch.no_grad():
        v, alone = network(x), network(x[1:2])
    assert v.shape == (3, 5, 16)
    length = v.norm(dim=2)
    assert (length < 1).all()
    assert length.mean() > 1e-3
    torch.testing.assert_close(v[1:2], alone, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(v[0], v[1], rtol=1e-3)


@every_model
def test_a_network_repeats_itself_from_its_seed_and_its_state(name: str) -> None:
    model = models.get(name)
    first, second, third = (build(name, 4, (32, 32), seed) for seed in (0, 0, 1))
    x = model.preprocess(random_images(2, 32, 32))
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
        assert not torch.equal(first(x), third(x))
        third.load_state_dict(first.state_dict())
        assert torch.equal(first(x), third(x))


@every_model
def test_options_reach_the_routing(name: str) -> None:
    model = models.get(name)
    x = model.preprocess(random_images(2, 32, 32))
    results = {}
    for iterations, routing_grad in ((1, "full"), (3, "full"), (3, "last")):
        torch.manual_seed(0)
        network = model.Network(4, (32, 32), iterations=iterations, routing_grad=routing_grad, backend="reference")
        weight = network.get_parameter("classes.weight")
        with torch.no_grad():
            weight.mul_(30)
        v = network(x)
        gradient = torch.autograd.grad(v.square().sum(), weight)[0]
        results[iterations, routing_grad] = v.detach(), gradient
    one, full, last = results.values()
    assert not torch.allclose(one[0], full[0], rtol=1e-3)
    assert torch.equal(full[0], last[0])
    assert not torch.allclose(full[1], last[1], rtol=1e-3)
    with pytest.raises(ValueError, match="backend must be"):
        model.Network(4, backend="gpu")


@every_model
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    model = models.get(name)
    network, x = build(name, 4, (32, 32)), model.preprocess(random_images(3, 32, 32))
    target = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    model.loss(network, x, network(x), target).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.norm() > 0, parameter_name


@every_model
def test_the_loss_is_small_for_right_capsules_and_large_for_wrong_ones(name: str) -> None:
    model = models.get(name)
    network, x = build(name, 4, (32, 32)), model.preprocess(random_images(2, 32, 32))
    target = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    right = target[..., None] * torch.full((16,), 0.95 / 4)
    wrong = (1 - target)[..., None] * torch.full((16,), 0.95 / 4)
    with torch.no_grad():
        low, high = model.loss(network, x, right, target), model.loss(network, x, wrong, target)
    # Of the margins alone: nothing, against two of 0.9² and six of 0.5 · 0.85² over two images.
    assert low.shape == ()
    assert high - low == pytest.approx((2 * 0.81 + 6 * 0.5 * 0.7225) / 2, rel=0.2)


@every_model
def test_preprocessing_gives_float32_in_a_fixed_range(name: str) -> None:
    model = models.get(name)
    images = random_images(2, 9, 7)
    images[0], images[1, :, 0] = 0, 255
    before = images.clone()
    x = model.preprocess(images)
    assert x.dtype == torch.float32
    assert (x.shape[0], *x.shape[2:]) == (2, 9, 7)
    assert -1 <= x.min() < x.max() <= 1
    assert (x[0] == x.min()).all()
    assert (x[1, :, 0] == x.max()).all()
    assert torch.equal(images, before)


@every_model
def test_images_too_small_for_the_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"image_size must be at least \d+x\d+, got 2x64"):
        models.get(name).Network(4, (2, 64))


def test_politically_correct_takes_the_luma() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [100, 200, 50]])
    x = politically_correct.preprocess(colours.to(torch.uint8).view(6, 3, 1, 1))
    # The last: (0.299 · 100 + 0.587 · 200 + 0.114 · 50) / 255 = 153 / 255.
    torch.testing.assert_close(x.view(6), torch.tensor([0, 1, 0.299, 0.587, 0.114, 0.6]))


@pytest.mark.parametrize("size", [(28, 28), (31, 20), (17, 17)], ids=str)
def test_politically_correct_is_the_papers_network(size: tuple[int, int]) -> None:
    network = build("politically_correct", 3, size)
    x = politically_correct.preprocess(random_images(2, *size))
    state = network.state_dict()
    assert state["stem.0.weight"].shape == (256, 1, 9, 9)
    height, width = ((side - 8 - 9) // 2 + 1 for side in size)
    assert state["classes.weight"].shape == (32 * height * width, 3, 8, 16)
    features = conv2d(x, state["stem.0.weight"], state["stem.0.bias"]).relu()
    features = conv2d(features, state["primary.conv.weight"], state["primary.conv.bias"], stride=2)
    capsules = [features[:, 8 * t : 8 * t + 8, h, w] for t in range(32) for h in range(height) for w in range(width)]
    u = functional.squash(torch.stack(capsules, 1))
    with torch.no_grad():
        v = network(x)
    torch.testing.assert_close(v, functional.dense_capsules(u, state["classes.weight"]), rtol=1e-4, atol=1e-6)


def test_politically_correct_refuses_16x16() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 17x17, got 17x16"):
        politically_correct.Network(3, (17, 16))


def test_politically_correct_adds_the_reconstruction_to_the_loss() -> None:
    network = build("politically_correct", 3, (17, 17))
    assert isinstance(network, politically_correct.Network)
    x = politically_correct.preprocess(random_images(2, 17, 17))
    target, v = torch.eye(3)[:2], torch.zeros(2, 3, 16)
    with torch.no_grad():
        image = network.decoder(v, target)
        loss = politically_correct.loss(network, x, v, target)
    torch.testing.assert_close(loss, 0.9**2 + 0.392 * (image - x).square().mean())


def test_politically_correct_overfits_eight_images() -> None:
    network = build("politically_correct", 3, (20, 20))
    x = politically_correct.preprocess(random_images(8, 20, 20))
    labels = torch.arange(8) % 3
    target = one_hot(labels, 3).float()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(16):
        loss = politically_correct.loss(network, x, network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert torch.equal(network(x).norm(dim=2).argmax(1), labels)
