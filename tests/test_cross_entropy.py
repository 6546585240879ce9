"""The fused softcapped cross-entropy, in Triton's interpreter, against the same in float64."""

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import assert_equal_in_float64, cross_entropy_case, interpreted


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> torch.Tensor:
    logits = hidden @ weight.mT
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets, reduction="none")


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> torch.Tensor:
    return t.fused_cross_entropy(hidden, weight, targets, cap, True, [])[0]


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "cap"), [(1000, 30.0), (1024, 15.0), (17, 3.0), (1000, 60.0)]
)
def test_nats_and_gradients(vocabulary, cap, compiled):
    hidden, weight, targets, grad = cross_entropy_case(vocabulary)
    assert_equal_in_float64(exact, fused, compiled, hidden, weight, grad, targets, cap)


@interpreted
def test_a_matrix_that_stays_gets_no_gradient_and_hidden_states_get_theirs():
    hidden, weight, targets, grad = cross_entropy_case(100)
    found = []
    for trained in (False, True):
        leaf = hidden.clone().requires_grad_()
        matrix = weight.clone().requires_grad_(trained)
        nats = fused(leaf, matrix, targets, 30.0)
        nats.backward(grad)
        assert (matrix.grad is not None) == trained
        found.append(leaf.grad)
    assert torch.equal(*found)


@interpreted
def test_without_slopes_nothing_is_stored_and_nats_are_the_same():
    *given, _ = cross_entropy_case(100)
    nats, slopes = t.fused_cross_entropy(*given, 30.0, False, [])
    assert torch.equal(nats, fused(*given, 30.0)) and slopes.numel() == 0
