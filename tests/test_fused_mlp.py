"""The MLP with norm and activation in its products, interpreted, beside its formula."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.gpu_checks import ProductWatch, document_surprise
from tests.support import CPU, interpreted, random_model, random_tokens, stream_of, tiny


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few rows and short sums, so that small tensors have several."""
    for name, (_, columns, _, stages) in t.MLP_TILES.items():
        monkeypatch.setitem(t.MLP_TILES, name, (16, columns, 16, stages))


def random_case(rows: int, width: int, hidden: int) -> list[torch.Tensor]:
    """fused_mlp()'s arguments, and a gradient of what it returns, float64."""
    torch.manual_seed(rows)
    shapes = (rows, width), (rows,), (hidden, width), (width, hidden), (rows, width)
    x, factor, up, down, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, factor.abs() + 0.1, up, down, grad]


def formula(x, factor, up, down):
    return F.leaky_relu((factor.unsqueeze(1) * x) @ up.mT, 0.5).square() @ down.mT


def fused(*arguments):
    return t.fused_mlp(*arguments)[0]


def outcomes(function, case: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The result and the gradients of all arguments, computed in this type."""
    leaves = [x.to(dtype).requires_grad_() for x in case[:4]]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, case[4].to(dtype))]


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "hidden"),
    [(32, 32, 256), (45, 40, 512)],  # whole tiles; a rest of rows and of the sum
)
def test_result_and_gradients(rows, width, hidden, compiled):
    case = random_case(rows, width, hidden)
    function = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    wanted = outcomes(formula, case, torch.float64)
    for x, y in zip(wanted, outcomes(function, case, torch.float32), strict=True):
        assert (x - y.double()).norm() < 1e-5 * x.norm()


@interpreted
def test_weights_that_stay_get_no_gradient_and_the_input_gets_its_own():
    x, factor, up, down, grad = (y.float() for y in random_case(32, 32, 256))
    wanted = outcomes(fused, [x, factor, up, down, grad], torch.float32)[1:3]
    x.requires_grad_()
    factor.requires_grad_()
    found = torch.autograd.grad(fused(x, factor, up, down), [x, factor], grad)
    assert all(map(torch.equal, found, wanted))
    with torch.no_grad():
        saved = (x, factor, up, down, *t.fused_mlp(x, factor, up, down)[1:])
        context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True, True, False, False))
        found = t.fused_mlp_autograd(context, [grad])
    assert found[2:] == (None, None)
    assert all(map(torch.equal, found[:2], wanted))


@interpreted
def test_one_bit_a_number_is_kept_of_the_product():
    """Which is all that backward needs beside the activation: 0 has a slope of 0 on either side."""
    x, factor, up, down, _ = (y.float() for y in random_case(20, 16, 256))
    _, active, signs = t.fused_mlp(x, factor, up, down)
    product = x @ up.mT
    bits = signs.view(20, 2, 1, 16) >> torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1)
    assert torch.equal((bits & 1).bool().reshape(20, 256), product < 0)
    root = factor.unsqueeze(1) * torch.where(product < 0, -product / 2, product)
    assert torch.allclose(active.sqrt(), root, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "hidden", "fuses"),
    [(90, 2048, True), (90, 2000, False), (80, 2048, False), (100, 2048, False)],
)
def test_only_whole_tiles_on_an_h100_or_h200_are_fused(monkeypatch, capability, hidden, fuses):
    if t.triton is None:
        pytest.skip("needs triton")
    monkeypatch.setattr(t, "kernel_limits", lambda device: (capability, 232_448))
    assert t.can_fuse_mlp(512, hidden, torch.device("cuda")) == fuses
    assert not t.can_fuse_mlp(512, hidden, CPU)


def test_the_formula_is_taken_without_gradients_and_outside_bfloat16(monkeypatch):
    """For GPTQ's Hessians are of what the matrices are given."""
    monkeypatch.setattr(t, "can_fuse_mlp", lambda *sizes: True)
    mlp = t.MLP(tiny(), CPU)
    taken = []
    for name in ("by_formula", "fused"):
        monkeypatch.setattr(mlp, name, lambda *rest, name=name: taken.append(name))
    x = torch.zeros(1, 2, tiny().model_dim)
    mlp(x)
    with torch.no_grad():
        mlp(x.bfloat16())
    mlp(x.bfloat16())
    assert taken == ["by_formula", "by_formula", "fused"]


@interpreted
def test_a_model_with_the_kernels_computes_the_same(monkeypatch):
    """Loss and every gradient of its training, deeper layers' smaller inputs included."""
    settings = tiny(mlp_mult=8, ln_scale=True, scan_backend="chunked")
    model = random_model(settings)
    tokens, targets = torch.randint(0, settings.vocab_size, (2, 2, settings.train_seq_len))
    launched = []
    launch = t.launch_product
    monkeypatch.setattr(
        t, "launch_product", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest))
    )

    def found(forward) -> list[torch.Tensor]:
        hidden = forward(tokens, model.order(False))
        loss = model.nats(hidden, targets).mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = found(model)
    assert not launched
    monkeypatch.setattr(t.MLP, "forward", t.MLP.fused)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # as a run wants it
    for x, y in zip(plain, found(compiled), strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-9
    assert len(launched) == 2 * settings.num_layers


@interpreted
def test_documents_that_adapt_ask_for_no_gradients_of_the_weights(monkeypatch):
    """Counted by products that have their shape, of which training has two for each layer."""
    monkeypatch.setattr(t.MLP, "forward", t.MLP.fused)
    sizes = {"mlp_mult": 8, "train_seq_len": 64, "ttt_lora_piece": 32, "ttt_lora_slots": 2}
    settings = tiny(eval_mode="documents", scan_backend="chunked", **sizes)
    model = random_model(settings)
    with ProductWatch(model) as scored:
        document_surprise(model, stream_of([70, 40]), ttt_enabled=True)
    assert scored.backwards > 0
    assert scored.of_weights == 0
    tokens = random_tokens(2, 25)
    with ProductWatch(model) as trained:
        model.loss(tokens[:, :-1], tokens[:, 1:], model.order(False)).backward()
    assert trained.backwards == settings.num_layers
    assert trained.of_weights == 2 * settings.num_layers
