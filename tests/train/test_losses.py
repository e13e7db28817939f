"""Losses and metrics over what is known, against numpy and torch on the known part."""

from __future__ import annotations

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torchmetrics import Accuracy, MeanAbsoluteError, MeanSquaredError

import rasteret_ml as rm
from rasteret_ml.errors import UsageError

GENERATOR = torch.Generator().manual_seed(0)


def scores(*shape: int) -> torch.Tensor:
    """Predictions that learn."""
    return torch.randn(shape, generator=GENERATOR, requires_grad=True)


def classes(*shape: int, count: int = 3) -> torch.Tensor:
    """Labels, a third of them unknown."""
    labels = torch.randint(0, count, shape, generator=GENERATOR)
    return torch.where(torch.rand(shape, generator=GENERATOR) < 0.3, -100, labels)


WEIGHT = torch.tensor([1.0, 5.0, 0.2])


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_cross_entropy_is_torchs(weight):
    """With class weights as well, value and gradient."""
    prediction, target = scores(2, 3, 4, 5), classes(2, 4, 5)
    loss = rm.MaskedLoss(nn.CrossEntropyLoss(weight=weight, reduction="none"))(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = nn.CrossEntropyLoss(weight=weight)(prediction, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, prediction)[0])


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_regression_leaves_nan_out(loss, reduction):
    """And takes -100 for a value, where there is no class to ignore."""
    prediction = scores(2, 1, 4, 5)
    target = torch.randn(2, 1, 4, 5, generator=GENERATOR)
    target[0, :, :2], target[1, 0, 0, 0] = float("nan"), -100
    known = ~target.isnan()
    found = rm.MaskedLoss(loss(reduction=reduction), ignore_index=None)(prediction, target)
    torch.testing.assert_close(found, loss()(prediction[known], target[known]))


def test_binary_labels_are_left_out_too():
    """Torch's BCE takes -100 for a label."""
    prediction, target = scores(2, 4, 5), classes(2, 4, 5, count=2)
    known = target != -100
    found = rm.MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"))(prediction, target.float())
    torch.testing.assert_close(found, nn.BCEWithLogitsLoss()(prediction[known], target[known].float()))


def test_losses_over_regions_see_what_is_known():
    """Jaccard, which smp cannot compute with -100 among the classes: against numpy."""
    prediction, target = scores(2, 3, 4, 5), classes(2, 4, 5)
    found = rm.MaskedLoss(smp.losses.JaccardLoss("multiclass"))(prediction, target)
    known = (target != -100).numpy()
    shares = prediction.detach().softmax(1).numpy().transpose(0, 2, 3, 1)[known]
    truth = np.eye(3)[target.numpy()[known]]
    both = (shares * truth).sum(0)
    jaccard = both / (shares.sum(0) + truth.sum(0) - both)
    assert float(found.detach()) == pytest.approx(float((1 - jaccard).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(), smp.losses.JaccardLoss("multiclass")]
)
def test_nothing_known_is_nothing_learnt(loss):
    """Zero with a gradient of zeros, even from NaN."""
    prediction = scores(1, 3, 2, 2)
    out = prediction * torch.tensor(float("nan"))
    found = rm.MaskedLoss(loss)(out, torch.full((1, 2, 2), -100))
    found.backward()
    assert float(found.detach()) == 0
    one = scores(2, 3)
    rm.MaskedLoss(nn.CrossEntropyLoss(reduction="none"))(one, torch.tensor([1, -100])).backward()
    assert one.grad is not None
    assert (one.grad[1] == 0).all()
    assert (one.grad[0] != 0).all()


def test_unknown_places_get_no_gradient_even_if_they_are_nan():
    """NaN times 0 would be NaN."""
    prediction = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    target = torch.tensor([[3.0, float("nan")]])
    rm.MaskedLoss(nn.MSELoss(reduction="none"), ignore_index=None)(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[-4, 0]]


def test_metrics_see_what_is_known():
    """Over batches, one of which knows nothing, against numpy; and a value for each batch."""
    metrics = rm.MaskedMetrics({"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}, None, prefix="val_")
    errors = []
    for share in (0.3, 1.0, 0.0):
        preds, target = torch.randn(2, 1, 5, 5, generator=GENERATOR), torch.randn(2, 1, 5, 5, generator=GENERATOR)
        target[torch.rand(target.shape, generator=GENERATOR) < share] = float("nan")
        errors.append((preds - target)[~target.isnan()].numpy())
        now = metrics(preds, target)
        if len(errors[-1]):
            assert float(now["val_mse"]) == pytest.approx(float((errors[-1] ** 2).mean()), rel=1e-5)
    every = np.concatenate(errors)
    assert float(metrics.compute()["val_mse"]) == pytest.approx(float((every**2).mean()), rel=1e-5)
    assert float(metrics.compute()["val_mae"]) == pytest.approx(float(np.abs(every).mean()), rel=1e-5)


def test_metrics_of_samples_and_of_pixels():
    """Rows of labels, and classes of pixels along axis 1."""
    rows = rm.MaskedMetrics([Accuracy(task="multiclass", num_classes=2, average="micro")])
    rows.update(torch.tensor([[2.0, 1], [1, 2], [5, 0]]), torch.tensor([0, 0, -100]))
    assert float(rows.compute()["MulticlassAccuracy"]) == 0.5
    pixels = rm.MaskedMetrics([Accuracy(task="multiclass", num_classes=3, average="micro")])
    prediction, target = scores(2, 3, 4, 5).detach(), classes(2, 4, 5)
    pixels.update(prediction, target)
    known = target != -100
    expected = (prediction.argmax(1) == target)[known].float().mean()
    assert float(pixels.compute()["MulticlassAccuracy"]) == pytest.approx(float(expected))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss])
def test_one_channel_of_values_is_compared_with_its_own_sample(loss, reduction):
    """`[B, 1, H, W]` against `[B, H, W]`: torch would spread one over the other."""
    perfect = torch.arange(8.0).view(2, 2, 2)
    masked = rm.MaskedLoss(loss(reduction=reduction), None)
    assert masked(perfect[:, None], perfect) == 0
    assert masked(perfect[:, 0, 0, None], perfect[:, 0, 0]) == 0
    with pytest.raises(UsageError, match=r"must have the shape of labels \[2, 2, 2\], got \[2, 3, 2, 2\]"):
        masked(perfect[:, None].expand(2, 3, 2, 2), perfect)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_classes_without_weight_alone_teach_nothing(reduction):
    """Torch's mean of them is 0 / 0."""
    loss = rm.MaskedLoss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0, 1]), reduction=reduction))
    assert loss(torch.randn(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64)) == 0
