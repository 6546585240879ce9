"""Finds the launch configurations of mamba_ssm's Mamba-3 kernels on this GPU: python bench/tune_mamba_ssm.py

Prints an entry for PINNED_KERNELS in train_gpt.py. The library tries the same configurations at first use; pinning the
outcome saves minutes of every start and makes runs repeatable. Fewer configurations are tried here than there: a limit
of 256 registers is the compiler's own, and the small kernels are bound by memory whatever their shape.
"""

import importlib
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

KERNELS = {
    "angle_dt": ("angle_dt_fwd_kernel", "angle_dt_bwd_kernel"),
    "mamba3_siso_fwd": ("mamba3_siso_fwd_kernel",),
    "mamba3_siso_bwd": (
        "mamba3_siso_bwd_kernel_dzdo",
        "mamba3_siso_bwd_kernel_dqkv",
        "mamba3_siso_bwd_kernel_rotary_bias_angles",
        "mamba3_siso_bwd_kernel_ddt_dtrap_dinput_states",
    ),
}


def main() -> None:
    kernels = {}
    for module_name, names in KERNELS.items():
        module = importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{module_name}")
        for name in names:
            kernel = kernels[name] = getattr(module, name)
            small = name.endswith(("dzdo", "dinput_states"))
            kernel.configs = [
                c
                for c in kernel.configs
                if c.maxnreg != 256 and c.num_warps > 2 and (not small or (c.maxnreg is None and c.num_stages == 1))
            ]
    t.PINNED_KERNELS.clear()
    settings, _ = t.read_settings({"PRESET": "peer7"})
    device = torch.device("cuda")
    mixer = t.Mamba(settings, device).to(device)
    torch.nn.init.normal_(mixer.out_proj.weight, std=0.02)
    context = t.Context(None, None, None, None, 0)
    u = torch.randn(32, 4096, settings.model_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    started = time.perf_counter()
    mixer(u, context, None)[0].sum().backward()
    torch.cuda.synchronize()
    print(f"tuned in {time.perf_counter() - started:.0f}s")
    print(f"    {torch.cuda.get_device_capability()}: {{  # {torch.cuda.get_device_name()}")
    for name, kernel in kernels.items():
        best = kernel.best_config
        entry = (best.num_stages, best.num_warps, best.maxnreg, best.kwargs.get("CHUNK_SIZE"))
        print(f'        "{name}": {entry},')
    print("    },")


if __name__ == "__main__":
    main()
