"""The idea of an MLP with norm and activation in its products, interpreted, beside its formula."""

import pytest
import torch

import train_gpt as t
from tests.support import CPU, interpreted, random_model, tiny
from tools.ideas import fused_mlp as idea


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few rows and short sums, so that small tensors have several."""
    for name, tile in idea.TILES.items():
        monkeypatch.setitem(idea.TILES, name, tile._replace(M=16, STEP=16))


def random_case(rows: int, width: int, hidden: int) -> list[torch.Tensor]:
    """Arguments of both, and a gradient of what they return, float64."""
    torch.manual_seed(rows)
    shapes = (rows, width), (rows,), (hidden, width), (width, hidden), (rows, width)
    x, factor, up, down, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, factor.abs() + 0.1, up, down, grad]


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
    fused = idea.fused_mlp
    function = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    wanted = outcomes(idea.mlp_by_formula, case, torch.float64)
    for x, y in zip(wanted, outcomes(function, case, torch.float32), strict=True):
        assert (x - y.double()).norm() < 1e-5 * x.norm()


@interpreted
def test_one_bit_a_number_is_kept_of_the_product():
    """Which is all that backward needs beside the activation: 0 has a slope of 0 on either side."""
    x, factor, up, down, _ = (y.float() for y in random_case(20, 16, 256))
    _, active, signs = idea.mlp_parts(x, factor, up, down)
    product = x @ up.mT
    bits = signs.view(20, 2, 1, 16) >> torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1)
    assert torch.equal((bits & 1).bool().reshape(20, 256), product < 0)
    root = factor.unsqueeze(1) * torch.where(product < 0, -product / 2, product)
    assert torch.allclose(active.sqrt(), root, rtol=1e-5, atol=1e-6)


def test_a_width_that_has_no_whole_tiles_is_one_line():
    if t.triton is None:
        pytest.skip("needs triton")
    with pytest.raises(t.UserError, match="an MLP of 96 is no multiple of 256 wide"):
        idea.mlp_parts(*(y.float() for y in random_case(16, 16, 96)[:4]))


@interpreted
def test_a_model_with_the_idea_computes_the_same(monkeypatch):
    """Loss and every gradient of its training, deeper layers' smaller inputs included; and the
    parameters' names, by which an artifact keeps them."""
    settings = tiny(mlp_mult=8, ln_scale=True, scan_backend="chunked")
    plain = random_model(settings)
    monkeypatch.setattr(t, "Block", t.Block)
    idea.install(t)
    fused = t.Model(settings, CPU, "chunked")
    fused.load_state_dict(plain.state_dict())
    launched = []
    launch = idea.launch_product
    monkeypatch.setattr(
        idea,
        "launch_product",
        lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest)),
    )
    tokens, targets = torch.randint(0, settings.vocab_size, (2, 2, settings.train_seq_len))
    found = []
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")  # as a run wants it
    for model, forward in ((plain, plain), (fused, compiled)):
        hidden = forward(tokens, model.order(False))
        loss = model.nats(hidden, targets).mean()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(launched) == 2 * settings.num_layers
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-9
    with torch.no_grad():
        assert torch.equal(fused(tokens, model.order(False)), plain(tokens, model.order(False)))
