"""Idea: rows make up for the errors of rows above them. An --idea of `python -m tools.explore`.

GPTQ minimizes what a matrix's errors D do to its outputs, each row by itself. What they cost the
text depends on pairs of rows, too. With H of the inputs, and B = mean g g^T of the gradients g of
the text's nats by the outputs,

    cost ~ trace(B D H D^T) / 2.

In blocks of as many rows as a trellis has, B = M^T C M: M is unit lower triangular, with nothing
but the diagonal within blocks, and C has nothing outside of them. With u the errors that GPTQ sees
in a column, the cost is of M u. So a block's rows aim at their weights and at what M makes of u in
the rows above, and C's diagonal weighs their own errors, instead of B's. Blocks go through the
columns one after the other, each a column later than the one above.

Embeddings are as before. To compare both on the same weights, this is done only if GPTQ_BLOCK_SIZE
is 64: --requantize "rows make up: GPTQ_BLOCK_SIZE=64". Source: two-sided feedback, as in YAQA,
arXiv 2505.22988, with a trellis's rows as one block.
"""

import torch
import torch.nn.functional as F

TWO_SIDED_BLOCKS = 64
DAMP = 0.01  # of B's diagonal, added to it


def factor_rows(covariance: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """M (rows, rows) and the diagonal of C (rows,) with B = M^T C M, both float32.

    M is the identity within blocks of rows, and C has such blocks, of which only the diagonal is
    returned.
    """
    b = covariance.double()
    energy = b.diagonal()
    b = b + torch.diag(DAMP * energy + 1e-9 * energy.mean() + 1e-30)
    lower = torch.linalg.cholesky(b.flip(0, 1))
    unit = lower / lower.diagonal()
    m = unit.mT.flip(0, 1).contiguous()  # B = m^T diag(c) m
    c = lower.diagonal().square().flip(0)
    costs = torch.empty_like(c)
    for first in range(0, len(b), block):
        rows = slice(first, first + block)
        within = m[rows, rows].clone()
        costs[rows] = (c[rows, None] * within.square()).sum(0)
        m[rows] = torch.linalg.solve_triangular(within, m[rows], upper=False, unitriangular=True)
    return m.float(), costs.float()


def round_by_both(script, problem: tuple, m: torch.Tensor, states: int) -> torch.Tensor:
    """gptq() of one matrix whose rows make up for those above by factor_rows()'s m.

    problem: gptq()'s weight, scale (rows, columns), limits (rows, 1), order, upper, unused and
    weights (rows, 1).
    """
    weight, scale, limits, order, upper, unused, weights = problem
    rows, columns = weight.shape
    block = script.TRELLIS_ROWS
    more = -rows % block
    count = (rows + more) // block

    def blocks(x, value: float = 0.0):
        return F.pad(x, (0, 0, 0, more), value=value).view(count, block, -1)

    left = blocks(weight.masked_fill(unused, 0.0).take_along_dim(order, -1)).clone()
    steps = blocks(scale.take_along_dim(order, -1), 1.0)
    limits = blocks(limits, 1.0)
    weights = blocks(weights)
    # What each block's errors add to all rows below: (blocks, rows, rows of the block).
    below = torch.tril(F.pad(m, (0, more, 0, more)), -1)
    below = below.view(-1, count, block).transpose(0, 1).contiguous()
    made_up = weight.new_zeros(columns, count, block)
    for turn in range(columns + count - 1):
        first, last = max(0, turn - columns + 1), min(count, turn + 1)
        block_numbers = torch.arange(first, last, device=weight.device)
        column = turn - block_numbers
        w = left[block_numbers, :, column].unsqueeze(2)  # (blocks at work, rows, 1)
        step = steps[block_numbers, :, column].unsqueeze(2)
        target = w + made_up[column, block_numbers].unsqueeze(2)
        most = limits[first:last]
        if states:
            points = script.round_by_trellis(target, step, most, states, weights[first:last])
        else:
            points = script.round_to_grid(target, step, most)
        errors = w - points * step
        for_others = below[first:last] @ errors
        made_up[column] += for_others.view(-1, count, block)
        scaled = errors / upper[column, column].view(-1, 1, 1)
        left[first:last] -= scaled * upper[column].unsqueeze(1)  # zeros left of the column
        left[block_numbers, :, column] = points.squeeze(2)
    return left.view(-1, columns)[:rows].take_along_dim(order.argsort(), -1)


def install(script) -> None:
    """Changes train_gpt.py's calibrate(), collect_costs() and quantize_model()."""
    # Only here: an idea is loaded by its path, and has a package's others once it is at work.
    from tools.ideas.tokens_that_count import inputs_and_gradients

    usual_calibrate = script.calibrate
    usual_costs = script.collect_costs
    usual_quantize = script.quantize_model
    factors: dict[str, torch.Tensor] = {}

    def collect_costs(model, batches, ranks, with_energies: bool = False):
        """As the script's, with the blocks' costs in the place of the rows' energies."""
        batches = list(batches)
        hessians, energies = usual_costs(model, batches, ranks, with_energies)
        sums = {}
        for batch in batches:
            for name, _, gradient in inputs_and_gradients(script, model, batch):
                sums[name] = sums.get(name, 0.0) + gradient.mT @ gradient
        tokens = sum(batch.numel() for batch in batches) * ranks.world_size
        for name in sorted(sums):
            covariance = ranks.sum_(sums[name]) / tokens
            m, costs = factor_rows(covariance, script.TRELLIS_ROWS)
            factors[name] = m
            energies[name] = costs
        return hessians, energies

    def calibrate(trainer, batches):
        """As the script's, with both sides' costs if asked for."""
        factors.clear()
        both = trainer.settings.gptq_block_size == TWO_SIDED_BLOCKS
        shares = trainer.settings.shares_bits
        script.need(shares or not both, "rows that make up need costs: set SDCLIP_BY_ROW above 0")
        script.collect_costs = collect_costs if both else usual_costs
        return usual_calibrate(trainer, batches)

    def quantize_model(model, settings, ranks, solvers, k, track=iter):
        """As the script's; then each matrix that has a factor is rounded anew."""
        stored = usual_quantize(model, settings, ranks, solvers, k, track)
        for name, weight, limits, rows, columns in script.grids(
            model, settings, script.grid_limits(model), k
        ):
            if name in factors:
                costs = model.row_costs[name]
                weights = (costs / costs.mean()).sqrt()
                problem = weight, rows * columns, limits, *solvers[name], weights
                states = settings.trellis_states
                integers = round_by_both(script, problem, factors[name], states).floor()
                stored[f"{name} integers"].copy_(integers)
        return stored

    script.calibrate = calibrate
    script.quantize_model = quantize_model
