"""Model: its shape, the order of its layers, and the documents it keeps apart."""

import dataclasses

import pytest
import torch
from torch import nn

import train_gpt as t
from tests.support import SOLO, gradients, random_model, random_tokens, relative, tiny

# Every mixer, with everything that looks back.
VARIANTS = {
    "hybrid": {},
    "recurrent": {"layer_order": "0,1,2,1,2"},
    "Mamba-2": {"mamba_version": 2, "mamba_layers": "all"},
    "attention": {"mamba_layers": "none", "rope_fraction": 0.5},
    "untied": {"tie_embeddings": False, "ln_scale": True, "rope_base": 100.0, "xsa_last_n": 2},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def hidden(model: t.Model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, model.order(True))


def test_peer7_has_the_published_parameters_but_for_scales_norms_and_gates():
    """Numbers, not vectors, on what its 7 layers add and mix, 2 each, and on its 3 skips; 2
    attention gates.
    """
    settings, _ = t.read_settings({"PRESET": "peer7"})
    with torch.device("meta"):
        model = t.Model(settings, torch.device("meta"))
    assert (
        sum(p.numel() for p in model.parameters())
        == 25_159_984 - 7 * (4 * 512 - 2) - 3 * 511 + 2 * 8 * 16
    )


@pytest.mark.parametrize("variant", [*VARIANTS.values(), {"bigram_vocab_size": 0}], ids=str)
def test_every_parameter_gets_a_gradient(variant):
    model = random_model(tiny(**variant))
    tokens = random_tokens(2, 33)
    model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_the_first_model_predicts_nothing_and_is_the_same_for_the_same_seed():
    """Blocks start as zero: the initial loss is that of the embedding alone, close to uniform."""
    first, again = (t.build_model(tiny(seed=3), SOLO) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    tokens = random_tokens(4, 33)
    loss = first.loss(tokens[:, :-1], tokens[:, 1:], first.order(True))
    assert abs(loss.item() - torch.tensor(512.0).log().item()) < 0.05


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_nats_are_a_softmax_over_the_whole_vocabulary(cap):
    """exp(-nats) over all possible targets sums to 1, under any softcap."""
    model = random_model(tiny(logit_softcap=cap))
    with torch.no_grad():
        h = hidden(model, random_tokens(1, 5))
        total = sum(
            torch.exp(-model.nats(h, torch.full((1, 5), token)).double()) for token in range(512)
        )
        largest = model.logits(h).abs().max()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-4)
    assert cap == 0.0 or largest <= cap


# ---- The order of layers -------------------------------------------------------------------------


def names(settings: t.Settings) -> str:
    mamba = t.parse_layers(settings, "mamba_layers")
    return " ".join(f"{'AM'[i in mamba]}{i}" for i in t.parse_layers(settings, "layer_order"))


EIGHT = {"num_layers": 8, "mamba_layers": "0-3,5-7"}


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({}, "M0 M1 M2 M3 A4 M5 M6 M7"),
        ({"layer_order": "0-7"}, "M0 M1 M2 M3 A4 M5 M6 M7"),
        ({"layer_order": "0-4,3,4,3-7"}, "M0 M1 M2 M3 A4 M3 A4 M3 A4 M5 M6 M7"),
        ({"layer_order": "0-2,2,3,3,4,4,5,5-7"}, "M0 M1 M2 M2 M3 M3 A4 A4 M5 M5 M6 M7"),
        ({"layer_order": "7,6,5,4,3,2,1,0"}, "M7 M6 M5 A4 M3 M2 M1 M0"),
    ],
    ids=str,
)
def test_order_of_layers(changes, order):
    settings = tiny(**EIGHT, **changes)
    t.validate_settings(settings, 1)
    assert names(settings) == order


class Mark(nn.Module):
    """Stands in for a block: adds 1 to one channel of the residual stream and notes that it ran."""

    def __init__(self, layer: int, ran: list[int]):
        super().__init__()
        self.layer, self.ran = layer, ran

    def forward(self, x, embedded, context, state=None):
        self.ran.append(self.layer)
        x = x.clone()
        x[..., self.layer] += 1
        return x, state


def test_skips_pair_the_first_virtual_layers_with_the_last_innermost_first():
    """Five virtual layers: 4th gets what the 2nd left, 5th what the 1st left, each by its own
    weight.
    """
    model = random_model(
        tiny(num_layers=4, mamba_layers="all", layer_order="0,1,1-3", bigram_vocab_size=0)
    )
    ran: list[int] = []
    model.blocks = nn.ModuleList(Mark(layer, ran) for layer in range(4))
    tokens = random_tokens(1, 3)
    x = t.norm(torch.nn.functional.embedding(tokens, model.embedding.weight))
    one = torch.eye(32)
    after_first = x + one[0]
    after_second = after_first + one[1]
    after_fourth = after_second + one[1] + model.skip_weights[0] * after_second + one[2]
    expected = after_fourth + model.skip_weights[1] * after_first + one[3]
    assert model.skip_weights.shape == (2,)
    assert relative(hidden(model, tokens), t.norm(expected)) < 1e-6
    assert ran == [0, 1, 1, 2, 3]


def test_repeated_layers_share_their_weights():
    plain, hinge = (
        t.build_model(tiny(layer_order=order, unet_skips=False), SOLO)
        for order in ("all", "0-2,1,2")
    )
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in hinge.parameters())
    assert hinge.order(False) == plain.order(True) == (0, 1, 2)
    assert hinge.order(True) == (0, 1, 2, 1, 2)


# ---- Documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"mamba_version": 2}], ids=str)
@torch.no_grad()
def test_without_attention_documents_in_one_sequence_equal_each_alone(variant):
    """Scan and bigram stop at BOS, though a convolution does not."""
    model = random_model(tiny(document_reset=True, mamba_layers="all", **variant))
    for block in model.blocks:
        block.mixer.conv = None
    first, second = random_tokens(1, 13, seed=1, bos=True), random_tokens(1, 19, seed=2, bos=True)
    packed = hidden(model, torch.cat([first, second], dim=1))
    assert relative(packed[:, :13], hidden(model, first)) < 1e-5
    assert relative(packed[:, 13:], hidden(model, second)) < 1e-5


@each_variant
@torch.no_grad()
def test_without_document_reset_a_document_sees_the_one_before(variant):
    model = random_model(tiny(**variant))
    first, second = random_tokens(1, 13, seed=1, bos=True), random_tokens(1, 19, seed=2, bos=True)
    packed = hidden(model, torch.cat([first, second], dim=1))
    assert relative(packed[:, 13:], hidden(model, second)) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"document_reset": True}, {"mamba_version": 2}], ids=str)
@torch.no_grad()
def test_hidden_states_do_not_depend_on_later_tokens(changes):
    model = random_model(tiny(**changes))
    tokens = random_tokens(1, 32, bos=True)
    for position in (0, 7, 20):
        changed = torch.cat(
            [tokens[:, : position + 1], random_tokens(1, 31 - position, seed=5)], dim=1
        )
        h, other = hidden(model, tokens), hidden(model, changed)
        assert torch.equal(h[:, : position + 1], other[:, : position + 1])
        assert not torch.equal(h[:, position + 1], other[:, position + 1])


# ---- Parts ---------------------------------------------------------------------------------------


def test_partial_rotary_embedding_leaves_the_other_dimensions_alone_and_sees_only_distances():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 10, 2, 16, generator=generator)
    frequencies = 100.0 ** -(torch.arange(3) / 3)

    def rotate(x: torch.Tensor, offset: float) -> torch.Tensor:
        angles = (torch.arange(10) + offset)[:, None] * frequencies
        return t.rotary(x, torch.stack([angles.cos(), angles.sin()]))

    turned = rotate(query, 0.0)
    assert torch.equal(turned[..., 6:], query[..., 6:])
    assert torch.equal(turned[:, 0], query[:, 0])
    assert (turned[:, 1:, :, :6] != query[:, 1:, :, :6]).all()
    scores = [torch.einsum("bthd,bshd->bhts", rotate(query, o), rotate(key, o)) for o in (0.0, 7.0)]
    assert torch.allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(("fraction", "pairs"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
@torch.no_grad()
def test_rope_fraction_sets_how_many_pairs_rotate(fraction, pairs):
    model = random_model(tiny(rope_fraction=fraction))
    assert model.rotary_table.shape == (2, model.settings.train_seq_len, pairs)
    assert hidden(model, random_tokens(1, 8)).isfinite().all()


@torch.no_grad()
def test_attention_follows_its_definition():
    """Normed queries with a gain and normed keys, rotated; two query heads on each key head; one
    softmax per query; a gate on each head, between 0 and 2, that the first 16 channels open.
    """
    settings = tiny(num_layers=1, mamba_layers="none", rope_fraction=0.5)
    model = random_model(settings)
    block, x = model.blocks[0].mixer, torch.randn(1, 9, 32)
    y, _ = block(x, t.Context(None, model.rotary_table[:, :9]))

    def rms_normed(v: torch.Tensor) -> torch.Tensor:
        return v / v.square().mean(-1, keepdim=True).sqrt()

    turn = torch.exp(1j * torch.arange(9)[:, None] * 10_000.0 ** -(torch.arange(2) / 2))

    def rotated(v: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(v[:, :2], v[:, 2:4]) * turn
        return torch.cat([pairs.real, pairs.imag, v[:, 4:]], dim=1)

    heads = []
    for head in range(4):
        q = (
            rms_normed(x[0] @ block.query.weight[8 * head : 8 * head + 8].T)
            * block.query_gain[head]
        )
        shared = slice(8 * (head // 2), 8 * (head // 2) + 8)
        k, v = rms_normed(x[0] @ block.key.weight[shared].T), x[0] @ block.value.weight[shared].T
        scores = (rotated(q) @ rotated(k).T / 8**0.5).masked_fill(
            torch.ones(9, 9).triu(1).bool(), -torch.inf
        )
        gate = 2 / (1 + torch.exp(-x[0, :, :16] @ block.gate[head]))
        heads.append(scores.softmax(-1) @ v * gate[:, None])
    assert relative(y[0], torch.cat(heads, dim=1) @ block.out.weight.T) < 1e-5


@pytest.mark.parametrize("decay", ["softplus", "heavy_tail"])
@torch.no_grad()
def test_the_mamba3_block_feeds_the_scan_what_its_definition_says(decay):
    """in_proj gives z, x, B, C, step size, decay, trapezoid and angles, in this order; B and C are
    normed, then biased; what comes out of the scan is normed before out_proj.
    """
    settings = tiny(num_layers=1, mamba_layers="all", scan_backend="sequential", mamba_decay=decay)
    model = random_model(settings)
    block, u = model.blocks[0].mixer, torch.randn(2, 9, 32)
    y, _ = block(u, t.Context(None, model.rotary_table[:, :9]))
    projected = u @ block.in_proj.weight.T
    z, x, b, c = (
        projected[..., :64],
        projected[..., 64:128],
        projected[..., 128:136],
        projected[..., 136:144],
    )
    dt, a, trapezoid, angle = (projected[..., 144 + 4 * i : 148 + 4 * i] for i in range(4))
    assert angle.shape[-1] == 2  # 4 heads; half of the 8 state numbers rotate, in pairs

    def normed(v: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    dt = torch.log1p(torch.exp(dt + block.dt_bias))
    if decay == "softplus":
        rate = torch.log1p(torch.exp(a))
    else:
        rate = torch.tensor([1 + v if v > 0 else 1 / (1 - v) for v in a.flatten().tolist()]).view(
            a.shape
        )
    inputs = t.ScanInputs(
        x.view(2, 9, 4, 16), normed(b, block.B_norm), normed(c, block.C_norm), dt, -rate * dt,
        block.B_bias, block.C_bias, block.D, z.view(2, 9, 4, 16), trapezoid, angle,
    )  # fmt: skip
    scanned = t.sequential_scan(inputs, None)[0].flatten(2)
    assert relative(y, normed(scanned) @ block.out_proj.weight.T) < 1e-5


@torch.no_grad()
def test_the_mamba2_block_has_its_convolution_in_front_and_its_gate_and_norm_at_the_end():
    settings = tiny(num_layers=1, mamba_layers="all", mamba_version=2, scan_backend="sequential")
    model = random_model(settings)
    block, u = model.blocks[0].mixer, torch.randn(2, 9, 32)
    y, _ = block(u, t.Context(None, model.rotary_table[:, :9]))
    projected = u @ block.in_proj.weight.T
    convolved = torch.nn.functional.conv1d(
        torch.nn.functional.pad(projected[..., 64:144].mT, (3, 0)),
        block.conv.weight[:, None],
        block.conv.bias,
        groups=80,
    ).mT
    x, b, c = torch.nn.functional.silu(convolved).split([64, 8, 8], dim=-1)
    dt = torch.log1p(torch.exp(projected[..., 144:] + block.dt_bias))
    no_bias = torch.zeros(4, 8)
    inputs = t.ScanInputs(
        x.reshape(2, 9, 4, 16), b, c, dt, -torch.exp(block.A_log) * dt, no_bias, no_bias, block.D,
        projected[..., :64].view(2, 9, 4, 16),
    )  # fmt: skip
    gated = t.sequential_scan(inputs, None)[0].flatten(2)
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert relative(y, normed @ block.out_proj.weight.T) < 1e-5


def test_grouped_query_attention_repeats_keys_in_consecutive_groups():
    """Query heads 0 and 1 read key head 0, query heads 2 and 3 key head 1."""
    query, key, value = (torch.randn(1, 5, heads, 8) for heads in (4, 2, 2))
    repeated = (x.repeat_interleave(2, dim=2) for x in (key, value))
    expected = t.attend(query, *repeated, None, "auto")
    assert relative(t.attend(query, key, value, None, "auto"), expected) < 1e-6


def test_sequential_and_chunked_backends_train_alike():
    chunked = gradients(random_model(tiny(scan_backend="chunked")))
    sequential = gradients(random_model(tiny(scan_backend="sequential")))
    assert all(relative(sequential[name], gradient) < 1e-4 for name, gradient in chunked.items())


@pytest.mark.parametrize(
    "changes",
    [{"layer_order": "0,1,1"}, {"mamba_version": 2, "document_reset": True}],
    ids=["Mamba-3", "Mamba-2"],
)
def test_the_whole_model_compiles_as_one_graph_in_either_order(changes):
    """fullgraph=True fails at anything Dynamo cannot trace, forward and backward."""
    settings = tiny(num_layers=2, mamba_layers="0", train_seq_len=16, **changes)
    model = random_model(settings)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True, dynamic=False)
    tokens = random_tokens(2, 17)
    for order in sorted({model.order(False), model.order(True)}):
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], order)
        loss.backward()
        expected = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        model.zero_grad()
        compiled_loss = compiled(tokens[:, :-1], tokens[:, 1:], order)
        compiled_loss.backward()
        assert torch.allclose(compiled_loss, loss, rtol=1e-6)
        for name, gradient in expected.items():
            assert relative(dict(model.named_parameters())[name].grad, gradient) < 1e-4, name


@pytest.mark.parametrize("changes", [{}, {"mamba_version": 2}, {"mamba_layers": "none"}], ids=str)
def test_every_variant_learns(changes):
    """Twenty steps on one batch of a repeating text bring the loss well below uniform."""
    settings = dataclasses.replace(tiny(**changes), matrix_lr=0.02)
    model = t.build_model(settings, SOLO)
    optimizers = t.Optimizers(model, settings, SOLO)
    tokens = random_tokens(1, 8).repeat(4, 5)[:, :33]
    losses = []
    for _ in range(20):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True))
        loss.backward()
        optimizers.step(1.0, 0.9)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
