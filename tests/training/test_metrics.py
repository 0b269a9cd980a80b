from __future__ import annotations

import math

import pytest
import torch

from training.metrics import RunningSums, confusion

# Five images, three classes, threshold 0.5. One logo each on images 0 and 1, two on image 2, none
# on images 3 and 4.
TARGET = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]).float()
SCORES = torch.tensor(
    [
        [0.9, 0.2, 0.6],  # right; TP class 0, FP class 2
        [0.4, 0.3, 0.1],  # taken for class 0; FN class 1
        [0.8, 0.5, 0.7],  # TP, TP; 0.5 is not above the threshold
        [0.1, 0.2, 0.3],  # rightly empty
        [0.1, 0.6, 0.3],  # FP class 1
    ]
)


def counted(*parts: slice) -> RunningSums:
    sums = RunningSums(0.5, torch.device("cpu"))
    for part in parts:
        sums.add(torch.tensor(2.0), SCORES[part], TARGET[part])
    return sums


def test_by_hand() -> None:
    found = counted(slice(None)).metrics()
    assert found.images == 5
    assert found.loss == 2
    assert found.top1 == 1 / 2
    assert found.f1 == 2 * 3 / (2 * 3 + 2 + 1)
    assert found.no_logo == 1 / 2


def test_batches_add_up_to_the_whole_and_survive_a_round_trip() -> None:
    parts = counted(slice(0, 2), slice(2, 5))
    assert parts.values() == counted(slice(None)).values()
    again = RunningSums(0.5, torch.device("cpu"), counted(slice(0, 2)).values())
    again.add(torch.tensor(2.0), SCORES[2:], TARGET[2:])
    assert again.values() == parts.values()


def test_the_loss_is_a_mean_over_images_not_over_batches() -> None:
    sums = RunningSums(0.5, torch.device("cpu"))
    sums.add(torch.tensor(1.0), SCORES[:4], TARGET[:4])
    sums.add(torch.tensor(6.0), SCORES[4:], TARGET[4:])
    assert sums.metrics().loss == 2


def test_nothing_to_count_is_nan_and_ranks_last() -> None:
    empty = counted(slice(3, 4)).metrics()
    assert math.isnan(empty.top1)
    assert math.isnan(empty.f1)
    assert empty.no_logo == 1
    assert math.isnan(counted(slice(0, 2)).metrics().no_logo)
    assert empty.rank < counted(slice(1, 2)).metrics().rank


def test_rank_is_top1_first_and_f1_between_equals() -> None:
    good, poor = counted(slice(0, 1)).metrics(), counted(slice(1, 2)).metrics()
    assert good.rank > poor.rank
    # Both have top-1 1; the second has no false positive.
    clean = RunningSums(0.7, torch.device("cpu"))
    clean.add(torch.tensor(0.0), SCORES[:1], TARGET[:1])
    assert clean.metrics().rank > good.rank


def test_confusion_counts_single_logo_images_only() -> None:
    table = confusion(SCORES, TARGET)
    assert table.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("score", [0.5, 0.500001])
def test_present_means_longer_than_the_threshold(score: float) -> None:
    sums = RunningSums(0.5, torch.device("cpu"))
    sums.add(torch.tensor(0.0), torch.tensor([[score, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert sums.metrics().f1 == float(score > 0.5)
