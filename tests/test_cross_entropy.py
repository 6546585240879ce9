"""The fused softcapped cross-entropy, in Triton's interpreter, against the same in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_fused_scan import interpreted

import train_gpt as t


def case(vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Hidden states (37, 32), output matrix, targets and the gradient of the nats."""
    hidden, weight = torch.randn(37, 32), torch.randn(vocabulary, 32)
    return hidden, weight, torch.randint(0, vocabulary, (37,)), torch.randn(37)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> torch.Tensor:
    logits = hidden @ weight.mT
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets, reduction="none")


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> torch.Tensor:
    return t.fused_cross_entropy(hidden, weight, targets, cap, True)[0]


def assert_equal_in_float64(exact, fused, compiled: bool, hidden, weight, grad, *others) -> None:
    """Nats and gradients of exact(hidden, weight, *others) in float64 and of fused() in float32, perhaps compiled."""
    function = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    outcomes = []
    for nats, dtype in ((exact, torch.float64), (function, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        y = nats(*leaves, *others)
        outcomes.append((y, *torch.autograd.grad(y, leaves, grad.to(dtype))))
    for wanted, found in zip(*outcomes):
        assert (found.double() - wanted).norm() < 1e-5 * wanted.norm()


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "cap"), [(1000, 30.0), (1024, 15.0), (17, 3.0), (1000, 60.0)]
)
def test_nats_and_gradients(vocabulary, cap, compiled):
    hidden, weight, targets, grad = case(vocabulary)
    assert_equal_in_float64(exact, fused, compiled, hidden, weight, grad, targets, cap)


@interpreted
def test_without_slopes_nothing_is_stored_and_nats_are_the_same():
    *given, _ = case(100)
    nats, slopes = t.fused_cross_entropy(*given, 30.0, False)
    assert torch.equal(nats, fused(*given, 30.0)) and slopes.numel() == 0
