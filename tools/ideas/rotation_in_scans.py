"""Idea: the scans rotate keys and queries themselves. An --idea of `python -m bench.tune`.

rotate_features() writes keys and queries of each head, biased and rotated, which both scans read.
Here it writes cos and sin alone, and a scan makes keys and queries from these and from features,
which the heads share, so that a GPU's cache serves them: of the 24.6 units that the operator moves
(bench/NOTES.md) 4.8 go.

    IDEA_ROTATED=neither     or written: by the forward, for the backward to read;
                             or before: by the script's kernel, for both to read

What else is changed, in all three, is what it takes for two programs to share a multiprocessor:

- The state is kept as (P, N), so that of a tile that is computed, not loaded, each product but the
  first finds it in shared memory in one layout.
- A token's own share of its output, c_t (q_t . k_t) + skip, comes from scalars, not from a diagonal
  that is multiplied and added to: 64 fewer instructions and as many registers.
- A value that is decayed before the product, not after it, is loaded once ahead, not twice.

It needs a GPU of compute capability 9.0, a state as large as a head's channels, of which half or
all rotates.
"""

import os
import sys
from pathlib import Path

import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

if not __package__ and __name__ == "__main__":  # started by its path
    print("error: start python -m bench.tune --idea with this file's path", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from train_gpt import (
    COS,
    CURRENT,
    DECAY_SUM,
    KEY,
    KEY_LOG,
    KEY_QUERY,
    QUERY,
    SIN,
    STEP,
    column_indices,
    constexpr,
    decay_matrix,
    exact_dot,
    exp2_tile,
    feature_rows,
    gate_and_sigmoid,
    gate_backward,
    head_rows,
    jit,
    load_float,
    read_row,
    read_tile,
    turn_cos_sin,
    turn_places,
    write_tile,
)

ROTATED = os.environ.get("IDEA_ROTATED", "neither")


@jit
def rotate_features(scalars, features, half_turn, turns, biases, rotation, batch, S: constexpr):
    """Writes rotation for a chunk of one head, and scalars' KEY_QUERY."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    padded = tl.num_programs(0) * S.CHUNK
    head = (b * S.H + h).to(tl.int64)
    token = tl.program_id(0) * S.CHUNK + tl.arange(0, S.CHUNK)
    t = token[:, None]
    r = column_indices(S.R)
    turning = r < S.R
    half = load_float(half_turn + (b * padded + t) * S.R + r, turning)
    step = tl.load(scalars + head_rows(STEP, head, token, batch, padded, S))
    made = tl.cumsum(step[:, None] * half, axis=0)
    before = tl.load(turn_places(turns, b, h, r, S), turning, 0.0)
    cos, sin = turn_cos_sin(made + before)
    tl.store(rotation + head_rows(COS, head, t, batch, padded, S) * S.R + r, cos, turning)
    tl.store(rotation + head_rows(SIN, head, t, batch, padded, S) * S.R + r, sin, turning)
    n = tl.arange(0, S.N)[None, :]
    product = 1.0
    for k in tl.static_range(2):  # key, then query
        x = tl.load(feature_rows(features, k, b, t, batch, padded, S) + n)
        product *= x + tl.load(biases + (k * S.H + h) * S.N + n)
    key_query = tl.sum(product, axis=1)
    tl.store(scalars + head_rows(KEY_QUERY, head, token, batch, padded, S), key_query)


# Of a row, [even | odd], the first R of each half turn, and the others stay: none, or as many.
# Parted and joined again, each thread has what it computes with: nothing is exchanged.
@jit
def rotated_tile(features, biases, k, b, h, t, batch, cos, sin, S: constexpr):
    """A chunk's keys or queries (CHUNK, N) for one head, biased and rotated."""
    x = read_tile(features, [k * batch + b, t, 0])
    x += read_row(biases, [k * S.H + h, 0], S.N)[None, :]
    if S.R * 2 == S.N:
        pairs = tl.permute(tl.reshape(x, [S.CHUNK, 2, S.R]), [0, 2, 1])
    else:
        x = tl.permute(tl.reshape(x, [S.CHUNK, 2, 2, S.R]), [0, 3, 1, 2])
        pairs, others = tl.split(x)
    even, odd = tl.split(pairs)  # each (CHUNK, R)
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos).to(features.dtype)
    if S.R * 2 == S.N:
        x = tl.permute(turned, [0, 2, 1])
    else:
        x = tl.permute(tl.join(turned, others.to(features.dtype)), [0, 2, 3, 1])
    return tl.reshape(x, [S.CHUNK, S.N])


@jit
def rotate_chunk(features, rotation, biases, head, t, batch, S: constexpr):
    """A chunk's keys and queries for one head, each (CHUNK, N)."""
    turn = rotation.load([0, head, t, 0]).reshape(2, S.CHUNK, S.R).to(tl.float32)
    cos, sin = tl.split(tl.permute(turn, [1, 2, 0]))
    b = head // S.H
    h = head % S.H
    key = rotated_tile(features, biases, KEY, b, h, t, batch, cos, sin, S)
    query = rotated_tile(features, biases, QUERY, b, h, t, batch, cos, sin, S)
    return key, query


@jit
def read_or_rotate(features, rotation, biases, rotated, head, t, batch, S: constexpr):
    """What rotate_chunk() returns; without rotation it is read."""
    if rotation is None:
        key = read_tile(rotated, [batch * KEY * S.H + head, t, 0])
        query = read_tile(rotated, [batch * QUERY * S.H + head, t, 0])
    else:
        key, query = rotate_chunk(features, rotation, biases, head, t, batch, S)
    return key, query


@jit
def read_chunk(projected, scalars, decay_sums, skip, head, place, t, batch, S: constexpr):
    """A chunk's values for one head; D_C; and D, key_log, c and c (q . k) + skip, (CHUNK,) each."""
    heads = batch * S.H
    value = read_tile(projected, [head // S.H, t, (S.H + head % S.H) * S.P])
    end = tl.load(decay_sums + place * S.CHUNK + S.CHUNK - 1)
    decay_sum = read_row(scalars, [heads * DECAY_SUM + head, t], S.CHUNK)
    key_log = read_row(scalars, [heads * KEY_LOG + head, t], S.CHUNK)
    current = read_row(scalars, [heads * CURRENT + head, t], S.CHUNK)
    own = current * read_row(scalars, [heads * KEY_QUERY + head, t], S.CHUNK) + skip
    return value, end, decay_sum, key_log, current, own


@jit
def state_places(head, S: constexpr):
    """Where a head's state (P, N) lies among others."""
    square = tl.arange(0, S.P)[:, None] * S.N + tl.arange(0, S.N)[None, :]
    return square + head.to(tl.int64) * S.P * S.N


@jit
def scan_forward(
    projected,  # Tiles or tensor descriptors: (CHUNK, P)
    features,  # (CHUNK, N)
    rotation,  # (2, CHUNK, R), or None: rotated is read
    biases,  # (N,)
    rotated,  # else out, (CHUNK, N), or None
    y,  # out, (CHUNK, P)
    states,  # out, (P, N)
    scalars,  # (CHUNK,)
    decay_sums,  # from here on tensors: the plane DECAY_SUM of scalars
    skip,
    ssm_in,
    ssm_out,  # out
    squares,  # out
    batch,
    chunks,
    S: constexpr,
):
    """Goes through one head's chunks, and stores the state that enters each."""
    head = tl.program_id(0)
    b = head // S.H
    h = head % S.H
    i = tl.arange(0, S.CHUNK)
    square = state_places(head, S)
    d = tl.load(skip + h)
    ssm = tl.load(ssm_in + square)
    for chunk in tl.range(chunks, num_stages=3 if S.N <= 64 else 2):  # two programs fit
        t = chunk * S.CHUNK
        place = head * chunks + chunk
        value, end, decay_sum, key_log, current, own = read_chunk(
            projected, scalars, decay_sums, d, head, place, t, batch, S
        )
        key, query = read_or_rotate(features, rotation, biases, rotated, head, t, batch, S)
        if rotation is not None and rotated is not None:
            write_tile(rotated, [batch * KEY * S.H + head, t, 0], key)
            write_tile(rotated, [batch * QUERY * S.H + head, t, 0], query)
        dtype = value.dtype
        old = ssm.to(dtype)
        write_tile(states, [place, 0, 0], old)
        scores = exact_dot(query, tl.trans(key))
        exponents = decay_sum[:, None] - key_log[None, :]
        decayed = tl.where(i[:, None] > i[None, :], scores * exp2_tile(exponents), 0.0)
        decayed = tl.where(i[:, None] == i[None, :], own[:, None], decayed)
        out = exact_dot(query, tl.trans(old)) * exp2_tile(decay_sum)[:, None]
        out = exact_dot(decayed.to(dtype), value, out)
        gate, sigmoid = gate_and_sigmoid(read_tile(projected, [b, t, h * S.P]))
        out *= gate * sigmoid
        write_tile(y, [b, t, h * S.P], out)
        tl.store(squares + place * S.CHUNK + i, tl.sum(out * out, axis=1))
        to_end = (value * exp2_tile(end - key_log)[:, None]).to(dtype)
        ssm = exact_dot(tl.trans(to_end), key, ssm * exp2_tile(end))
    tl.store(ssm_out + square, ssm)


@jit
def turned_decay(decay_sum, key_log, current):
    """E transposed (CHUNK, CHUNK)."""
    i = tl.arange(0, current.shape[0])
    return decay_matrix(decay_sum[None, :] - key_log[:, None], i[:, None] < i[None, :], current)


@jit
def scan_backward(
    d_y,  # Tiles or tensor descriptors, as scan_forward's
    d_squares,
    projected,
    features,
    rotation,
    biases,
    rotated,
    y,
    states,
    d_projected,  # out: gate and value
    d_rotated,  # out
    scalars,
    decay_sums,  # from here on tensors
    skip,
    d_ssm_out,
    ssm_out,
    d_diagonal,  # out: diag(dM)
    d_end,  # out: sum(dh' ∘ h') over N, of each chunk: P numbers in the place of N
    d_ssm_in,  # out
    batch,
    chunks,
    S: constexpr,
):
    """Comes back through the chunks of scan_forward(), with the state's gradient in registers."""
    head = tl.program_id(0)
    square = state_places(head, S)
    d = tl.load(skip + head % S.H)
    i = tl.arange(0, S.CHUNK)
    same = i[:, None] == i[None, :]
    d_ssm = tl.load(d_ssm_out + square)
    at_end = tl.sum(d_ssm * tl.load(ssm_out + square), axis=1)  # unsummed over P: no barrier
    for back in tl.range(chunks, num_stages=2):
        t = (chunks - 1 - back) * S.CHUNK
        place = head * chunks + chunks - 1 - back
        tl.store(d_end + place * S.P + tl.arange(0, S.P), at_end)
        gates = [head // S.H, t, head % S.H * S.P]
        d_out = gate_backward(d_y, d_squares, projected, y, d_projected, gates, head)
        value, end, decay_sum, key_log, current, own = read_chunk(
            projected, scalars, decay_sums, d, head, place, t, batch, S
        )
        key, query = read_or_rotate(features, rotation, biases, rotated, head, t, batch, S)
        to_end = exp2_tile(end - key_log)[:, None]
        old = d_ssm.to(value.dtype)
        decay = turned_decay(decay_sum, key_log, current)
        decayed = tl.where(same, own[:, None], exact_dot(key, tl.trans(query)) * decay)
        d_value = exact_dot(decayed.to(key.dtype), d_out, exact_dot(key, tl.trans(old)) * to_end)
        write_tile(d_projected, [head // S.H, t, (S.H + head % S.H) * S.P], d_value)
        d_decayed = exact_dot(value, tl.trans(d_out))  # dM transposed
        tl.store(d_diagonal + place * S.CHUNK + i, tl.sum(tl.where(same, d_decayed, 0.0), axis=1))
        d_scores = (d_decayed * decay).to(value.dtype)
        d_key = exact_dot(d_scores, query, exact_dot((value * to_end).to(key.dtype), old))
        write_tile(d_rotated, [batch * KEY * S.H + head, t, 0], d_key)
        d_state = (d_out * exp2_tile(decay_sum)[:, None]).to(value.dtype)
        ssm = read_tile(states, [place, 0, 0])
        d_query = exact_dot(tl.trans(d_scores), key, exact_dot(d_state, ssm))
        write_tile(d_rotated, [batch * QUERY * S.H + head, t, 0], d_query)
        d_ssm = exact_dot(tl.trans(d_state), query, d_ssm * exp2_tile(end))
        at_end = tl.sum(d_ssm * ssm, axis=1)
    tl.store(d_ssm_in + square, d_ssm)


def launch_scan(kernel, named: dict) -> None:
    """Runs a program for each head, on tensor descriptors of what is read by tiles."""
    _, angles, heads, channels, state, chunk = named["S"]
    problem = why_not(named["S"])
    t.need(not problem, f"{Path(__file__).name} needs {problem}")
    blocks = dict.fromkeys(("projected", "y", "d_projected", "d_y"), [chunk, channels])
    blocks |= dict.fromkeys(("features", "rotated", "d_rotated"), [chunk, state])
    blocks |= {"states": [channels, state], "biases": [state]}
    blocks |= dict.fromkeys(("scalars", "d_squares"), [chunk])
    tiles = {"rotated": None, "rotation": None}
    if ROTATED == "neither":
        del blocks["rotated"]
    for name in blocks.keys() & named.keys():
        flat = named[name].flatten(0, -1 - len(blocks[name]))  # (planes, rows, columns)
        tiles[name] = TensorDescriptor.from_tensor(flat, [1, *blocks[name]])
    if ROTATED == "neither" or (ROTATED == "written" and kernel is scan_forward):
        rotation = named["rotation"].flatten(1, 2)  # (2, B · H, padded, R)
        tiles["rotation"] = TensorDescriptor.from_tensor(rotation, [2, 1, chunk, angles])
    t.launch(kernel, (heads * named["batch"],), named | tiles)


def why_not(sizes) -> str:
    """Why these kernels cannot run a layer of such ScanSizes; empty if they can."""
    if sizes.P != sizes.N:
        return "a state as large as a head's channels"
    if sizes.N // sizes.R not in (2, 4) or sizes.N % sizes.R:
        return "half or all of the state to rotate"
    return ""


def install(script) -> None:
    """Puts these kernels in the place of train_gpt.py's.

    rotated keeps its memory, which nothing reads: without, operators would return other shapes than
    compiled graphs in a cache expect.
    """
    forms = ("neither", "written", "before")
    script.need(ROTATED in forms, f"IDEA_ROTATED={ROTATED} should be one of {', '.join(forms)}")
    script.launch_scan = launch_scan
    if ROTATED != "before":
        script.rotate_features = rotate_features
    script.scan_forward = scan_forward
    script.scan_backward = scan_backward
