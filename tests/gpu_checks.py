"""Checks that need a CUDA GPU with mamba_ssm.

    python tests/gpu_checks.py [scans] [attention] [model]

Compares every fast path with its slow reference, on fresh random inputs, by norm-relative error. Prints a table and
exits with status 1 if a row fails.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

BF16_TOLERANCE = 2e-2  # bf16 operands leave 1e-3 to 1e-2; the library also rounds angles to bf16
DEVICE = torch.device("cuda")
failures = 0


def check(name: str, error: float, tolerance: float) -> None:
    """Prints one row and remembers a failure; NaN fails."""
    global failures
    good = error <= tolerance
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {name:70} {error:.2e} (at most {tolerance:.0e})", flush=True)


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    result, reference = result.detach().double(), reference.detach().double()
    return float((result - reference).norm() / reference.norm().clamp_min(1e-30))


def scan_inputs(batch, length, heads, channels, state_size, angles, gate, resets, mamba2=False) -> t.ScanInputs:
    def normal(*shape):
        return torch.randn(*shape, device=DEVICE).bfloat16().float()

    step_size = torch.nn.functional.softplus(torch.randn(batch, length, heads, device=DEVICE) - 3)
    log_decay = -step_size * torch.nn.functional.softplus(torch.randn(batch, length, heads, device=DEVICE))
    return t.ScanInputs(
        normal(batch, length, heads, channels),
        normal(batch, length, state_size),
        normal(batch, length, state_size),
        step_size,
        log_decay,
        torch.zeros(heads, state_size, device=DEVICE) if mamba2 else 1 + 0.1 * normal(heads, state_size),
        torch.zeros(heads, state_size, device=DEVICE) if mamba2 else 1 + 0.1 * normal(heads, state_size),
        normal(heads),
        None if mamba2 else normal(batch, length, heads),
        None if mamba2 else normal(batch, length, angles),
        normal(batch, length, heads, channels) if gate else None,
        torch.rand(batch, length, device=DEVICE) < 0.02 if resets else None,
    )


def differentiable(inputs: t.ScanInputs) -> t.ScanInputs:
    return t.ScanInputs(
        *(x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs)
    )


def check_scans() -> None:
    cases = [
        ("heads 16×64, state 64", (2, 512, 16, 64, 64, 16, True, False, False)),
        ("heads 16×64, state 64, odd length", (2, 333, 16, 64, 64, 16, True, False, False)),
        ("heads 4×64, state 128, all rotate, no gate", (2, 256, 4, 64, 128, 64, False, False, False)),
        ("heads 16×64, state 64, documents", (2, 512, 16, 64, 64, 16, True, True, False)),
        ("Mamba-2 form", (2, 512, 16, 64, 64, 0, False, True, True)),
    ]
    for name, case in cases:
        inputs = scan_inputs(*case)
        exact = t.ScanInputs(*(x.double() if x is not None and x.is_floating_point() else x for x in inputs))
        grad = torch.randn_like(inputs.value)
        outcomes = []
        for backend, version in (("chunked", exact), ("chunked", inputs), ("mamba_ssm", inputs)):
            leaves = differentiable(version)
            y, state = t.scan(leaves, None, backend, 64)
            names = [n for n, x in zip(leaves._fields, leaves) if x is not None and x.requires_grad]
            wanted = [getattr(leaves, n) for n in names]
            outcomes.append((y, state, dict(zip(names, torch.autograd.grad(y, wanted, grad.to(y.dtype))))))
        (y, state, grads), chunked, fused = outcomes
        check(f"chunked float32: {name}: y", relative(chunked[0], y), 1e-4)
        check(f"mamba_ssm: {name}: y", relative(fused[0], y), BF16_TOLERANCE)
        check(
            f"mamba_ssm: {name}: final state",
            relative(fused[1].ssm, state.ssm) if case[5] == 0 else invariant(fused[1], state),
            BF16_TOLERANCE,
        )
        for key in grads:
            check(f"mamba_ssm: {name}: d {key}", relative(fused[2][key], grads[key]), 3 * BF16_TOLERANCE)
        # A sequence in two calls is the sequence in one.
        half = 192
        first = t.ScanInputs(
            *(
                x[:, :half] if x is not None and x.dim() > 2 or x is inputs.document_start and x is not None else x
                for x in inputs
            )
        )
        second = t.ScanInputs(
            *(
                x[:, half:] if x is not None and x.dim() > 2 or x is inputs.document_start and x is not None else x
                for x in inputs
            )
        )
        with torch.no_grad():
            y1, carried = t.scan(first, None, "mamba_ssm", 64)
            y2, _ = t.scan(second, carried, "mamba_ssm", 64)
        check(f"mamba_ssm: {name}: state carry", relative(torch.cat([y1, y2], 1), y), BF16_TOLERANCE)


def invariant(result: t.ScanState, reference: t.ScanState) -> float:
    """Error of the state in a frame without rotation: S as rotated back by the angle it goes with."""
    back = [t.rotate_pairs(s.ssm.double(), -s.angle.double().unsqueeze(2)) for s in (result, reference)]
    return relative(*back)


def check_attention() -> None:
    query = torch.randn(2, 512, 8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(2, 512, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    leaves = (query, key, value)
    mask = torch.ones(512, 512, dtype=torch.bool, device=DEVICE).tril().expand(2, 1, -1, -1)
    t.choose_attention_backend("math", DEVICE, 8, 4, 64)
    exact = t.sdpa(*(x.float() for x in leaves), mask)
    grad = torch.randn_like(query)
    exact_grads = torch.autograd.grad(exact, leaves, grad.float())
    for name in t.ATTENTION_BACKENDS:
        try:
            t.choose_attention_backend(name, DEVICE, 8, 4, 64)
        except t.UserError as error:
            print(f"skip attention {name}: {error}")
            continue
        y = t.ATTENTION_BACKENDS[name](*leaves)
        check(f"attention {name}: y", relative(y, exact), BF16_TOLERANCE)
        for leaf, a, b in zip("qkv", torch.autograd.grad(y, leaves, grad), exact_grads):
            check(f"attention {name}: d {leaf}", relative(a, b), BF16_TOLERANCE)
    print("auto attention backend:", t.choose_attention_backend("auto", DEVICE, 8, 4, 64))


def check_model(**overrides) -> None:
    """A compiled model (one whole graph) against the same weights in float32 on the CPU with the chunked scan."""
    environment = {
        "NUM_LAYERS": "4", "MAMBA_LAYERS": "0,1,3", "MODEL_DIM": "256", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
        "TRAIN_SEQ_LEN": "512", "RECUR_LAYERS": "1,2", "VOCAB_SIZE": "1024", "RECUR_START": "0",
    }  # fmt: skip
    environment |= {k.upper(): str(v) for k, v in overrides.items()}
    settings, _ = t.read_settings(environment)
    t.validate_settings(settings, 1)
    gpu = t.build_model(settings, t.Ranks(0, 1, DEVICE))
    with torch.no_grad():
        for p in gpu.parameters():
            p.add_(0.02 * torch.randn_like(p))
    cpu_settings = dataclasses.replace(settings, scan_backend="chunked", attention_backend="math")
    cpu = t.build_model(cpu_settings, t.Ranks(0, 1, torch.device("cpu")))
    cpu.load_state_dict({k: v.cpu() for k, v in gpu.state_dict().items()})
    tokens = torch.randint(2, 1024, (4, 513))
    tokens[:, ::100] = t.BOS_ID
    label = " ".join(f"{k}={v}" for k, v in overrides.items()) or "default blocks"
    compiled = t.maybe_compile(gpu.loss, settings, t.Ranks(0, 1, DEVICE))
    for recurrent in (False, True):
        order = gpu.order(recurrent)
        loss = compiled(tokens[:, :-1].to(DEVICE), tokens[:, 1:].to(DEVICE), order)
        loss.backward()
        reference = cpu.loss(tokens[:, :-1], tokens[:, 1:], order)
        reference.backward()
        check(f"fullgraph model, {label}, recurrent={recurrent}: loss", relative(loss.cpu(), reference), 5e-3)
    worst = max(
        (relative(p.grad.cpu(), q.grad), n)
        for (n, p), q in zip(gpu.named_parameters(), cpu.parameters())
        if q.grad.norm() > 1e-6
    )
    check(f"fullgraph model, {label}: worst gradient ({worst[1]})", worst[0], 0.15)
    score = t.maybe_compile(gpu.score, settings, t.Ranks(0, 1, DEVICE))
    with torch.no_grad():
        order, state, parts = gpu.order(True), None, []
        whole, _ = cpu.score(tokens[:, :-1], tokens[:, 1:], order, None, 0)
        for part in range(2):
            piece = tokens[:, part * 256 : part * 256 + 257].to(DEVICE)
            nats, state = score(piece[:, :-1].contiguous(), piece[:, 1:].contiguous(), order, state, 512)
            parts.append(nats)
    check(f"fullgraph stateful scoring, {label}", relative(torch.cat(parts, 1).cpu(), whole), 5e-3)


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    wanted = sys.argv[1:] or ["scans", "attention", "model"]
    if "scans" in wanted:
        check_scans()
    if "attention" in wanted:
        check_attention()
    if "model" in wanted:
        check_model()
        check_model(document_reset=1)
        check_model(mamba_version=2, document_reset=1)
        check_model(mamba_grad_checkpoint=1, mamba_d_state=128)
    print(f"{failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
