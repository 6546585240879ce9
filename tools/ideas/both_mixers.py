"""Idea: attention layers are Mamba's, too, each with half. An --idea of `python -m tools.explore`.

From one normed input x (..., width) such a layer makes, like hybrids within a layer (arXiv
2510.04800: both parts normed, side by side before the output matrix; also Hymba, arXiv 2411.13676)

    y = [W_a W_m] [norm(a); norm(m)] = W_a a / rms(a) + W_m m / rms(m)

a (..., width / 2): Attention with half the query heads and half the key/value heads, of the usual
size, after their gates. m (..., width / 2): Mamba with heads of half the usual channels and the
usual state, after its gates; that norm is the script's own. Norms have no weights, since W's
columns can learn them, so their factors follow W as in Mamba. Layers keep the states of both parts,
so that all of EVAL_MODE, documents' branches and generating work as before.

With PRESET=short, layers 2 and 6 then have 4 query heads and 2 key/value heads of 64, and 8 Mamba
heads of 32: 37,101,568 numbers in matrices, 0.47 % more than without. 3 Mamba heads of 64 would be
0.11 % fewer numbers, but rows of 537, where the scan's kernels need multiples of 8. These layers'
in_proj has no products of 8-bit floats, whose tiles need 64. Other layers' first weights do not
change.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn


class BothState(NamedTuple):
    """What a layer keeps of a stream for the tokens that follow."""

    attention: NamedTuple  # AttentionState, or None where nobody carries states
    mamba: NamedTuple  # MambaState


class BothMixers(nn.Module):
    """A mixer of two, the script's Attention and Mamba, that read the same tokens."""

    def __init__(self, attention: nn.Module, mamba: nn.Module):
        super().__init__()
        self.attention = attention
        self.mamba = mamba

    def forward(self, x, context, state=None):
        """A mixer's forward(), see Block."""
        before = state or BothState(None, None)
        attended, kept = self.attention(x, context, before.attention)
        context = context._replace(float8="none")  # whose tiles in_proj's rows do not fill
        scanned, left = self.mamba(x, context, before.mamba)
        return attended + scanned, BothState(kept, left)

    def new_state(self, batch: int, kept: int, dtype: torch.dtype) -> BothState:
        """The state before a text's first token: attention's of `kept` tokens, and Mamba's."""
        shape = batch, kept, dtype
        return BothState(self.attention.new_state(*shape), self.mamba.new_state(*shape))


def halved(script, settings, scan_backend: str, device):
    """The settings of the layers' Mamba; UserError where a half cannot be, or not be scanned."""
    for name in ("num_heads", "num_kv_heads"):
        even = getattr(settings, name) % 2 == 0
        script.check(settings, name, even, "cannot be halved for both_mixers.py")
    channels = settings.mamba_head_dim // 2
    own = replace(settings, mamba_expand=0.5, mamba_head_dim=channels)
    problem = "halved does not divide half of MODEL_DIM"
    script.check(settings, "mamba_head_dim", own.mamba_inner_dim % channels == 0, problem)
    reason = "" if device.type == "meta" else script.why_not(scan_backend, own, device)
    script.need(not reason, f"both_mixers.py: SCAN_BACKEND={scan_backend} {reason}, at half sizes")
    return own


def install(script) -> None:
    """Changes train_gpt.py's Block, and which products it asks for 8-bit floats."""
    usual_float8 = script.why_not_float8

    class NormedLinear(script.Linear):
        """y = W x / rms(x): as Mamba's out_proj, whose scan has the mean squares already."""

        def factor(self, x):
            """1 / rms of the rows of x (..., inputs): (..., 1), float32 or more."""
            mean_square = script.widened(x).square().mean(-1, keepdim=True)
            return (mean_square + script.SCAN_NORM_EPS).rsqrt()

        def forward(self, x):
            """x (..., inputs) -> (..., outputs), in x's dtype."""
            return super().forward(x, self.factor(x))

        def effective_input(self, x):
            """What W is applied to, float32 or more: for GPTQ's Hessian and documents' branches."""
            return super().effective_input(x, self.factor(x))

    class HalfAttention(script.Attention):
        """Attention with half the heads, whose output matrix reads their normed outputs."""

        def __init__(self, settings, exclusive: bool):
            super().__init__(settings, exclusive)
            width = settings.model_dim
            heads = settings.num_heads // 2
            inner = heads * self.head_dim
            kv_width = settings.num_kv_heads // 2 * self.head_dim
            self.query = script.Linear(width, inner)
            self.key = script.Linear(width, kv_width)
            self.value = script.Linear(width, kv_width)
            self.out = NormedLinear(inner, width, zero=True)
            self.query_gain = nn.Parameter(self.query_gain.detach()[:heads].clone())
            self.gate = nn.Parameter(self.gate.detach()[:heads].clone())

    class Block(script.Block):
        """Has both mixers where it had attention."""

        def __init__(self, settings, layer: int, scan_backend: str, device):
            super().__init__(settings, layer, scan_backend, device)
            if isinstance(self.mixer, script.Attention):
                own = halved(script, settings, scan_backend, device)
                with torch.random.fork_rng(devices=[]):  # others begin as they would
                    torch.default_generator.manual_seed(settings.seed + 1 + layer)
                    attention = HalfAttention(settings, self.mixer.exclusive)
                    self.mixer = BothMixers(attention, script.Mamba(own, scan_backend))

    def why_not_float8(model, products: str, device) -> str:
        """As the script's, of all products but those that keep bfloat16."""
        layers = model.linear_layers()
        asked = {name: layer for name, layer in layers.items() if ".mixer.mamba." not in name}
        kept = {"compute_dtype": model.compute_dtype, "linear_layers": lambda: asked}
        return usual_float8(SimpleNamespace(**kept), products, device)

    script.Block = Block
    script.why_not_float8 = why_not_float8
