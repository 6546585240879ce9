"""Training's products of 8-bit floats: interpreted in float32, where nothing is rounded, and what
rounding does, by the reference.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from reference import float8_products as reference
from tests.support import CPU, SOLO, Quiet, interpreted, random_model, random_tokens, tiny


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few rows and short sums, so that small tensors have several."""
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))


def random_case(rows: int, width: int, hidden: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Rows of several sizes, both matrices (float32) and a gradient of the result."""
    torch.manual_seed(rows)
    x, d_y = torch.randn(2, 1, rows, width) * torch.rand(2, 1, rows, 1).exp()
    up, down = torch.randn(hidden, width) / 30, torch.randn(width, hidden) / 50
    return [x.to(dtype), up, down, (1e-5 * d_y).to(dtype)]


def formula(x, up, down):
    """The MLP of a layer whose inputs are halved."""
    return F.leaky_relu(0.5 * t.norm(x) @ up.mT, 0.5).square() @ down.mT


def in_float8(x, up, down):
    """MLP.in_float8() with these matrices."""
    weights = {name: SimpleNamespace(weight=w) for name, w in (("up", up), ("down", down))}
    return t.MLP.in_float8(SimpleNamespace(**weights), x, 0.5)


def outcomes(function, case: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of x and of both matrices."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, case[3].to(y.dtype))]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found = found.detach().double()
    wanted = wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@contextlib.contextmanager
def deterministic():
    """PyTorch's deterministic algorithms, for a while."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_outcomes(case: list[torch.Tensor]) -> None:
    for wanted, found in zip(outcomes(formula, case), outcomes(in_float8, case), strict=True):
        assert relative_error(found, wanted) < 1e-5


@pytest.fixture
def guarded(monkeypatch):
    """Kernels get their tensors between bytes of 255, NaNs that have to stay; and where programs go
    from tile to tile, there are three.
    """
    usual = t.launch
    guard = 4096

    def launch(kernel, grid, named: dict, **options) -> None:
        buffers = {}  # by address: a tensor may come as it is and as tiles

        def inside(x: torch.Tensor) -> torch.Tensor:
            size = x.numel() * x.element_size()
            if x.data_ptr() not in buffers:
                around = torch.full((2 * guard + size,), 255, dtype=torch.uint8)
                buffers[x.data_ptr()] = x, around
            _, around = buffers[x.data_ptr()]
            assert x.is_contiguous()
            return around[guard:-guard].view(x.dtype).view(x.shape)

        def copied(x):
            if isinstance(x, torch.Tensor):
                return inside(x).copy_(x)
            if isinstance(x, t.TensorDescriptor):
                return dataclasses.replace(x, base=inside(x.base).copy_(x.base))
            return x

        guarded = {name: copied(x) for name, x in named.items()}
        if hasattr(named.get("S"), "PROGRAMS"):
            guarded["S"] = named["S"]._replace(PROGRAMS=3)
            grid = (3,)
        usual(kernel, grid, guarded, **options)
        for x, around in buffers.values():
            assert (around[:guard] == 255).all() and (around[-guard:] == 255).all()
            x.copy_(inside(x))

    monkeypatch.setattr(t, "launch", launch)


# Also a rest of rows; 1,792 are seven tiles of 256 and 14 of 128.
@interpreted
@pytest.mark.parametrize("sizes", [(32, 64, 256), (45, 192, 512), (45, 64, 1792)])
def test_unrounded_the_kernels_compute_the_formula(guarded, sizes):
    """In float32 nothing is rounded: all factors that scale and unscale are right. And no kernel
    reads or writes behind its tensors.
    """
    with deterministic():  # all memory is NaN until it is written
        check_outcomes(random_case(*sizes))


def test_unrounded_the_reference_computes_the_formula(monkeypatch):
    monkeypatch.setattr(t, "float8_mlp", reference.float8_mlp)
    check_outcomes(random_case(20, 48, 64))


def test_rounding_costs_some_percent_and_saturates_nothing(monkeypatch):
    """Of random numbers, as much as one rounds relatively: 2 to 3 % for each factor."""
    monkeypatch.setattr(t, "float8_mlp", reference.float8_mlp)
    case = random_case(256, 512, 512, torch.bfloat16)
    wanted = outcomes(formula, [x.float() for x in case])
    found = outcomes(in_float8, case)
    for name, x, y in zip(("y", "x", "up", "down"), found, wanted, strict=True):
        assert 0.01 < relative_error(x, y) < 0.07, name
    x, up, down, _ = case
    x8, factor = t.float8_norm(x[0])
    rounded, size = reference.rounded_weight(up, x.dtype)
    v = x8.float() @ rounded.mT / t.usual_product(512)
    assert 0.9 < v.square().mean().sqrt() < 1.1
    assert v.abs().max() < 20
    assert relative_error(rounded * size, up) < 0.03


@pytest.mark.parametrize("width", [32, 512, 768, 1024])
def test_no_row_saturates(width):
    """Not even one whose length is that of a single number; and a NaN is not hidden."""
    rows = torch.zeros(3, width, dtype=torch.bfloat16)
    rows[0, 3] = rows[2, 0] = 1e-6
    rows[2, 1] = float("nan")
    rounded, size = t.float8_gradient(rows)
    assert rounded.dtype == torch.float8_e4m3fn
    assert 112 * 0.7 < rounded.float()[0, 3] <= 448
    back = rounded.float() * size.unsqueeze(1)
    assert abs(back[0, 3] / 1e-6 - 1) < 0.08
    assert not back[1].any()
    assert back[2].isnan().any()
    x8, factor = t.float8_norm(1e8 * rows[:1])
    assert 0 < x8.float().abs().max() <= 448


def test_sizes_that_multiply_again_are_powers_of_two():
    x = torch.tensor([1e-18, 0.75, 1.0, 3e7])
    above = t.power_above(x)
    assert torch.equal(above.log2(), above.log2().round())
    assert ((x < above) & (above <= 2 * x)).all()


@interpreted
@pytest.mark.parametrize("rows", [32, 45])
def test_what_is_stored_transposed_is_what_other_products_read(monkeypatch, rows):
    """In one order of tokens, whoever transposes it."""
    x, up, down, d_y = random_case(rows, 64, 256)
    usual = t.scaled_product
    factors = []

    def watched(a8, b8, *others):
        factors.append((a8, b8))
        return usual(a8, b8, *others)

    monkeypatch.setattr(t, "scaled_product", watched)
    x8, factor = t.float8_norm(x[0])
    d_y8, size = t.float8_gradient(d_y[0])
    scale = t.turn_scale(size)
    _, *kept = t.float8_mlp(x[0], x8, factor, up, down)
    t.float8_mlp_backward(d_y8, x8, size, [scale / 4, scale], kept)
    (active8, _), (d_v8, _), (d_v, x_turned), (d_turned, active) = factors
    assert torch.equal(active, reference.turned(active8))
    assert torch.equal(d_v, reference.turned(d_v8))
    for rows8, found in ((x8, x_turned), (d_y8, d_turned)):
        assert torch.equal(found, reference.turned(rows8, size / scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_over_tokens_are_not_cut_as_they_are_added_up(monkeypatch, dtype):
    """They are in float32; of widths, in bfloat16, a fast sum is exact enough."""
    asked = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda a8, b8, **options: asked.append(options))
    a8 = torch.ones(16, 32).to(torch.float8_e4m3fn)
    t.scaled_product(a8, a8, torch.ones(()), torch.ones(()), dtype)
    assert asked[0]["out_dtype"] == dtype
    assert asked[0]["use_fast_accum"] == (dtype == torch.bfloat16)


@interpreted
@pytest.mark.parametrize("bad", ["x", "d_y"])
def test_a_nan_reaches_the_gradients_of_weights(bad):
    case = random_case(32, 64, 256)
    case[0 if bad == "x" else 3][0, 5, 7] = float("nan")
    _, _, d_up, d_down = outcomes(in_float8, case)
    assert d_up.isnan().any()
    assert d_down.isnan().any()


@interpreted
def test_gradients_of_zero_stay_zero():
    """Whose sizes' squares are too small for float32."""
    case = random_case(32, 64, 256)
    case[3].zero_()
    for gradient in outcomes(in_float8, case)[1:]:
        assert not gradient.any()


@interpreted
def test_weights_are_scaled_by_their_root_mean_squares_and_transposed():
    for matrix in (torch.randn(192, 64) / 7, torch.zeros(64, 128)):
        plain, turned, sizes = t.float8_weight(matrix, torch.float32)
        wanted, size = reference.rounded_weight(matrix, torch.float32)
        torch.testing.assert_close(plain, wanted)
        torch.testing.assert_close(sizes[0, 0], size)  # of zeros, too, it is finite
        assert sizes[1, 0] == 1 / t.row_scale(matrix.shape[1])
        assert torch.equal(turned, plain.mT)


@interpreted
def test_in_projs_product_and_its_gradients():
    leaves = [torch.randn(2, 10, 64).requires_grad_(), torch.randn(128, 64).requires_grad_()]

    def found(function) -> list[torch.Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for wanted, y in zip(found(F.linear), found(t.float8_linear), strict=True):
        assert relative_error(y, wanted) < 1e-5


# Two layers whose matrices have whole tiles: in_proj has 448 rows.
WHOLE = {"num_layers": 2, "mamba_layers": "0", "model_dim": 64, "mlp_mult": 4, "num_heads": 2}
WHOLE |= {"mamba_d_state": 64, "mamba_head_dim": 8, "num_kv_heads": 1, "ln_scale": True}


@interpreted
def test_a_model_with_the_products_computes_the_same():
    """Loss and every gradient, deeper layers' smaller inputs included; by whole graphs."""
    settings = tiny(**WHOLE, scan_backend="chunked")
    model = random_model(settings)
    batch = torch.randint(0, settings.vocab_size, (2, 2, settings.train_seq_len))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")

    def found(loss_of, products: str) -> list[torch.Tensor]:
        loss = loss_of(*batch, model.order(False), products)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = found(model.loss, "none")
    for x, y in zip(plain, found(compiled, "mlp,in_proj"), strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-9


def count_calls(monkeypatch) -> list[str]:
    """The names of the products that a model computes from now on, on any device."""
    calls = []
    for name in ("float8_mlp", "float8_rows"):

        def counted(*arguments, name=name):
            calls.append(name)
            return getattr(reference, name)(*arguments)

        monkeypatch.setattr(t, name, counted)
    monkeypatch.setattr(t, "why_not_float8", lambda *_: "")
    return calls


@pytest.mark.parametrize("products", ["none", "mlp", "in_proj", "mlp,in_proj"])
def test_only_steps_of_training_take_them(monkeypatch, products):
    """Not the validation between them, GPTQ's Hessians and energies, nor documents that adapt."""
    calls = count_calls(monkeypatch)
    settings = tiny(**WHOLE, float8_products=products, precision="bfloat16", trellis_states=0)
    model = random_model(settings)
    trainer = t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, Quiet())
    tokens = random_tokens(2, settings.train_seq_len + 1)
    pair = tokens[:, :-1], tokens[:, 1:]
    trainer.accumulate_gradients((model.order(True), False), *pair)
    wanted = ["float8_rows"] * ("in_proj" in products)
    wanted += ["float8_mlp"] * 2 * ("mlp" in products)
    assert sorted(calls) == sorted(wanted)
    calls.clear()
    t.collect_costs(model, [pair[0]], SOLO, True)
    model.loss(*pair, model.order(True)).backward()
    model.score(*pair, model.order(True))
    assert not calls


@interpreted
def test_weights_on_their_grids_reach_the_products(monkeypatch):
    """Late QAT, in several micro-batches: a step's gradients are those of the same weights."""
    settings = tiny(**WHOLE, scan_backend="chunked", late_qat_threshold=0.5, trellis_states=0)
    model = random_model(settings)
    trainer = t.Trainer(model, settings, SOLO, settings.train_seq_len, 1e6, Quiet())
    trainer.qat_k = 4.0
    tokens = random_tokens(2, settings.train_seq_len + 1)

    def found(products: str, quantized: bool) -> torch.Tensor:
        trainer.float8_products = products
        model.zero_grad()
        pair = tokens[:, :-1], tokens[:, 1:]
        trainer.accumulate_gradients((model.order(True), quantized), *pair)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    on_grids = found("none", True)
    assert relative_error(found("mlp,in_proj", True), on_grids) < 1e-4
    assert relative_error(found("none", False), on_grids) > 0.01


def test_every_micro_batch_computes_them(monkeypatch):
    """Gradients are those of the whole batch."""
    calls = count_calls(monkeypatch)
    settings = tiny(**WHOLE, float8_products="auto")
    trainer = t.Trainer(random_model(settings), settings, SOLO, 32, 1e6, Quiet())
    assert settings.train_seq_len == 32
    assert trainer.float8_products == "mlp,in_proj"  # auto, where all of them run
    tokens = random_tokens(3, 33)
    kind = trainer.model.order(True), False
    trainer.accumulate_gradients(kind, tokens[:, :-1], tokens[:, 1:])
    assert calls == 3 * ["float8_rows", "float8_mlp", "float8_mlp"]
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    trainer.model.loss(tokens[:, :-1], tokens[:, 1:], trainer.model.order(True)).backward()
    for p, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        assert (gradient - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9


def test_where_they_cannot_run_one_line_says_so(monkeypatch):
    settings = tiny(**WHOLE, float8_products="mlp,in_proj")
    model = random_model(settings)
    with pytest.raises(
        t.UserError, match="FLOAT8_PRODUCTS=mlp,in_proj needs an H100 .*; auto runs"
    ):
        t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, Quiet())
    if t.triton is None:
        pytest.skip("needs triton")
    gpu = torch.device("cuda")
    monkeypatch.setattr(t, "kernel_limits", lambda device: (90, 232_448))
    assert "bfloat16" in t.why_not_float8(model, "mlp", gpu)
    model.compute_dtype = torch.bfloat16
    assert t.why_not_float8(model, "mlp,in_proj", gpu) == ""
    narrow = random_model(dataclasses.replace(settings, mlp_mult=3.0))
    narrow.compute_dtype = torch.bfloat16
    assert t.why_not_float8(narrow, "in_proj", gpu) == ""
    assert "blocks.0.mlp.up.weight is 192 x 64" in t.why_not_float8(narrow, "mlp", gpu)
    by_itself = dataclasses.replace(settings, float8_products="auto")
    assert t.choose_float8(model, by_itself, gpu) == t.EVERY_FLOAT8
    assert t.choose_float8(narrow, by_itself, gpu) == "in_proj"
    assert t.choose_float8(model, by_itself, CPU) == "none"
    monkeypatch.setattr(t, "kernel_limits", lambda device: (80, 166_912))
    assert "H100" in t.why_not_float8(model, "mlp", gpu)
    assert t.why_not_float8(model, "none", CPU) == ""


@pytest.fixture
def hopper(monkeypatch):
    """The device "cuda" is an H100; its properties may be changed."""
    if t.triton is None:
        pytest.skip("needs triton")
    limits = {"cuda": (90, 232_448), "cpu": (90, 232_448)}
    monkeypatch.setattr(t, "kernel_limits", lambda device: limits[device.type])
    return limits


GPU = torch.device("cuda")
NO_PART = [
    ({"mlp_layers": "none"}, "in_proj", "finds no mlp"),
    ({"mamba_layers": "none"}, "mlp", "finds no in_proj"),
    ({"mamba_layers": "none", "mlp_layers": "none"}, "none", "finds no mlp"),
    ({"mamba_version": 1}, "mlp,in_proj", ""),
    ({"mamba_version": 2}, "mlp", "multiples of 64 and 64: blocks.0.mixer.in_proj.weight is 400 x"),
    ({"model_dim": 96}, "none", "multiples of 256 and 64: blocks.0.mlp.up.weight is 384 x 96"),
    ({"mlp_mult": 3.0}, "in_proj", "blocks.0.mlp.up.weight is 192 x 64"),
    ({"precision": "float16"}, "none", "needs an H100 or H200, triton and PRECISION=bfloat16"),
    ({"precision": "float32"}, "none", "needs an H100 or H200, triton and PRECISION=bfloat16"),
]


@pytest.mark.parametrize(("changes", "chosen", "why"), NO_PART, ids=str)
def test_the_log_says_what_auto_stands_for_and_why_it_is_no_more(hopper, changes, chosen, why):
    usual = {"float8_products": "auto", "precision": "bfloat16"}
    settings = tiny(**WHOLE | usual | changes)
    model = random_model(settings)
    assert t.choose_float8(model, settings, GPU) == chosen
    said = t.describe_float8(model, settings, GPU, chosen)
    begin = "" if chosen == "none" else f", 8 bits in {chosen}"
    assert said.startswith(f"{begin} (FLOAT8_PRODUCTS=mlp,in_proj " if why else begin)
    assert why in said
    assert (said == begin) == (not why)
    asked = dataclasses.replace(settings, float8_products="mlp,in_proj")
    if why:
        with pytest.raises(t.UserError, match="FLOAT8_PRODUCTS=mlp,in_proj .*; auto runs"):
            t.choose_float8(model, asked, GPU)
    else:
        assert t.choose_float8(model, asked, GPU) == t.EVERY_FLOAT8
    hopper["cuda"] = (80, 166_912)
    assert t.choose_float8(model, settings, GPU) == "none"
    assert " (FLOAT8_PRODUCTS=mlp,in_proj needs an H100" in t.describe_float8(
        model, settings, GPU, "none"
    )
    assert t.describe_float8(model, settings, CPU, "none") == ""


def test_a_run_announces_them(monkeypatch):
    lines = []
    settings = tiny(**WHOLE)
    model = random_model(settings)

    def log(line: str, *_, **__) -> None:
        lines.append(line)

    monkeypatch.setattr(t, "describe_float8", lambda *given: f", 8 bits in {given[-1]} (so)")
    trainer = t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, log)
    trainer.announce(t.model_skeleton(settings))
    assert lines[-1].startswith("float32, 8 bits in none (so); scan: ")


# What a checkpoint's run multiplied in 8 bits, what runs here, the setting, and what is then done.
GOING_ON = [
    ("mlp,in_proj", "mlp,in_proj", "auto", "mlp,in_proj"),
    ("mlp,in_proj", "mlp,in_proj", "mlp,in_proj", "mlp,in_proj"),
    ("none", "mlp,in_proj", "auto", "none"),  # also that of a script without the setting
    ("mlp", "mlp,in_proj", "auto", "mlp"),
    ("mlp,in_proj", "none", "auto", "none"),  # on another GPU
    ("none", "mlp,in_proj", "mlp,in_proj", "has FLOAT8_PRODUCTS=none, not mlp,in_proj"),
    ("mlp,in_proj", "none", "none", "has FLOAT8_PRODUCTS=mlp,in_proj, not none"),
]


@pytest.mark.parametrize(("had", "able", "wanted", "then"), GOING_ON)
def test_a_checkpoint_goes_on_as_it_was_trained(monkeypatch, tmp_path, had, able, wanted, then):
    """With auto; what cannot be is left out. Who asks for something else is refused."""
    here = {"able": had}

    def why_not(model, products: str, device) -> str:
        lacking = set(products.split(",")) - {*here["able"].split(","), "none"}
        return "cannot" if lacking else ""

    monkeypatch.setattr(t, "why_not_float8", why_not)
    settings = tiny(log_dir=str(tmp_path), run_id="a", float8_products="auto")
    quiet = Quiet()

    def trainer_of(s: t.Settings, writer=None) -> t.Trainer:
        return t.Trainer(random_model(s), s, SOLO, s.train_batch_tokens, 1e6, quiet, writer)

    with t.Checkpoints(settings, SOLO, quiet) as checkpoints:
        trainer = trainer_of(settings, checkpoints)
        trainer.steps_done = 1
        trainer.save()
        checkpoints.finish()
    assert trainer.header()["float8_products"] == had
    here["able"] = able
    trainer = trainer_of(dataclasses.replace(settings, float8_products=wanted))
    if "has" in then:
        with pytest.raises(t.UserError, match=f"{then}; RESUME=never starts anew"):
            trainer.resume()
        return
    trainer.resume()
    assert trainer.steps_done == 1
    assert trainer.float8_products == trainer.header()["float8_products"] == then


def test_the_log_tells_a_checkpoint_that_had_fewer(hopper):
    settings = tiny(**WHOLE, float8_products="auto", precision="bfloat16")
    said = t.describe_float8(random_model(settings), settings, GPU, "none")
    assert said == " (FLOAT8_PRODUCTS=mlp,in_proj is not what the checkpoint had)"


def test_checkpoints_keep_the_setting_and_artifacts_know_nothing_of_it():
    assert "float8_products" in t.TRAINING_FIELDS
    assert "float8_products" not in t.artifact_header(t.Settings())
    assert t.FORMER_DEFAULTS["float8_products"] == "none"
    assert t.Settings().float8_products == "auto"
    assert t.PRESETS["peer7"]["float8_products"] == "none"  # its speed is compared
