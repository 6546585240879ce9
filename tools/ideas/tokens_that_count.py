"""Idea: tokens count in Hessians by how much they matter. An --idea of `python -m tools.explore`.

GPTQ minimizes the sum of |D x|² over tokens, where D are the errors of a layer's weights and x its
input, as if all tokens' outputs mattered alike. What errors cost the text is about the sum of
|g|² |D x|², where g is the gradient of the text's nats by a token's outputs. Here

    H = 2 sum w x x^T,        w = |g|² / mean |g|²,

for linear layers; the output matrix's H is as before. To compare both on the same weights, this is
done if GPTQ_BLOCK_SIZE is 64, and not if it is 128 (which changes no more than float32's rounding):
--requantize "tokens weighed: GPTQ_BLOCK_SIZE=64". Source: GuidedQuant, arXiv 2505.07004, which
weighs tokens for groups of rows, too.
"""

from functools import partial

import torch

WEIGHED_BLOCKS = 64


def inputs_and_gradients(script, model, batch):
    """Of each linear layer: name, inputs (tokens, columns), gradients of nats (tokens, rows)."""
    seen = []

    def hook(name, layer, positional, named, output):
        seen.append((name, layer.effective_input(*positional, **named).detach(), output))

    layers = model.linear_layers().items()
    hooks = [
        layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in layers
    ]
    whole = [module for module in model.modules() if isinstance(module, script.MLP)]
    fused = [module.can_fuse for module in whole]
    for module in whole:  # as one operator its matrices would have no outputs
        module.can_fuse = False
    try:
        hidden = model(batch, model.full_order)
        nats = model.nats(hidden[:, :-1], batch[:, 1:], batch[:, :-1]).sum()
        gradients = torch.autograd.grad(nats, [output for *_, output in seen])
    finally:
        for handle in hooks:
            handle.remove()
        for module, can in zip(whole, fused, strict=True):
            module.can_fuse = can
    for (name, x, _), gradient in zip(seen, gradients, strict=True):
        yield name, x.float().flatten(0, -2), gradient.float().flatten(0, -2)


def install(script) -> None:
    """Changes train_gpt.py's calibrate() and collect_costs()."""
    usual_calibrate = script.calibrate
    usual_costs = script.collect_costs

    def collect_costs(model, batches, ranks, with_energies: bool = False):
        """As the script's, weighed."""
        batches = list(batches)
        hessians, energies = usual_costs(model, batches, ranks, with_energies)
        weighed, sums, tokens = {}, {}, 0
        for batch in batches:
            for name, x, gradient in inputs_and_gradients(script, model, batch):
                weights = gradient.square().sum(1)
                weighed[name] = weighed.get(name, 0.0) + 2 * (x.T * weights) @ x
                sums[name] = sums.get(name, 0.0) + weights.sum()
            tokens += batch.numel()
        for name in sorted(weighed):
            mean = ranks.sum_(sums[name]) / (tokens * ranks.world_size)
            hessians[name] = ranks.sum_(weighed[name]) / mean
        return hessians, energies

    def calibrate(trainer, batches):
        """As the script's, with weighed tokens if asked for."""
        weighed = trainer.settings.gptq_block_size == WEIGHED_BLOCKS
        script.collect_costs = collect_costs if weighed else usual_costs
        return usual_calibrate(trainer, batches)

    script.calibrate = calibrate
