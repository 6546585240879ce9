"""An artifact as safetensors, and back.

    python -m tools.convert logs/first.int6.lzma --out first.safetensors    # and first.json
    python -m tools.convert first.safetensors --out first.int6.lzma

first.safetensors has every parameter of the model in float32, as it is scored, by its name in
train_gpt.py. Beside each matrix, "NAME steps" has its grid steps (rows + columns,) in float16:
a weight is a whole number (or, with TRELLIS_STATES, a whole number and a half) times the steps of
its row and its column. first.json has the settings of the model and the SHA-256 of its tokenizer
and, for an older script's artifact, "filled in", the settings that the artifact's header lacks.
Converted back, the file equals that artifact to the byte. A weight that was changed, and so is not
on its grid any more, is refused: nothing is quantized anew here.
Needs safetensors (requirements-dev.txt).
"""

import argparse
import json
import lzma
import sys
from pathlib import Path

import torch

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.convert", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, UserError, need, need_place, run_command, write_whole

SUFFIX = ".safetensors"
STEPS = " steps"  # behind a matrix's name
FILLED = "filled in"  # the names of settings that an older artifact's header lacks
OFF_GRID = 1e-3  # of a step: what float32 leaves is a thousandth of it


def settings_of(header: dict) -> t.Settings:
    """The model's settings in an artifact's header, or in the file that was made from it."""
    try:
        settings = t.Settings(**{name: header[name] for name in t.MODEL_FIELDS})
        t.validate_settings(settings, 1)
    except KeyError as error:
        raise UserError(f"the settings lack {error.args[0]}") from None
    return settings


def grid_steps(payload: bytes, skeleton: t.Model) -> dict[str, torch.Tensor]:
    """The grid steps of each matrix in an artifact's payload, float16 (rows + columns,)."""
    record, _ = t.read_record(payload, skeleton)
    return {name + STEPS: torch.tensor(record[name]) for name in t.grid_limits(skeleton)}


def from_artifact(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """What the two files hold. Raises UserError for a file that is no artifact."""
    header, payload = t.read_artifact(path)
    skeleton = t.model_skeleton(settings_of(header))
    try:
        parameters = t.unpack_artifact(payload, skeleton)
    except (ValueError, lzma.LZMAError):
        raise UserError(f"{path}: its data are not its header's model") from None
    line = path.read_bytes()[len(t.ARTIFACT_MAGIC) :].partition(b"\n")[0]
    if lacking := sorted(header.keys() - json.loads(line)):
        header[FILLED] = lacking
    return parameters | grid_steps(payload, skeleton), header


def integers_of(name: str, weight: torch.Tensor, steps: torch.Tensor, states: int) -> torch.Tensor:
    """The whole numbers int8 (rows, columns) of a matrix, perhaps with a trellis of so many states.

    Raises UserError for other weights.
    """
    rows, columns = steps.float().split(weight.shape)
    exact = weight / (rows[:, None] * columns)
    points = (2 * exact).round() / 2 if states else exact.round()
    integers = points.floor().to(torch.int8)
    same = not states or torch.equal(t.trellis_points(integers, states), points)
    on_grid = same and float((exact - points).abs().max()) <= OFF_GRID
    need(on_grid, f"{name} was changed: its weights are not on their grid any more")
    return integers


def to_artifact(tensors: dict[str, torch.Tensor], header: dict) -> bytes:
    """The artifact that was converted. Raises UserError if these are not a whole one's tensors."""
    settings = settings_of(header)
    skeleton = t.model_skeleton(settings)
    matrices = t.grid_limits(skeleton)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    shapes |= {name + STEPS: (sum(shapes[name]),) for name in matrices}
    tensors = dict(tensors)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name, _ in shapes.items() ^ found.items())
    need(not wrong, f"these are not the tensors of the settings' model: {', '.join(wrong[:3])}")
    for name in matrices:  # another program may have written them in another type
        steps = tensors[name + STEPS]
        tensors[name + STEPS] = steps.half()
        same = torch.equal(steps.double(), steps.half().double())
        need(same, f"{name + STEPS} was changed: it holds no numbers of 16 bits")
    # As quantize_model() has them: vectors and steps in the parameters' order, then integers.
    stored = {}
    for name, _ in skeleton.named_parameters():
        kind = getattr(torch, t.float_type(name))
        stored[name] = tensors[name + STEPS] if name in matrices else tensors[name].to(kind)
    for name in matrices:
        steps = tensors[name + STEPS]
        integers = integers_of(name, tensors[name], steps, settings.trellis_states)
        stored[f"{name} integers"] = integers
    for name, numbers in stored.items():
        need(numbers.isfinite().all(), f"{name} was changed: it holds numbers that are not finite")
    packed = t.pack_artifact(settings, stored)
    payload = packed[: -t.DIGEST_BYTES].partition(b"\n")[2]
    # The header that it had, in the order of all headers.
    usual = t.artifact_header(settings)
    filled = header.get(FILLED, [])
    header = {name: header[name] for name in usual if name in header and name not in filled}
    t.read_header(json.dumps(header), usual)
    return b"".join(t.seal(t.ARTIFACT_MAGIC, header, payload))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A .safetensors file and the settings beside it. Raises UserError for what is neither."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = path.with_suffix(".json")
    need(path.is_file(), f"no file {path}")
    try:
        header = json.loads(beside.read_text(encoding="utf-8"))
        tensors = load_file(path)
    except (SafetensorError, ValueError):
        raise UserError(f"{path} and {beside} are not what this command writes") from None
    need(isinstance(header, dict), f"{beside} holds no settings")
    return tensors, header


def main() -> int:
    """Converts one file, the way that its name says."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=f"an artifact, or what ends in {SUFFIX}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args()
    back = given.file.suffix == SUFFIX
    ending = given.out.suffix == SUFFIX
    need(back != ending, f"one of both files ends in {SUFFIX}, the other one is the artifact")
    for out in (given.out, *([] if back else [given.out.with_suffix(".json")])):
        need_place(out, given.file, given.file.with_suffix(".json"))
    if back:
        data = to_artifact(*read_tensors(given.file))
        write_whole(given.out, data)
    else:
        from safetensors.torch import save

        tensors, header = from_artifact(given.file)
        write_whole(given.out, save(tensors))
        if FILLED in header:
            print(f"{given.file} is of an older script: filled in {', '.join(header[FILLED])}")
        write_whole(given.out.with_suffix(".json"), json.dumps(header, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("convert.py", main, t.UserError))
