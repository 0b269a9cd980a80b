from __future__ import annotations

import multiprocessing

import pytest
import torch

from logos.splits import DataError
from tests.training.tiny import TinySplit
from training import batches


class Breaking(TinySplit):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 3:
            raise DataError("a.jpg: is gone")
        return super().__getitem__(index)


def test_the_order_is_a_permutation_of_seed_and_epoch() -> None:
    orders = [batches.order(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == batches.order(50, 1, 1)


def test_the_order_of_all_versions() -> None:
    # Resuming with another version of NumPy must not shuffle anew.
    assert batches.order(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]


def test_count() -> None:
    assert batches.count(10, 4, None) == 3
    assert batches.count(8, 4, None) == 2
    assert batches.count(8, 4, 1) == 1
    assert batches.count(8, 4, 9) == 2


def test_learning_rate_by_hand() -> None:
    # Of 40 steps 5 %, two, warm up; the cosine is half-way 19 steps later.
    rates = [batches.learning_rate(step, 40, 1.0) for step in range(40)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[21] == pytest.approx(0.5)
    assert rates[39] == pytest.approx(0.00171, abs=1e-5)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_of_the_shortest_runs(total: int) -> None:
    assert all(0 < batches.learning_rate(step, total, 0.1) <= 0.1 for step in range(total))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_draw_no_random_numbers(workers: int) -> None:
    split = TinySplit(0, 10)
    before = torch.get_rng_state()
    cpu = torch.device("cpu")
    found = list(batches.iterate(split, [3, 1, 4, 1, 5], 2, workers, cpu))
    assert [len(images) for images, _ in found] == [2, 2, 1]
    targets = torch.cat([targets for _, targets in found])
    assert torch.equal(targets, torch.from_numpy(split.targets[[3, 1, 4, 1, 5]]).float())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_gone_is_told_without_a_traceback(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(batches.iterate(Breaking(0, 10), range(5), 2, workers, torch.device("cpu")))
    assert str(caught.value) == "a.jpg: is gone"
    assert not multiprocessing.active_children()
