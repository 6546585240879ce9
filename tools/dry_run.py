"""What a run would be, before it is paid for: layers, sizes, memory, tokens.

    PRESET=short MLP_MULT=3.5 python train_gpt.py --dry-run --gpu-memory 80 --step-ms 45
    python train_gpt.py --dry-run --k 8 12             # the artifact at other SDCLIP_K, too
    RESUME=logs/x.checkpoint python train_gpt.py --dry-run     # sizes by the weights in a file

Settings come from the environment, as for a run. No GPU is used and no data are needed; the model
takes no memory. The artifact's size is that of Gaussian weights, corrected by a small table that
`python -m tools.fit_bytes` fits to this repository's logs and artifacts. With ARTIFACT=FILE or
RESUME=FILE, or if RUN_ID has a checkpoint, it is the size of the weights in that file. A checkpoint
is accepted or refused as by a run, except that only a run compares the data. A RUN_ID that has its
score or has not ended is refused. Whatever else a run would refuse before it opens its data is
refused here, too, below the figures, and so is an artifact that would be too large.
"""

import argparse
import collections
import contextlib
import dataclasses
import math
import os
import sys
from pathlib import Path

import torch

if not __package__:  # started by its path
    print("error: start it as python train_gpt.py --dry-run", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, environment_value, need, run_command

# What a finished artifact takes less than predict_bytes() allows: bits of each number, by kind of
# matrix, and bytes of each matrix. Made by `python -m tools.fit_bytes`, as is SIZE_ERROR, the most
# by which an artifact that it was fitted to is still of another size.
BITS_SAVED = {
    "bigrams": 0.0041,
    "MLP": -0.004,
    "Mamba out": 0.0136,
    "Mamba in": 0.0131,
    "attention": 0.0032,
    "embedding": 0.0201,
}
BYTES_SAVED = 443
SIZE_ERROR = 0.001
# The same of runs whose steps follow errors' costs (SDCLIP_BY_MATRIX, SDCLIP_BY_ROW), with tables
# in common or without; only trained weights tell what these save: the table knows nothing of it.
SHARED_ERROR = 0.008
# The shapes that it was fitted to, NUM_LAYERS and MODEL_DIM, and the smallest and the largest k.
FITTED_SHAPES = ((9, 512), (10, 512), (4, 128), (5, 192))
FITTED_K = (5.0, 17.4)
# What stands for GPUs that are not here; the time of a step is a figure of the user's own.
GPU_OPTIONS = "--gpu-memory 80 --ranks 8 --step-ms MS"
# Settings that a run's GPU may follow, and the machine of a dry run not.
BY_THE_MACHINE = ("scan_backend", "attention_backend", "float8_products")


def expected_parts(model: t.Model, settings: t.Settings, k: float) -> dict[str, float]:
    """About the bytes of the finished artifact at this k, by kind: predict_parts() corrected."""
    parts = t.predict_parts(model, settings, k)
    for name in t.grid_limits(model):
        kind = t.layer_kind(name)
        numbers = model.get_parameter(name).numel()
        parts[kind] -= BYTES_SAVED + BITS_SAVED[kind] * numbers / 8
    return parts


def fitted_to(settings: t.Settings, k: float) -> bool:
    """Whether the table was made of models like this one."""
    s = settings
    alike = (s.num_layers, s.model_dim) in FITTED_SHAPES and FITTED_K[0] <= k <= FITTED_K[1]
    alike = alike and (s.shares_bits or not s.shared_tables)  # no other run has shared them
    return alike and s.mamba_version == 3 and s.quantizer == "gptq" and s.mlp_layers == "all"


def shown(value) -> str:
    """A setting's value as it is given: 0 or 1 for no and yes."""
    return t.shown(environment_value(value)) or "empty"


def in_bytes(count: float) -> str:
    """A size in GB, or below one in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def quiet(line: str, event: str = "", *_, **__) -> None:
    """A run's log without files: its lines are printed, its records are not kept."""
    print(f"a run would go on: {line}" if event == "resumed" else line)


def refuse_living(path: Path, setting: str) -> None:
    """Raises UserError, with the setting, if a living run has this file; makes and keeps none."""
    with contextlib.suppress(OSError):  # no living run of this user's has what cannot be written
        if path.is_file():
            t.claim_file(path, setting).close()


def describe_start(settings: t.Settings) -> tuple[bool, str]:
    """Whether a run would look into checkpoints; if not, what its RUN_ID would begin with, or "".

    Raises UserError for a run that has its score, has not ended or would write over a file. Of what
    a run takes away before it trains anew, nothing is touched.
    """
    s = settings
    t.refuse_same_files(s)
    if s.run_id:
        refuse_living(Path(s.log_dir, f"{t.log_name(s)}.txt"), "RUN_ID")
    if s.eval_only:
        t.read_artifact(s.artifact_path)
        return False, ""
    refuse_living(Path(f"{s.artifact_path}.lock"), "ARTIFACT")
    if s.run_id:
        t.find_unscored(dataclasses.replace(s, resume="never"))  # which takes no checkpoint away
    if s.resume != "auto":
        return s.resume != "never", ""
    if not s.run_id:
        return False, ""  # the run will have a name of its own
    done = {"trained", "final"} & t.last_records(Path(s.log_dir, f"{s.run_id}.jsonl")).keys()
    if done and s.overwrite:
        return False, f"start: OVERWRITE=1 trains RUN_ID={s.run_id} anew"
    if t.find_unscored(s):
        return False, f"start: {s.artifact_path} is trained and has no score: a run only scores it"
    found = any(path.exists() for path in s.checkpoint_paths)
    nothing = f"start: RUN_ID={s.run_id} has no checkpoint in LOG_DIR={s.log_dir}"
    return found, "" if found else nothing


def weights_at_hand(settings: t.Settings, given: set[str], goes_on: bool) -> tuple[t.Model, str]:
    """ARTIFACT's model, the one that a checkpoint would export, or a skeleton; and what it is."""
    here = t.Ranks(0, 1, torch.device("cpu"))
    # Which kernels the run takes is said of its machine; here they need not exist.
    kernels = {name: getattr(settings, name) for name in BY_THE_MACHINE}
    anywhere = dataclasses.replace(settings, **dict.fromkeys(kernels, "auto"))
    if settings.artifact and os.path.exists(settings.artifact):
        model, _ = t.load_model(settings.artifact_path, anywhere, given, here)
        model.settings = dataclasses.replace(model.settings, **kernels)
        size = settings.artifact_path.stat().st_size
        return model, f"the weights in {settings.artifact}, a file of {size:,} bytes"
    unknown = "what finished runs' weights took"
    if not goes_on:
        return t.model_skeleton(settings), unknown
    # What export() would find: the average, without what tokens spelt alike share.
    model = t.build_model(anywhere, here)
    trainer = t.Trainer(model, anywhere, here, settings.train_seq_len, 0, quiet)
    trainer.resume()
    if trainer.starts == 1:  # no file was usable
        return t.model_skeleton(settings), unknown
    trainer.average.apply()
    t.fold_spelling(model)
    model.settings = settings
    source = "that checkpoint" if settings.resume == "auto" else settings.resume
    return model, f"the weights in {source}, after {trainer.steps_done:,} steps"


def describe_choices(settings: t.Settings, given: set[str]) -> list[str]:
    """The preset, and the settings that differ from it: given ones, by ours or another name."""
    usual = t.Settings(**t.PRESETS[settings.preset])
    preset = f"PRESET={settings.preset}: {t.PRESET_USES[settings.preset]}"
    lines = []
    for name in t.FIELDS:
        ours = getattr(settings, name)
        theirs = getattr(usual, name)
        if ours != theirs and name != "preset":
            lines.append(f"  {name.upper()}={shown(ours)}, not {shown(theirs)}")
    if "num_layers" in given and "mamba_layers" not in given:
        why = f"attention, as MAMBA_LAYERS={settings.mamba_layers} does not name"
        for layer in range(usual.num_layers, settings.num_layers):
            lines.append(f"  layer {layer}: {why} it")
    return [
        f"settings that differ from {preset}" if lines else f"nothing differs from {preset}"
    ] + lines


def describe_layers(model: t.Model) -> list[str]:
    """A table of the layers, and the orders in which they run."""
    s = model.settings
    lines = [f"{'layer':>5}  {'mixer':44}{'MLP':>6}{'parameters':>14}"]
    for layer, block in enumerate(model.blocks):
        mixer = f"attention, {s.num_heads} query and {s.num_kv_heads} key/value heads"
        if isinstance(block.mixer, t.Mamba):
            heads, channels, state, *_ = block.mixer.sizes
            mixer = f"Mamba-{s.mamba_version}, {heads} heads of {channels}, state {state}"
        width = block.mlp.up.out_features if block.mlp else 0
        count = sum(p.numel() for p in block.parameters())
        lines.append(f"{layer:5}  {mixer:44}{width:6,}{count:14,}")
    lines.append(f"they run as {t.name_layers(model, model.full_order)}")
    once = model.order(recurrent=False)
    if once != model.full_order and s.recur_start:
        lines.append(f"before {s.recur_start:.0%} of the run as {t.name_layers(model, once)}")
    return lines


def describe_size(
    model: t.Model, target: float, chosen: list[float], weights_known: bool
) -> list[str]:
    """Parameters by kind, and the artifact's bytes at the k that fits, or is set, and at others."""
    matrices = t.grid_limits(model)
    numbers: collections.Counter[str] = collections.Counter()
    trained: collections.Counter[str] = collections.Counter()
    for name, p in model.named_parameters():
        kind = t.layer_kind(name) if name in matrices else "vectors"
        numbers[kind] += p.numel()
        trained["Muon" if "matrix" in t.parameter_kind(name, p) else "Adam"] += p.numel()
    fitted = t.fit_sdclip(model, model.settings, target)
    sizes = expected_parts(model, model.settings, fitted)
    lines = [f"{'kind':12}{'parameters':>12}{'bytes':>12}{'bits each':>11}"]
    for kind, count in numbers.items():
        size = sizes[kind]
        lines.append(f"{kind:12}{count:12,}{size:12,.0f}{8 * size / count:11.2f}")
    shares = " and ".join(f"{name} {count:,}" for name, count in sorted(trained.items()))
    lines.append(f"{'in all':12}{numbers.total():12,}; of these {shares}")
    # The k that is set, or the least that fits, first.
    lines += [describe_artifact(model, target, k) for k in (fitted, *chosen)]
    # How far a prediction may be trusted, which the table says only of what it was made of.
    error = SHARED_ERROR if model.settings.shares_bits else SIZE_ERROR
    told = f"finished runs of this depth and width are told within {error:.1%}"
    unknown = "no finished run has this depth, width and k: how far that is off is not known"
    if weights_known:
        told = "by these weights, before GPTQ has moved any: off by some tenths of a percent"
    known = weights_known or fitted_to(model.settings, fitted)
    lines.append(f"({told if known else unknown})")
    return lines


def describe_artifact(model: t.Model, target: float, k: float) -> str:
    """The artifact's size with this k, and what it may take, in a line."""
    size = sum(expected_parts(model, model.settings, k).values())
    s = model.settings
    most = ", SDCLIP_MOST" if k == s.sdclip_most else ""
    limit = f"{target:,} ({s.target_mb * 1e6:,.0f} less the script)"
    verdict = "" if size <= target else f": too large by {size - target:,.0f}"
    return f"artifact: {size:,.0f} bytes at k={k:.2f}{most}, of at most {limit}{verdict}"


def refuse_too_large(model: t.Model, target: float) -> None:
    """Raises UserError where no k that export tries makes an artifact that fits."""
    s = model.settings
    k = t.fit_sdclip(model, s, target)
    k = k if s.quantizer == "ternary" else max(k, s.sdclip_most)  # export raises a k that is set
    over = sum(expected_parts(model, s, k).values()) - target
    problem = (
        f"the artifact would be {over:,.0f} bytes too large at k={k:.2f}, the most that is tried"
    )
    t.need(over <= 0, f"{problem}: make the model smaller, or raise SDCLIP_MOST")


def state_bytes(model: t.Model) -> int:
    """What weights, gradients, averages and the optimizers' moments take, in float32.

    Muon keeps one momentum of a matrix, Adam two moments of everything else.
    """
    averages = set(model.settings.average.split("+")) - {"none"}
    total = 0
    for name, p in model.named_parameters():
        moments = 1 if "matrix" in t.parameter_kind(name, p) else 2
        total += 4 * p.numel() * (2 + len(averages) + moments)
    return total


def describe_memory(model: t.Model, ranks: t.Ranks, memory: float) -> list[str]:
    """What a rank keeps in memory, of so many bytes, and how many tokens it runs at once."""
    s = model.settings
    state = state_bytes(model)
    # Ranks on GPUs have one each; those on a CPU share the machine.
    share = memory if ranks.gpu else memory / ranks.world_size
    micro_batch = t.choose_micro_batch(s, ranks, max(0.0, share - state))
    activations = micro_batch * t.token_bytes(s, ranks.gpu)
    place = "of a GPU" if ranks.gpu else "of this machine"
    parts = f"{in_bytes(state)} for weights, gradients, averages and moments"
    parts += f", about {in_bytes(activations)} for {micro_batch:,} tokens at once"
    lines = [f"memory of a rank: {parts}; {in_bytes(memory)} in all, used and free, {place}"]
    steps = s.train_batch_tokens // (micro_batch * ranks.world_size)
    if steps > 1:
        lines.append(f"a step of {s.train_batch_tokens:,} tokens is {steps} of these on each rank")
    if state + activations > share:
        lines.append("that does not fit: lower MICRO_BATCH_TOKENS, TRAIN_SEQ_LEN or the model")
    return lines + describe_evaluation(s, ranks.gpu, share)


def describe_evaluation(settings: t.Settings, gpu: bool, share: float) -> list[str]:
    """What documents that adapt keep for their gradients, of a rank's so many bytes.

    A guess, as token_bytes() is; only the last tokens of a window have logits.
    """
    s = settings
    if s.eval_mode != "documents" or not s.adapts:
        return []
    each = s.train_seq_len * (
        t.token_bytes(s, gpu) - 5 * s.vocab_size * (1 if gpu else t.CPU_FACTOR)
    )
    needed = s.ttt_lora_slots * each
    what = f"{s.ttt_lora_slots} documents that adapt at once, {s.train_seq_len:,} tokens of each"
    line = f"evaluation of a rank: about {in_bytes(needed)} for {what}"
    if gpu and needed > share:
        line += "; of fewer where memory ends, in more time"
    return [line]


def lacks_its_gpus(settings: t.Settings, device: torch.device) -> bool:
    """Whether a run is for GPUs, of which this machine has none: its memory says nothing of it."""
    s = settings
    return device.type != "cuda" and s.device != "cpu" and s.preset not in t.FOR_CPUS


def describe_clock(settings: t.Settings, step_ms: float) -> list[str]:
    """Steps, tokens and passes over the data that the clock allows; step_ms of 0 is unknown."""
    s = settings
    steps = s.iterations
    if s.max_wallclock_seconds:
        seconds = s.max_wallclock_seconds - s.export_reserve_seconds
        if not step_ms:
            return [f"clock: {seconds:g} s of training; --step-ms MS says how many tokens that is"]
        steps = min(steps, math.floor(1000 * seconds / step_ms))
    tokens = steps * s.train_batch_tokens
    text = f"clock: {steps:,} steps, {tokens:,} tokens"
    try:
        there = t.summarize_shards(t.open_shards(s.data_path, "train"))["tokens"]
    except t.UserError as error:
        return [text, f"({error})"]
    return [f"{text}, {tokens / there:.3g} times the {there:,} in DATA_PATH"]


# ---- The command ---------------------------------------------------------------------------------


def positive(text: str) -> float:
    """A number above 0; ValueError, of which the parser makes a mistake of the user's, for others.

    For a memory, a time or an SDCLIP_K.
    """
    number = float(text)
    if not 0 < number <= t.UNBOUNDED:  # as of settings: torch has no such floats
        raise ValueError
    return number


def make_parser(command: str, text: str) -> Parser:
    """The parser of a tool that stands in for train_gpt.py; text: its --help."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"train_gpt.py {command}", description=text, formatter_class=layout)
    parser.hint = "; settings are environment variables (see train_gpt.py --help)"
    return parser


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; raises UserError for a wrong one.

    What is no option here is a setting, and so a variable of the environment.
    """
    parser = make_parser("--dry-run", __doc__)
    add = parser.add_argument
    add("--gpu-memory", type=positive, metavar="GB", help="memory of a GPU that is not here")
    add("--ranks", type=int, metavar="N", help="processes that share a step; torchrun's, or 1")
    add("--step-ms", type=positive, default=0.0, metavar="MS", help="milliseconds of a step")
    add("--k", type=positive, nargs="+", default=[], metavar="K", help="sizes at these SDCLIP_K")
    options = parser.parse_args(arguments)
    need(options.ranks is None or options.ranks > 0, "--ranks must be 1 or more")
    return options


def dry_run(arguments: list[str] | None = None) -> int:
    """Prints what a run with the environment's settings would be."""
    options = read_arguments(arguments)
    rank, _, started = t.read_launch(dict(os.environ))
    if rank:
        return 0  # rank 0 says it all
    world_size = options.ranks or started
    settings, given = t.read_settings(os.environ | {"WORLD_SIZE": str(world_size)})
    t.validate_settings(settings, world_size)
    t.refuse_idle(settings, given)
    # An absent GPU is a device that nothing is put on.
    device = torch.device("cuda") if options.gpu_memory else t.choose_device(settings, 0)
    memory = 1e9 * options.gpu_memory if options.gpu_memory else t.device_memory(device)
    goes_on, start = describe_start(settings)
    model, weights = weights_at_hand(settings, given, goes_on)
    target = int(settings.target_mb * 1e6) - t.code_bytes()
    lines = [start] if start else []
    lines += [*describe_choices(settings, given), "", *describe_layers(model), ""]
    known = not model.embedding.weight.is_meta  # a skeleton's are
    lines += [f"sizes by {weights}:", *describe_size(model, target, options.k, known), ""]
    if lacks_its_gpus(settings, device):
        memory = math.inf
        which = f"PRESET={settings.preset} is for GPUs, and here is none"
        lines.append(f"memory of a rank: {which}; {GPU_OPTIONS} stand for eight of 80 GB")
    else:
        lines += describe_memory(model, t.Ranks(0, world_size, device), memory)
    lines += describe_clock(model.settings, options.step_ms)
    print("\n".join(lines))
    t.check_size(model, target, memory)
    refuse_too_large(model, target)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train_gpt.py", dry_run, t.UserError))
