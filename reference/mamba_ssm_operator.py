"""The mamba_ssm library's Mamba-3 operator, to check our fused scan against and to time beside it.

It computes in bfloat16, angles included, and needs a GPU. requirements-cuda.txt installs it.
"""

import functools
import importlib.util

import torch
from torch import Tensor

import train_gpt as t

RESET_LOG_DECAY = -60.0  # a document start: exp(-60) = 1e-26, and sums of it keep float32's digits

# The library tunes its kernels by trial, for minutes. This is what that finds, by compute
# capability: pipeline stages, warps, registers per thread (None: the compiler's choice), and for
# two of them the chunk.
PINNED_KERNELS: dict[tuple[int, int], dict[str, tuple]] = {
    (9, 0): {  # NVIDIA H200
        "angle_dt_fwd_kernel": (3, 4, None, None),
        "angle_dt_bwd_kernel": (3, 8, None, None),
        "mamba3_siso_fwd_kernel": (3, 4, None, None),
        "mamba3_siso_bwd_kernel_dzdo": (1, 8, None, 32),
        "mamba3_siso_bwd_kernel_dqkv": (2, 4, None, None),
        "mamba3_siso_bwd_kernel_rotary_bias_angles": (3, 4, None, None),
        "mamba3_siso_bwd_kernel_ddt_dtrap_dinput_states": (1, 8, None, 256),
    },
}


def is_installed() -> bool:
    """Whether the library can be imported; nothing is."""
    return importlib.util.find_spec("mamba_ssm") is not None


@functools.cache
def library_operator():
    """mamba3_siso_combined(), its kernels pinned where this GPU was measured."""
    import triton
    from mamba_ssm.ops.triton.mamba3 import (
        angle_dt,
        mamba3_siso_bwd,
        mamba3_siso_combined,
        mamba3_siso_fwd,
    )

    pinned = PINNED_KERNELS.get(torch.cuda.get_device_capability(), {})
    for name, (stages, warps, registers, chunk) in pinned.items():
        options = {} if chunk is None else {"CHUNK_SIZE": chunk}
        config = triton.Config(options, num_stages=stages, num_warps=warps, maxnreg=registers)
        for module in (angle_dt, mamba3_siso_fwd, mamba3_siso_bwd):
            if hasattr(module, name):
                getattr(module, name).configs = [config]
    return mamba3_siso_combined.mamba3_siso_combined


def library_tensors(inputs: t.ScanInputs) -> tuple[Tensor | None, ...]:
    """A scan's inputs as the library takes them, Q to Z: per-token numbers (B, H, L), an angle for
    every head. Parts that are switched off take values that do nothing.
    """
    bf16 = torch.bfloat16
    heads = inputs.value.shape[2]
    trapezoid = inputs.trapezoid
    angle_rate = inputs.angle_rate
    log_decay = inputs.log_decay
    if trapezoid is None:
        trapezoid = torch.full_like(inputs.step_size, 30.0)  # sigmoid(30) = 1 in float32
    if angle_rate is None:
        angle_rate = inputs.key.new_zeros(*inputs.key.shape[:2], inputs.key.shape[-1] // 4)
    if inputs.document_start is not None:
        log_decay = log_decay.masked_fill(inputs.document_start.unsqueeze(-1), RESET_LOG_DECAY)
    # One query and key for all heads, and the angles of all.
    query = inputs.query.to(bf16).unsqueeze(2)
    key = inputs.key.to(bf16).unsqueeze(2)
    angles = angle_rate.to(bf16).unsqueeze(2).expand(-1, -1, heads, -1).contiguous()
    per_token = (log_decay, inputs.step_size, trapezoid.to(bf16))
    log_decay, step_size, trapezoid = (x.transpose(1, 2).contiguous() for x in per_token)
    # The library would copy a value that is not contiguous four times, once for each kernel.
    value = inputs.value.to(bf16).contiguous()
    gate = inputs.gate.to(bf16).contiguous()
    biases = (inputs.query_bias.float(), inputs.key_bias.float())
    skip = inputs.skip.float()
    return (query, key, value, log_decay, step_size, trapezoid, *biases, angles, skip, gate)


def mamba_ssm_scan(
    inputs: t.ScanInputs, state: t.ScanState | None, chunk_size: int
) -> tuple[Tensor, t.ScanState]:
    """What chunked_scan() computes, by the library. No gradient flows through states."""
    states = None
    if state is not None:
        angle = state.angle
        # Without rotations the library still wants angles, which stay zero.
        if inputs.angle_rate is None:
            angle = state.key.new_zeros(*state.key.shape[:2], inputs.key.shape[-1] // 4)
        states = (angle.bfloat16(), state.ssm.float(), state.key.float(), state.value.bfloat16())
        states = tuple(x.detach().contiguous() for x in states)
    y, *final = library_operator()(
        *library_tensors(inputs),
        Input_States=states,
        chunk_size=chunk_size,
        return_final_states=True,
    )
    return y.to(inputs.value.dtype), t.ScanState(*(x.detach().float() for x in final))
