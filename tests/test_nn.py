"""The modules: values against loops and hand computation, initialisation, training, saving, export."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import caps_kernels as ck
from caps_kernels import functional

pytestmark = pytest.mark.filterwarnings("ignore::caps_kernels.backends.FallbackWarning")


@pytest.fixture(autouse=True)
def seeded_and_in_one_thread() -> Iterator[None]:
    """Two threads that share a busy core wait for each other ten times longer than tensors this small take."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def squashed(*shape: int, seed: int = 0) -> Tensor:
    """Lower capsules: squashed normal vectors."""
    generator = torch.Generator().manual_seed(seed)
    return functional.squash(torch.randn(shape, generator=generator))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"iterations": 2, "positions": 3, "bias": True, "leaky": True, "routing_grad": "last", "backend": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "all"])
def test_the_layer_passes_its_options_on(options: dict[str, Any]) -> None:
    layer = ck.CapsuleLayer(12, 4, 3, 5, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    u = squashed(2, 12, 4).requires_grad_()
    named = {key: value for key, value in options.items() if key != "bias"}
    v, coupling = layer(u, return_coupling=True)
    wanted, wanted_coupling = functional.dense_capsules(u, layer.weight, layer.bias, return_coupling=True, **named)
    assert torch.equal(v, wanted)
    assert torch.equal(layer(u), wanted)
    assert torch.equal(coupling, wanted_coupling)
    assert not coupling.requires_grad
    inputs = [u, *layer.parameters()]
    for got, want in zip(torch.autograd.grad(v.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True):
        assert torch.equal(got, want)


def test_weights_are_shared_over_positions() -> None:
    layer = ck.CapsuleLayer(12, 4, 3, 5, positions=6)
    assert layer.weight.shape == (2, 3, 4, 5)
    dense = ck.CapsuleLayer(12, 4, 3, 5)
    assert dense.weight.shape == (12, 3, 4, 5)
    with torch.no_grad():
        dense.weight.copy_(layer.weight.repeat_interleave(6, 0))
    u = squashed(2, 12, 4)
    torch.testing.assert_close(layer(u), dense(u))


def test_extra_repr_names_what_is_not_default() -> None:
    assert repr(ck.CapsuleLayer(12, 4, 3, 5)) == (
        "CapsuleLayer(in_capsules=12, in_dim=4, out_capsules=3, out_dim=5, iterations=3)"
    )
    assert repr(ck.CapsuleLayer(12, 4, 3, 5, **OPTIONS[1])) == (
        "CapsuleLayer(in_capsules=12, in_dim=4, out_capsules=3, out_dim=5, iterations=2, positions=3, bias=True, "
        "leaky=True, routing_grad='last', backend='reference')"
    )
    assert repr(ck.MarginLoss(0.8)) == "MarginLoss(m_plus=0.8, m_minus=0.1, lambda_=0.5)"


@pytest.mark.parametrize("name", ["in_capsules", "in_dim", "out_capsules", "out_dim", "iterations", "positions"])
def test_bad_sizes_are_refused_by_name(name: str) -> None:
    sizes: dict[str, Any] = {"in_capsules": 12, "in_dim": 4, "out_capsules": 3, "out_dim": 5}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ck.CapsuleLayer(**{**sizes, name: 0})
    for wrong in (2.0, True, "3"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {type(wrong).__name__}"):
            ck.CapsuleLayer(**{**sizes, name: wrong})


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="in_capsules must be a multiple of positions, 5, got 12"):
        ck.CapsuleLayer(12, 4, 3, 5, positions=5)
    with pytest.raises(ValueError, match="routing_grad must be 'full' or 'last', got 'none'"):
        ck.CapsuleLayer(12, 4, 3, 5, routing_grad="none")
    with pytest.raises(ValueError, match=r"backend must be None or one of .*, got 'gpu'"):
        ck.CapsuleLayer(12, 4, 3, 5, backend="gpu")
    for name in ("bias", "leaky"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            ck.CapsuleLayer(12, 4, 3, 5, **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("in_capsules", [32, 1152])
def test_lengths_start_between_0_05_and_0_9(in_capsules: int) -> None:
    for out_capsules, in_dim, out_dim in itertools.product((1, 10, 200), (4, 16), (8, 32)):
        if in_capsules * out_capsules * in_dim * out_dim > 3e6:
            continue
        u, lengths = squashed(4, in_capsules, in_dim), []
        for seed in range(6):
            torch.manual_seed(seed)
            layer = ck.CapsuleLayer(in_capsules, in_dim, out_capsules, out_dim)
            with torch.no_grad():
                lengths.append(layer(u).norm(dim=2).mean().item())
        assert 0.05 < sum(lengths) / 6 < 0.9, (out_capsules, in_dim, out_dim)


@pytest.mark.parametrize(("in_capsules", "out_capsules", "positions"), [(6, 2, 1), (576, 10, 1), (2048, 20, 256)])
def test_a_few_steps_reduce_the_loss_at_small_and_large_sizes(
    in_capsules: int, out_capsules: int, positions: int
) -> None:
    torch.manual_seed(0)
    layer = ck.CapsuleLayer(in_capsules, 8, out_capsules, 16, positions=positions, bias=True)
    criterion, u, target = ck.MarginLoss(), squashed(4, in_capsules, 8), torch.arange(4) % out_capsules
    optimizer = torch.optim.Adam(layer.parameters(), 0.05 * layer.weight.std().item())
    losses = []
    for _ in range(10):
        loss = criterion(layer(u), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "all"])
def test_state_dict_goes_through_a_file_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    layer, other = (ck.CapsuleLayer(12, 4, 3, 5, **options) for _ in range(2))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    u = squashed(2, 12, 4)
    assert not torch.equal(layer(u), other(u))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(layer(u), other(u))


def test_a_deep_copy_is_equal_and_independent() -> None:
    layer = ck.CapsuleLayer(12, 4, 3, 5, **OPTIONS[1])
    twin, u = copy.deepcopy(layer), squashed(2, 12, 4)
    assert torch.equal(layer(u), twin(u))
    with torch.no_grad():
        twin.weight.mul_(2)
    assert not torch.equal(layer(u), twin(u))


def test_dtype_and_device_reach_the_parameters() -> None:
    layer = ck.CapsuleLayer(6, 4, 3, 5, bias=True, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert layer(torch.empty(2, 6, 4, device="meta", dtype=torch.float64)).shape == (2, 3, 5)
    materialised = layer.to_empty(device="cpu")
    materialised.reset_parameters()
    assert materialised(squashed(2, 6, 4).double()).norm() > 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_batch(strict: bool) -> None:
    model = nn.Sequential(ck.PrimaryCapsules(3, 4, 8, kernel_size=3), ck.CapsuleLayer(36, 8, 5, 6, positions=9))
    x = torch.randn(4, 3, 5, 5)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict).module()
    for size in (2, 4, 7):
        x = torch.randn(size, 3, 5, 5)
        assert torch.equal(program(x), model(x))


def by_loop(features: Tensor, types: int, dim: int) -> Tensor:
    """Vectors of the feature map [B, T·dim, H, W], one at a time: samples, types, rows, columns."""
    batch, _, height, width = features.shape
    vectors = [
        torch.stack([features[b, t * dim + d, h, w] for d in range(dim)])
        for b, t, h, w in itertools.product(range(batch), range(types), range(height), range(width))
    ]
    return torch.stack(vectors).view(batch, types * height * width, dim)


@pytest.mark.parametrize("channels_last", [False, True])
def test_primary_capsules_come_type_by_type(channels_last: bool) -> None:
    torch.manual_seed(0)
    primary = ck.PrimaryCapsules(2, 3, 4, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 2, 7, 5)
    if channels_last:
        primary, x = primary.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    features = primary.conv(x)
    assert features.shape == (2, 12, 4, 3)
    wanted = functional.squash(by_loop(features, 3, 4))
    torch.testing.assert_close(primary(x), wanted)
    naive = functional.squash(features.reshape(2, -1, 4))
    assert naive.shape == wanted.shape
    assert not torch.allclose(naive, wanted)


def test_primary_capsules_and_shared_positions_agree_on_the_order() -> None:
    primary = ck.PrimaryCapsules(2, 3, 4, kernel_size=1)
    layer = ck.CapsuleLayer(3 * 6, 4, 2, 5, iterations=1, positions=6)
    x = torch.randn(1, 2, 2, 3)
    plain = layer(primary(x))
    moved = layer(primary(x.roll((1, 1), (2, 3))))
    torch.testing.assert_close(plain, moved)


def test_primary_capsules_refuse_what_is_no_batch_of_images() -> None:
    primary = ck.PrimaryCapsules(2, 3, 4, kernel_size=1)
    for shape in [(2, 12, 5), (2, 3, 5, 5), (1, 2, 5, 5, 1)]:
        with pytest.raises(ValueError, match=r"x must have shape \[B, 2, H, W\]"):
            primary(torch.zeros(shape))
    assert primary(torch.zeros(0, 2, 5, 5)).shape == (0, 75, 4)
    with pytest.raises(ValueError, match="capsule_dim must be at least 1, got 0"):
        ck.PrimaryCapsules(2, 3, 0, kernel_size=1)


class Tiny(nn.Module):
    """All modules in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = ck.PrimaryCapsules(1, 2, 4, kernel_size=3)
        self.classes = ck.CapsuleLayer(32, 4, 3, 6, positions=16, bias=True)
        self.decoder = ck.Decoder(3, 6, (1, 6, 6), hidden=(64, 64))
        self.margin = ck.MarginLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        v = self.classes(self.primary(x))
        loss: Tensor = self.margin(v, target) + self.decoder.loss(self.decoder(v, target), x)
        return loss


def test_all_modules_train_under_autocast() -> None:
    torch.manual_seed(0)
    network, x, target = Tiny(), torch.rand(4, 1, 6, 6), torch.tensor([0, 2, 1, 0])
    exact = network(x, target)
    wanted = torch.autograd.grad(exact, list(network.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        v = network.classes(network.primary(x))
        assert v.dtype == torch.bfloat16
        loss = network(x, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    for (name, parameter), want in zip(network.named_parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.cosine_similarity(parameter.grad.flatten(), want.flatten(), 0) > 0.95, name


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_distributed_data_parallel_gives_the_same_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x, target = Tiny(), torch.rand(4, 1, 6, 6), torch.tensor([0, 2, 1, 0])
    wanted = torch.autograd.grad(network(x, target), list(network.parameters()))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        DistributedDataParallel(network)(x, target).backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, want in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)
