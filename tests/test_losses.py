"""MarginLoss and Decoder against hand-computed values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import caps_kernels as ck


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def of_lengths(*rows: list[float]) -> Tensor:
    """Capsules [B, J, 2] of given lengths, in the direction (3, 4) / 5."""
    return torch.tensor(rows)[..., None] * torch.tensor([0.6, 0.8])


def test_margin_loss_by_hand() -> None:
    v = of_lengths([0.5, 0.3, 0.0], [0.95, 0.05, 0.6])
    # Sample 0, class 0: (0.9 - 0.5)² + 0.5 (0.3 - 0.1)² + 0 = 0.16 + 0.02.
    # Sample 1, class 2: 0.5 (0.95 - 0.1)² + 0 + (0.9 - 0.6)² = 0.36125 + 0.09.
    loss = ck.MarginLoss()(v, torch.tensor([0, 2]))
    torch.testing.assert_close(loss, torch.tensor((0.18 + 0.45125) / 2))


def test_margin_loss_with_other_margins_by_hand() -> None:
    v = of_lengths([0.5, 0.3])
    # Class 1: 0.25 (0.5 - 0.2)² + (0.8 - 0.3)².
    loss = ck.MarginLoss(m_plus=0.8, m_minus=0.2, lambda_=0.25)(v, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(0.2725))


def test_indices_and_presences_give_the_same_loss() -> None:
    v, target = torch.randn(5, 4, 3), torch.tensor([3, 0, 1, 1, 2])
    one_hot = nn.functional.one_hot(target, 4)
    loss = ck.MarginLoss()(v, target)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.testing.assert_close(ck.MarginLoss()(v, one_hot.to(dtype)), loss, check_dtype=False)


def test_several_classes_none_and_a_share_of_one() -> None:
    v = of_lengths([0.5, 0.3, 0.7])
    several = ck.MarginLoss()(v, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(several, torch.tensor(0.16 + 0.02 + 0.04))
    none = ck.MarginLoss()(v, torch.zeros(1, 3))
    torch.testing.assert_close(none, torch.tensor(0.5 * (0.16 + 0.04 + 0.36)))
    share = ck.MarginLoss()(v, torch.tensor([[0.25, 0.0, 0.0]]))
    torch.testing.assert_close(share, torch.tensor(0.25 * 0.16 + 0.75 * 0.08 + 0.02 + 0.18))


def test_the_gradient_of_a_zero_capsule_is_zero_and_of_others_right() -> None:
    v = torch.tensor([[[0.0, 0.0], [0.3, 0.4]]], requires_grad=True)
    ck.MarginLoss()(v, torch.tensor([0])).backward()
    # d/dv of 0.5 (|v| - 0.1)² is (|v| - 0.1) v / |v|, here 0.4 (0.6, 0.8).
    torch.testing.assert_close(v.grad, torch.tensor([[[0.0, 0.0], [0.24, 0.32]]]))


def test_margin_loss_passes_gradcheck() -> None:
    v = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    present = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ck.MarginLoss()(0.2 * t, present), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_margin_loss_of_16_bit_capsules_is_float32(dtype: torch.dtype) -> None:
    v, target = torch.randn(64, 10, 16), torch.arange(64) % 10
    rounded = v.to(dtype)
    loss = ck.MarginLoss()(rounded, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ck.MarginLoss()(rounded.float(), target))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ck.MarginLoss()(rounded, target), loss)


BAD_TARGETS: list[tuple[Tensor, type[Exception], str]] = [
    (torch.tensor([0, 3]), ValueError, "target must hold class indices from 0 to 2, got 0 to 3"),
    (torch.tensor([-1, 0]), ValueError, "target must hold class indices from 0 to 2, got -1 to 0"),
    (torch.tensor([0]), ValueError, r"target must have shape \[2\], got \[1\]"),
    (torch.zeros(2, 3, dtype=torch.long), ValueError, r"target must have shape \[2\], got \[2, 3\]"),
    (torch.zeros(2), ValueError, r"target must have shape \[2, 3\], got \[2\]"),
    (torch.zeros(1, 3), ValueError, r"target must have shape \[2, 3\], got \[1, 3\]"),
    (torch.zeros(2, dtype=torch.int32), TypeError, "target must be class indices .* got torch.int32"),
    (torch.zeros(2, 3, dtype=torch.bool), TypeError, "target must be class indices .* got torch.bool"),
]


@pytest.mark.parametrize(("target", "exception", "message"), BAD_TARGETS)
def test_bad_targets_are_refused(target: Tensor, exception: type[Exception], message: str) -> None:
    v = torch.zeros(2, 3, 4)
    with pytest.raises(exception, match=message):
        ck.MarginLoss()(v, target)
    with pytest.raises(exception, match=message):
        ck.Decoder(3, 4, (1, 2, 2))(v, target)


def test_v_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v must have shape \[B, J, E\]"):
        ck.MarginLoss()(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_the_decoder_is_three_layers_over_the_flat_masked_capsules() -> None:
    decoder = ck.Decoder(2, 3, (3, 4, 5), hidden=(6, 7))
    v = torch.randn(2, 2, 3)
    flat = torch.zeros(2, 6)
    flat[0, 3:], flat[1, :3] = v[0, 1], v[1, 0]
    first, second, third = (m for m in decoder.layers if isinstance(m, nn.Linear))
    wanted = third(second(first(flat).relu()).relu()).sigmoid()
    assert (first.out_features, second.out_features) == (6, 7)
    torch.testing.assert_close(decoder(v, torch.tensor([1, 0])), wanted.view(2, 3, 4, 5))


def decoder_of(autocast: bool) -> Any:
    decoder = ck.Decoder(4, 3, (1, 5, 5), hidden=(64, 64))

    def run(v: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image: Tensor = decoder(v.bfloat16() if autocast else v, target)
        assert image.dtype == (torch.bfloat16 if autocast else torch.float32)
        return image

    return run


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_only_the_target_capsules_influence_the_image(autocast: bool) -> None:
    run, v = decoder_of(autocast), torch.randn(2, 4, 3)
    several = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for target, masked in ((torch.tensor([2, 0]), [(0, 2), (1, 0)]), (several, [(0, 1), (0, 3)])):
        image = run(v, target)
        others = torch.full_like(v, 7.0)
        for index in masked:
            others[index] = v[index]
        assert torch.equal(run(others, target), image)
        others[masked[0]] += 5
        assert not torch.equal(run(others, target)[0], image[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_without_a_target_the_longest_capsule_is_taken(autocast: bool) -> None:
    run = decoder_of(autocast)
    v = torch.zeros(2, 4, 3)
    v[0, 3, 1], v[0, 1, 2], v[1, 0, 0], v[1, 2] = -2.0, 1.5, 1.0, 0.7
    assert torch.equal(run(v), run(v, torch.tensor([3, 2])))
    assert not torch.equal(run(v), run(v, torch.tensor([1, 0])))


def test_the_decoders_loss_is_the_papers_at_28x28_and_a_mean_elsewhere() -> None:
    image, reconstruction = torch.rand(5, 1, 28, 28), torch.rand(5, 1, 28, 28)
    per_image = 0.0005 * (image - reconstruction).square().sum((1, 2, 3))
    decoder = ck.Decoder(2, 3, (1, 28, 28))
    torch.testing.assert_close(decoder.loss(reconstruction, image), per_image.mean())
    large = ck.Decoder(2, 3, (3, 9, 11))
    loss = large.loss(torch.full((2, 3, 9, 11), 0.25), torch.full((2, 3, 9, 11), 0.75))
    torch.testing.assert_close(loss, torch.tensor(0.392 * 0.25))
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.loss(reconstruction.bfloat16(), image)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, per_image.mean(), rtol=1e-2, atol=0)


def test_the_decoder_refuses_what_would_be_broadcast_or_does_not_fit() -> None:
    decoder = ck.Decoder(2, 3, (1, 4, 5))
    with pytest.raises(ValueError, match=r"images must have shape \[2, 1, 4, 5\], got \[2, 4, 5\]"):
        decoder.loss(decoder(torch.zeros(2, 2, 3)), torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"v must have shape \[B, 2, 3\], got \[2, 3, 2\]"):
        decoder(torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match="out_capsules must be at least 1, got 0"):
        ck.Decoder(0, 3, (1, 4, 5))
    with pytest.raises(ValueError, match="image_shape must be at least 1, got 0"):
        ck.Decoder(2, 3, (1, 0, 5))
    with pytest.raises(ValueError, match=r"image_shape must be \(channels, height, width\), got \(4, 5\)"):
        ck.Decoder(2, 3, (4, 5))  # type: ignore[arg-type]
