"""Optimizers: Muon's geometry, who is trained by what, averages of the weights, and the
schedule.
"""

import math

import pytest
import torch

import train_gpt as t
from tests.support import (
    SOLO,
    Quiet,
    fill_gradients,
    newton_schulz,
    optimizer_tensors,
    random_model,
    random_tokens,
    relative,
    tiny,
)

SHAPES = [(64, 32), (32, 64), (48, 48), (200, 8)]


def matrices(*shape: int, condition: float = 10.0, seed: int = 0) -> torch.Tensor:
    """Random matrices whose singular values lie evenly between 1 and 1/condition."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * torch.linspace(1, 1 / condition, s.shape[-1])) @ v


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("steps", "tolerance"), [(5, 0.13), (8, 1e-4)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, steps, tolerance, scale):
    """And the directions of the original: the result is close to U V^T of its singular value
    decomposition.
    """
    x = matrices(3, *shape)
    (result,) = t.orthogonalize([scale * x], steps)
    assert (torch.linalg.svdvals(result) - 1).abs().max() < tolerance
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert relative(result, u @ v) < tolerance


@pytest.mark.parametrize("steps", range(1, 9))
def test_steps_of_gram_matrices_are_steps_of_the_matrices(steps):
    """In float64, so that nothing but the order of products differs; matrices of several sizes go
    together.
    """
    batches = [
        matrices(3, *shape, seed=seed).double() for seed, shape in enumerate([*SHAPES, SHAPES[0]])
    ]
    for x, result in zip(batches, t.orthogonalize(batches, steps), strict=True):
        assert result.shape == x.shape
        assert relative(result, newton_schulz(x, steps)) < 1e-9


def test_a_batch_is_orthogonalized_as_each_matrix_alone():
    x = torch.randn(5, 24, 40) * torch.tensor([1e-3, 1.0, 5.0, 1e3, 0.0])[:, None, None]
    (result,) = t.orthogonalize([x], 5)
    assert result.isfinite().all()
    for one, expected in zip(x, result, strict=True):
        assert torch.allclose(t.orthogonalize([one[None]], 5)[0][0], expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_steps_along_the_orthogonalized_nesterov_momentum(shape):
    """Three steps against the formula (rows of one length, then the nearest orthogonal matrix)
    written out with a singular value decomposition, on two matrices at once.
    """
    start, gradients = matrices(2, *shape, seed=1), matrices(3, 2, *shape, seed=2)
    parameters = [torch.nn.Parameter(p.clone()) for p in start]
    settings = tiny(muon_backend_steps=12, weight_decay=0.5)
    muon = t.Muon({(0.2, shape, ()): parameters}, settings, SOLO)
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g.clone()
        muon.step(torch.tensor(0.5), torch.tensor(0.9), torch.tensor(0.25), torch.zeros(()))
        momentum = 0.9 * momentum + 0.1 * 0.25 * gradient
        nesterov = 0.1 * 0.25 * gradient + 0.9 * momentum
        u, _, v = torch.linalg.svd(
            nesterov / nesterov.norm(dim=-1, keepdim=True), full_matrices=False
        )
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * (
            u @ v
        )
    assert relative(torch.stack(list(parameters)), expected) < 1e-3


@pytest.mark.parametrize("groups", [(64, 24, 8), (16, 80)], ids=str)
def test_groups_of_rows_are_orthogonalized_as_matrices_of_their_own(groups):
    """A step against each group's singular value decomposition; a group's rows are as long as if
    it were a matrix, though beside another shape.
    """
    shape = (96, 40)
    (start,), (gradient,) = matrices(1, *shape, seed=1), matrices(1, *shape, seed=2)
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = gradient.clone()
    settings = tiny(muon_backend_steps=12, weight_decay=0.0)
    muon = t.Muon({(0.2, shape, groups): [parameter]}, settings, SOLO)
    muon.step(torch.tensor(0.5), torch.tensor(0.9), torch.ones(()), torch.zeros(()))
    rows = gradient / gradient.norm(dim=-1, keepdim=True)
    expected = []
    for piece in rows.split(groups):
        u, _, v = torch.linalg.svd(piece, full_matrices=False)
        expected.append(math.sqrt(max(1, len(piece) / shape[1])) * (u @ v))
    assert relative(start - parameter, 0.1 * torch.cat(expected)) < 1e-3


@pytest.mark.parametrize("version", [1, 2, 3])
def test_row_groups_are_all_of_in_projs_rows(version):
    """Where MUON_ROW_GROUPS asks for them; other matrices have none, and without it nor has it."""
    model = random_model(tiny(mamba_version=version, muon_row_groups=True))
    grouped = {n: layer for n, layer in model.linear_layers().items() if layer.row_groups}
    assert grouped and all(name.endswith("in_proj.weight") for name in grouped)
    for layer in grouped.values():
        assert sum(layer.row_groups) == layer.out_features
        inner = model.blocks[0].mixer.out_proj.in_features
        assert layer.row_groups[:2] == (inner, inner)
        assert version == 1 or layer.row_groups[-1] == layer.dynamics_rows
    plain = random_model(tiny(mamba_version=version, muon_row_groups=False))
    assert not any(layer.row_groups for layer in plain.linear_layers().values())


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_matrices_change_as_if_one_by_one(skip):
    """Two shapes, three matrices each and a fourth update, of padding; the same bits."""
    shapes, rates, skip = SHAPES[:2], [0.1, 0.3], torch.tensor(skip)
    batches = [list(matrices(3, *shape)) for shape in shapes]
    updates = [matrices(4, *shape, seed=1).half() for shape in shapes]
    expected = []
    factor = torch.tensor(0.7)
    for batch, update, rate in zip(batches, updates, rates, strict=True):
        rate = rate * factor * (1 - skip)
        step = rate * max(1, update.shape[1] / update.shape[2]) ** 0.5
        for p, change in zip(batch, update, strict=False):
            expected.append(p * (1 - rate * 0.2) - step * change.float())
    t.apply_updates(batches, updates, rates, 0.2, factor, skip)
    assert all(map(torch.equal, [p for batch in batches for p in batch], expected))


def test_muons_updates_compile_as_one_graph_each():
    """As on a GPU; three steps on three shapes, the second skipped: the same bits as uncompiled."""

    groups = [(SHAPES[0][0] - 8, 8), (), ()]

    def three_steps(momentum_updates, apply_updates) -> list[torch.Tensor]:
        parameters = [list(matrices(3, *shape)) for shape in SHAPES[:3]]
        gradients = [list(matrices(4, *shape, seed=1)) for shape in SHAPES[:3]]
        momenta = [torch.zeros(4, *shape) for shape in SHAPES[:3]]
        momentum = torch.tensor(0.9)
        for skip in map(torch.tensor, (0.0, 1.0, 0.0)):
            scale = torch.tensor(0.5)
            updates = momentum_updates(gradients, momenta, groups, momentum, scale, skip, 5)
            apply_updates(parameters, updates, [0.1] * 3, 0.2, torch.tensor(0.7), skip)
        return [*momenta, *(p for group in parameters for p in group)]

    functions = t.momentum_updates, t.apply_updates
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in functions]
    assert all(map(torch.equal, three_steps(*functions), three_steps(*compiled)))


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_norms_are_judged_as_one_graph(clip_norm):
    """Compiled, to the bit: factors, the latest step's skip, and the counts of those skipped."""
    compiled = torch.compile(t.judge_gradients, fullgraph=True, backend="aot_eager")
    skips, counts = torch.zeros(2), torch.zeros(2, 3)
    expected = []
    for value in (1.0, math.nan, math.inf, 8.0, -math.inf):
        norm = torch.tensor(value)
        factors = []
        for function, skip, count in zip((t.judge_gradients, compiled), skips, counts, strict=True):
            factors.append(function(norm, clip_norm, skip, count))
            expected.append(skip.item() == (not math.isfinite(value)))
        if math.isfinite(value):
            usual = min(1.0, clip_norm / (value + 1e-6)) if clip_norm else 1.0
            assert factors == [pytest.approx(usual, rel=1e-6)] * 2
            assert torch.equal(*factors)
    assert all(expected)
    assert counts.tolist() == [[3, 1, 2]] * 2


@pytest.mark.parametrize("size", [0.5, 40.0])
@pytest.mark.parametrize("most", [1.0, 2.5, 0.0])
def test_gradients_are_clipped_to_a_norm(monkeypatch, size, most):
    """What both optimizers use; a smaller norm stays, and GRAD_CLIP_NORM=0 clips nothing."""
    settings = tiny(grad_clip_norm=most)
    model = random_model(settings)
    optimizers, sizes = t.Optimizers(model, settings, SOLO), []
    matrices = [p for batch in optimizers.muon.batches for p in batch]

    def norm(parameters) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))

    fill_gradients(model)
    before = norm(model.parameters())
    for p in model.parameters():
        p.grad *= size / before
    parts = [norm(matrices), norm(optimizers.adam.state)]

    def muon_step(lr_factor, momentum, scale, skip):
        sizes.append(norm(matrices) * float(scale))

    monkeypatch.setattr(optimizers.muon, "step", muon_step)
    monkeypatch.setattr(optimizers.adam, "step", lambda: sizes.append(norm(optimizers.adam.state)))
    optimizers.step(0.5, 0.9)
    clipped = min(1.0, most / size) if most else 1.0
    assert sizes == pytest.approx([part * clipped for part in parts], rel=1e-4)


def test_rows_of_updates_are_as_long_as_they_usually_are():
    """Two steps of two matrices against the formula; a skipped one in between changes nothing."""
    rows = matrices(2, 6, 10) * torch.logspace(-2, 1, 6)[:, None]
    first, second = rows, rows.flip(1) + 0.1
    squares = [torch.zeros(2, 6, 1)]
    t.even_out_rows([first], squares, 0.9, torch.tensor(0.0))
    before = squares[0].clone()
    t.even_out_rows([torch.full_like(first, 5.0)], squares, 0.9, torch.tensor(1.0))
    assert torch.equal(squares[0], before)
    (found,) = t.even_out_rows([second], squares, 0.9, torch.tensor(0.0))
    square = 0.9 * 0.1 * first.square().mean(2) + 0.1 * second.square().mean(2)
    for matrix, update, own in zip(found, second, square, strict=True):
        even = update / own.sqrt()[:, None]
        assert relative(matrix, even * update.norm() / even.norm()) < 1e-5
    lengths = found.norm(dim=2)
    assert (lengths.amax(1) / lengths.amin(1) < 50).all()  # a thousand before
    compiled = torch.compile(t.even_out_rows, fullgraph=True, backend="aot_eager")
    again = [before.clone()]
    assert torch.equal(compiled([second], again, 0.9, torch.tensor(0.0))[0], found)
    assert torch.equal(again[0], squares[0])


@pytest.mark.parametrize("beta2", [0.0, 0.95])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_gradients_that_are_not_finite_change_nothing(poison, beta2):
    """Neither parameters, nor momentum, Adam's state or the average, bit for bit. 1e30 is finite,
    its square is not.
    """
    settings = tiny(muon_beta2=beta2)
    model = random_model(settings)
    optimizers, average = (
        t.Optimizers(model, settings, SOLO),
        t.WeightAverage(model, settings, SOLO),
    )
    counts, tensors = [], []
    for number, value in enumerate([None, poison, poison, None, poison], 1):
        fill_gradients(model, value)
        optimizers.step(0.5, 0.9)
        average.update(average.rate(number), optimizers.skip)
        counts.append(optimizers.skipped.tolist())
        tensors.append(optimizer_tensors(optimizers, average))
    assert counts == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 0, 2], [3, 1, 2]]
    first, *skipped, other, last = tensors
    assert all(map(torch.equal, first, skipped[0]))
    assert all(map(torch.equal, first, skipped[1]))
    assert not any(map(torch.equal, first, other))
    assert all(map(torch.equal, other, last))


def test_a_skipped_first_step_is_as_if_it_had_never_been():
    settings = tiny()
    results = []
    for poisons in ([None], [math.nan, None]):
        model = random_model(settings)
        optimizers = t.Optimizers(model, settings, SOLO)
        for value in poisons:
            fill_gradients(model, value)
            optimizers.step(0.5, 0.9)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_muon_trains_the_matrices_of_linear_layers(version):
    """Kinds are told by names alone; short convolutions and gates have two dimensions as well."""
    model = t.build_model(tiny(mamba_version=version), SOLO)
    found = {
        name
        for name, p in model.named_parameters()
        if t.parameter_kind(name, p) in ("matrix", "mamba_matrix")
    }
    assert found == set(model.linear_layers())


@pytest.mark.parametrize("changes", [{}, {"mamba_version": 2}], ids=str)
def test_every_parameter_is_trained_by_one_optimizer_at_its_own_rate(changes):
    settings = tiny(
        matrix_lr=1.0,
        mamba_matrix_lr=2.0,
        tied_embed_lr=3.0,
        scalar_lr=4.0,
        weight_decay=0.1,
        **changes,
    )
    model = t.build_model(settings, SOLO)
    optimizers = t.Optimizers(model, settings, SOLO)
    found, count = {}, 0
    muon = optimizers.muon
    for rate, batch in zip(muon.rates, muon.batches, strict=True):
        count += len(batch)
        found |= dict.fromkeys(batch, ("Muon", rate, muon.weight_decay))
    for group in optimizers.adam.param_groups:
        count += len(group["params"])
        found |= dict.fromkeys(group["params"], ("AdamW", group["base_lr"], group["weight_decay"]))
    assert count == len(found)  # each once
    for name, p in model.named_parameters():
        if name.endswith(("in_proj.weight", "out_proj.weight")):
            assert found[p] == ("Muon", 2.0, 0.1), name
        elif p.dim() == 2 and any(
            part in name for part in (".mlp.", "query.", "key.", "value.", "out.", "bigram_proj.")
        ):
            assert found[p] == ("Muon", 1.0, 0.1), name
        elif name.startswith(("embedding.", "head.", "bigram_embedding.")):
            assert found[p] == ("AdamW", 3.0, 0.1), name
        else:
            assert found[p] == ("AdamW", 4.0, 0.0), name


def test_adam_takes_its_betas_and_epsilon_from_the_settings():
    """Against the formula, after two steps with one gradient; an epsilon this large tells."""
    settings = tiny(beta1=0.5, beta2=0.75, adam_eps=0.01, grad_clip_norm=0.0, scalar_lr=0.1)
    model = random_model(settings)
    optimizers = t.Optimizers(model, settings, SOLO)
    p = model.skip_weights
    expected, mean, square = p.detach().clone(), 0.0, 0.0
    for step in (1, 2):
        fill_gradients(model)
        gradient = p.grad.clone()
        optimizers.step(1.0, 0.9)
        mean = 0.5 * mean + 0.5 * gradient
        square = 0.75 * square + 0.25 * gradient**2
        root = (square / (1 - 0.75**step)).sqrt()
        expected -= 0.1 * mean / (1 - 0.5**step) / (root + 0.01)
    assert torch.allclose(p, expected, atol=1e-6)


def test_a_step_at_factor_zero_changes_no_weight():
    """The compile warm-up relies on it."""
    settings = tiny()
    model = random_model(settings)
    optimizers = t.Optimizers(model, settings, SOLO)
    start = [p.detach().clone() for p in model.parameters()]
    fill_gradients(model)
    optimizers.step(0.0, 0.9)
    assert all(map(torch.equal, model.parameters(), start))
    fill_gradients(model)
    optimizers.step(1.0, 0.9)
    assert not any(map(torch.equal, model.parameters(), start))


# ---- Averages of the weights ---------------------------------------------------------------------


class Line(torch.nn.Module):
    """One weight that after step n is n."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def averaged(steps: int, skipped: tuple[int, ...] = (), every: int = 0, **changes) -> float:
    """The average after so many steps of a run, for a weight that counts them.

    Snapshots are due every few steps, and of no effect where AVERAGE names no swa.
    """
    model = Line()
    average = t.WeightAverage(model, tiny(**changes), SOLO)
    for step in range(1, steps + 1):
        model.weight.data.fill_(step)
        skip = torch.tensor(float(step in skipped))
        average.update(average.rate(step), skip)
        average.after_step(step, skip, snapshot=bool(every) and step % every == 0)
    average.apply()
    return model.weight.item()


def slow_ema(steps: int, skipped: tuple[int, ...], horizon: float, decay: float) -> list[float]:
    """The ema behind each step of the weight that counts them, by the formula."""
    values = [0.0]
    for step in range(1, steps + 1):
        rate = max(1 - decay, 1 / max(1.0, horizon * step))
        values.append(values[-1] + (0 if step in skipped else rate) * (step - values[-1]))
    return values


SKIPPED = (7, 8, 60)


@pytest.mark.parametrize("horizon", [0.0, 0.1, 0.5, 1.0])
def test_ema_looks_back_over_the_horizon(horizon):
    found = averaged(120, SKIPPED, average_horizon=horizon, ema_decay=0.9999)
    assert found == pytest.approx(slow_ema(120, SKIPPED, horizon, 0.9999)[-1], rel=1e-5)
    assert 120 - found == pytest.approx(horizon / (1 + horizon) * 120, rel=0.1, abs=0.5)


def test_the_average_is_taken_in_at_its_rate_by_the_step_itself():
    """So that a CUDA graph of steps has it; not by one whose gradients are not finite."""
    settings = tiny(average="ema")
    trainer = t.Trainer(random_model(settings), settings, SOLO, 64, 1e6, Quiet())
    tokens = random_tokens(2, 33)
    model, ema = trainer.model, trainer.average.ema
    kind = model.order(True), False
    before = [x.clone() for x in ema]
    for rate in (0.25, 0.5):
        trainer.graphed_steps(kind, tokens[:, :-1], tokens[:, 1:], 0.5, 0.9, rate)
        for old, new, p in zip(before, ema, model.parameters(), strict=True):
            assert torch.allclose(new, old.lerp(p, rate), atol=1e-7)
        before = [x.clone() for x in ema]
    model.embedding.weight.register_hook(lambda gradient: gradient * math.nan)
    trainer.graphed_steps(kind, tokens[:, :-1], tokens[:, 1:], 0.5, 0.9, 0.5)
    assert trainer.optimizers.skip == 1
    assert all(map(torch.equal, ema, before))


def test_swa_is_the_mean_of_snapshots_whose_step_was_not_skipped():
    taken = [step for step in range(5, 101, 5) if step not in SKIPPED]
    found = averaged(100, SKIPPED, every=5, average="swa")
    assert found == pytest.approx(sum(taken) / len(taken), rel=1e-6)


def test_swa_of_an_ema_is_the_mean_of_the_emas_snapshots():
    ema = slow_ema(100, SKIPPED, 0.3, 0.9)
    taken = [ema[step] for step in range(5, 101, 5) if step not in SKIPPED]
    changes = {"average": "ema+swa", "average_horizon": 0.3, "ema_decay": 0.9}
    found = averaged(100, SKIPPED, every=5, **changes)
    assert found == pytest.approx(sum(taken) / len(taken), rel=1e-5)


@pytest.mark.parametrize(
    ("average", "left"),
    [("none", 50.0), ("swa", 50.0), ("ema+swa", slow_ema(50, (), 0.1, 0.999)[-1])],
)
def test_what_stays_where_nothing_was_averaged(average, left):
    """Without an average, or without a snapshot: a run too short for one."""
    assert averaged(50, average=average) == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize(
    ("average", "copies"), [("none", 0), ("ema", 1), ("swa", 1), ("ema+swa", 2)]
)
def test_an_average_takes_the_memory_that_it_needs(average, copies):
    model = random_model(tiny())
    tensors = t.WeightAverage(model, tiny(average=average), SOLO).tensors()
    weights = sum(p.numel() for p in model.parameters())
    assert sum(x.numel() for x in tensors) == copies * weights + ("swa" in average)


@pytest.mark.parametrize("average", ["none", "ema", "swa", "ema+swa"])
def test_a_checkpoint_holds_all_of_an_average(tmp_path, average):
    """Eight steps in one go, or seven, a checkpoint and one more by another trainer: the same bits.

    Rates decay from the fifth step on: snapshots are due behind the sixth and the eighth.
    """
    settings = tiny(
        **(STEPS | {"iterations": 8}), average=average, average_horizon=0.9, swa_start_frac=1.0,
        swa_every=2, run_id="a", log_dir=str(tmp_path),
        muon_beta2=0.95 if average == "ema" else 0.0,
    )  # fmt: skip

    def train(steps: int) -> tuple[t.Trainer, list[torch.Tensor]]:
        model = random_model(settings)
        trainer = t.Trainer(model, settings, SOLO, 128, 1e6, Quiet(), checkpoints)
        trainer.resume()
        for _ in range(steps):
            now = t.schedule_at(settings, trainer.steps_done, 0.0)
            fill_gradients(model)
            trainer.optimizers.step(now.lr_factor, now.momentum)
            trainer.steps_done += 1
            average, skip = trainer.average, trainer.optimizers.skip
            average.update(average.rate(trainer.steps_done), skip)
            average.after_step(trainer.steps_done, skip, now.snapshot)
        return trainer, [x.detach().clone() for x in trainer.tensors()]

    with t.Checkpoints(settings, SOLO, Quiet()) as checkpoints:
        _, expected = train(8)
        trainer, _ = train(7)
        trainer.save()
        checkpoints.finish()
        trainer, found = train(1)
    assert trainer.steps_done == 8
    assert all(map(torch.equal, found, expected))
    assert trainer.average.snapshots == (2 if "swa" in average else 0)
    last = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.average.apply()
    kept = all(map(torch.equal, trainer.model.parameters(), last))
    assert kept == (average == "none")


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 300])
def test_ema_of_a_short_run_looks_back_over_a_part_of_it_only(steps):
    """With decay 0.997 alone, an average over 100 steps would lag behind by most of them."""
    lag = steps - averaged(steps, ema_decay=0.997)
    assert 0 <= lag <= max(0.0, 0.1 * steps) + 1e-3
    assert steps < 100 or lag > 0.08 * steps


def test_ema_of_a_long_run_has_the_decay_it_was_given():
    """A weight that grows by 1 a step is behind its EMA by decay / (1 - decay) in the long run."""
    assert 3000 - averaged(3000, ema_decay=0.9) == pytest.approx(9, abs=0.01)


def test_without_averaging_the_last_weights_stay():
    assert averaged(50, ema_decay=0.0) == 50


# ---- The schedule --------------------------------------------------------------------------------

# 100 seconds of training in clock mode; 1000 steps in step mode.
CLOCK = {"max_wallclock_seconds": 120.0, "export_reserve_seconds": 20.0, "iterations": 1_000_000}
STEPS = {"max_wallclock_seconds": 0.0, "export_reserve_seconds": 20.0, "iterations": 1000}
SHAPE = {
    "warmdown_fraction": 0.5,
    "recur_start": 0.35,
    "late_qat_threshold": 0.2,
    "muon_momentum": 0.9,
}


def at(part: float, mode: dict, **changes) -> t.Schedule:
    """The schedule when this part of the run is over, in steps of 0.1 s in clock mode."""
    step, seconds = round(1000 * part), 100 * part
    return t.schedule_at(tiny(**(mode | SHAPE | changes)), step, seconds)


each_mode = pytest.mark.parametrize("mode", [CLOCK, STEPS], ids=["clock", "steps"])


@each_mode
@pytest.mark.parametrize(
    ("part", "factor", "momentum", "recurrent", "quantized"),
    [
        (0.02, 1.0, 0.828, False, False),
        (0.05, 1.0, 0.855, False, False),
        (0.1, 1.0, 0.9, False, False),
        (0.3, 1.0, 0.9, False, False),
        (0.35, 1.0, 0.9, True, False),
        (0.5, 1.0, 0.9, True, False),
        (0.75, 0.5, 0.9, True, False),
        (0.89, 0.22, 0.9, True, False),
        (0.91, 0.18, 0.9, True, True),
    ],
)
def test_the_phases_of_a_run(mode, part, factor, momentum, recurrent, quantized):
    now = at(part, mode)
    assert now.progress == pytest.approx(part)
    assert now.lr_factor == pytest.approx(factor)
    assert now.momentum == pytest.approx(momentum)
    assert (now.recurrent, now.quantized) == (recurrent, quantized)


def test_rates_rise_for_a_hundredth_of_the_run():
    """Warm-up counts the step that is about to be taken."""
    assert at(0.005, CLOCK).lr_factor == pytest.approx(0.5, abs=1e-3)
    assert [at(part, STEPS).lr_factor for part in (0.004, 0.009)] == pytest.approx([0.5, 1.0])


def test_the_very_first_step_learns():
    assert at(0.0, STEPS).lr_factor > 0
    assert at(0.0, CLOCK).lr_factor > 0


@each_mode
def test_the_run_ends_at_its_budget(mode):
    assert at(0.999, mode).progress < 1
    assert at(1.0, mode).progress == 1
    assert at(1.5, mode).progress == 1


def test_step_mode_does_not_look_at_the_clock_and_iterations_bound_the_clock():
    assert t.schedule_at(tiny(**STEPS), 10, 1e6).progress == pytest.approx(0.01)
    assert t.schedule_at(tiny(**(CLOCK | {"iterations": 50})), 50, 1.0).progress == 1


@pytest.mark.parametrize(
    ("step_seconds", "warmdown"), [(0.1, 0.2), (0.2, 0.4), (0.05, 0.1), (1.0, 1.0)]
)
def test_warmdown_iters_counts_steps_at_the_measured_step_time(step_seconds, warmdown):
    """200 steps of 0.1 s are a fifth of 100 s; of 1 s, they are more than the whole run."""
    for part in (0.5, 0.7, 0.85, 0.95):
        settings = tiny(**(CLOCK | SHAPE | {"warmdown_iters": 200}))
        now = t.schedule_at(settings, round(100 * part / step_seconds), 100 * part)
        assert now.lr_factor == pytest.approx(min(1.0, (1 - part) / warmdown), abs=1e-6)


def test_warmdown_iters_in_step_mode():
    for step, factor in ((799, 1.0), (900, 0.5), (999, 0.005)):
        settings = tiny(**(STEPS | {"warmdown_iters": 200}))
        assert t.schedule_at(settings, step, 1e5).lr_factor == pytest.approx(factor, abs=1e-6)


@each_mode
@pytest.mark.parametrize(
    "changes", [{}, {"warmdown_iters": 200}, {"warmdown_fraction": 0.0}], ids=str
)
def test_a_run_only_ever_moves_forward(mode, changes):
    """At an uneven step time: progress, momentum and both switches never go back, and the factor
    stays in [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    settings = tiny(**(mode | SHAPE | changes))
    seconds, before = 0.0, t.schedule_at(settings, 0, 0.0)
    for step in range(1, 1001):
        seconds += float(torch.rand((), generator=generator)) * 0.2
        now = t.schedule_at(settings, step, seconds)
        assert now.progress >= before.progress
        assert now.momentum >= before.momentum
        assert now.recurrent >= before.recurrent
        assert 0 <= now.lr_factor <= 1
        before = now


@each_mode
def test_rates_decay_to_a_floor(mode):
    """MIN_LR is a part of the peak; warm-up still begins below it, and QAT begins as without it."""
    floor = {"min_lr": 0.3}
    assert at(0.75, mode, **floor).lr_factor == pytest.approx(0.5)
    assert at(0.999, mode, **floor).lr_factor == pytest.approx(0.3)
    assert at(0.0, mode, **floor).lr_factor < 0.11
    assert at(0.91, mode, **floor).quantized
    assert not at(0.89, mode, **floor).quantized


@each_mode
def test_muons_momentum_rises_in_steps(mode):
    """At 500 of 1,000 steps it is half way from its start."""
    changes = {"muon_momentum_warmup_start": 0.5, "muon_momentum_warmup_steps": 1000}
    assert at(0.0, mode, **changes).momentum == pytest.approx(0.5)
    assert at(0.5, mode, **changes).momentum == pytest.approx(0.7)
    assert at(0.05, mode, muon_momentum_warmup_start=0.5).momentum == pytest.approx(0.7)
    assert at(0.05, mode, muon_momentum_warmup_steps=100).momentum == pytest.approx(0.855)


@each_mode
def test_snapshots_are_due_once_rates_have_decayed(mode):
    """Below a LR factor of 0.2, which is behind step 900 of 1,000, behind every 20th step."""
    settings = tiny(**(mode | SHAPE), swa_start_frac=0.2, swa_every=20)
    due = [t.schedule_at(settings, step, step / 10).snapshot for step in range(1000)]
    assert [step + 1 for step in range(1000) if due[step]] == [920, 940, 960, 980, 1000]


@each_mode
@pytest.mark.parametrize("off", ["warmdown_fraction", "recur_start"])
def test_phases_can_be_switched_off(mode, off):
    start, late = at(0.0, mode, **{off: 0.0}), at(0.99, mode, **{off: 0.0})
    assert (late.lr_factor == 1) == (off == "warmdown_fraction")
    assert start.recurrent == (off == "recur_start")
    assert not at(0.999, mode, late_qat_threshold=0.0).quantized


@each_mode
def test_ternary_training_is_quantized_from_the_start(mode):
    assert all(
        at(part, mode, quantizer="ternary", late_qat_threshold=0.0).quantized
        for part in (0.0, 0.5, 0.999)
    )


def test_the_training_clock_stands_still_while_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    clock = t.TrainingClock()
    now[0] += 50  # before the start
    clock.start()
    now[0] += 3
    assert clock.seconds() == 3
    clock.pause()
    now[0] += 50
    assert clock.seconds() == 3
    clock.start()
    now[0] += 2
    clock.pause()
    assert clock.seconds() == 5
