"""tools/convert.py: the same model in both files, the same bytes back, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import PATIENCE, SOLO, random_model, random_tokens, start_here, tiny
from tools import convert
from tools.command import UserError

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

ROOT = Path(t.__file__).resolve().parent
TINY = ROOT / "data" / "tiny" / "tiny.int6.lzma"
FORMER = ROOT / "tests" / "data" / "b6028ee.artifact"


def start(*arguments) -> subprocess.CompletedProcess:
    return start_here("tools.convert", *arguments)


def write_artifact(path: Path, **settings) -> Path:
    """An artifact of a random model, its numbers on their grids."""
    model = random_model(tiny(num_layers=2, mamba_layers="0", **settings))
    hessians = {}
    stored = t.quantize_model(model, model.settings, SOLO, hessians, 6.0)
    path.write_bytes(t.pack_artifact(model.settings, stored, "a" * 64))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder with an artifact, a.lzma, and what was made from it."""
    folder = tmp_path_factory.mktemp("converted")
    artifact = write_artifact(folder / "a.lzma")
    assert start(artifact, "--out", folder / "a.safetensors").returncode == 0
    return folder


@pytest.mark.parametrize(
    "settings", [{}, {"quantizer": "dsq"}, {"tie_embeddings": False, "trellis_states": 8}]
)
def test_the_same_model_and_the_same_bytes_back(tmp_path, settings):
    artifact = write_artifact(tmp_path / "a.lzma", **settings)
    out, again = tmp_path / "a.safetensors", tmp_path / "again.lzma"
    for command in ((artifact, "--out", out), (out, "--out", again)):
        done = start(*command)
        assert done.returncode == 0, done.stderr
    assert again.read_bytes() == artifact.read_bytes()

    chosen = t.Settings(device="cpu", compile="off", tokenizer_path="")
    loaded, _ = t.load_model(artifact, chosen, set(), SOLO)
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["tokenizer_sha256"] == "a" * 64
    rebuilt = t.build_model(loaded.settings, SOLO)
    tensors = load_file(out)
    rebuilt.load_state_dict({n: x for n, x in tensors.items() if not n.endswith(" steps")})
    tokens = random_tokens(2, 20)
    order = loaded.full_order
    hidden = [model(tokens, order) for model in (loaded, rebuilt)]
    assert torch.equal(loaded.logits(hidden[0]), rebuilt.logits(hidden[1]))
    assert hidden[0].abs().max() > 0


@pytest.mark.parametrize("artifact", [FORMER, TINY], ids=["former", "published"])
def test_an_artifact_of_an_older_script_comes_back_too(tmp_path, artifact):
    """The settings that its header lacks are named, and are not written into it."""
    out, again = tmp_path / "a.safetensors", tmp_path / "again.lzma"
    for command, told in (((artifact, "--out", out), True), ((out, "--out", again), False)):
        done = start(*command)
        assert done.returncode == 0, done.stderr
        assert ("is of an older script: filled in" in done.stdout) == told
    assert t.read_artifact(again) == t.read_artifact(artifact)
    assert again.read_bytes() == artifact.read_bytes()


def test_a_weight_that_no_trellis_reaches_is_refused():
    """Though it is a whole number and a half of a step."""
    steps = torch.full((6 + 5,), 0.5).half()
    points = t.trellis_points(torch.arange(30).view(6, 5).to(torch.int8), 4)
    assert convert.integers_of("a", points / 4, steps, 4).flatten().tolist() == list(range(30))
    points[3, 3] += 0.5
    with pytest.raises(convert.UserError, match="a was changed"):
        convert.integers_of("a", points / 4, steps, 4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_tensors_of_other_types_with_the_same_numbers_are_the_same_artifact(converted, kind):
    """They were written as they were, into an artifact that no script could read."""
    tensors, header = convert.read_tensors(converted / "a.safetensors")
    wider = {name: tensor.to(kind) for name, tensor in tensors.items()}
    assert convert.to_artifact(wider, header) == (converted / "a.lzma").read_bytes()
    name = next(name for name in wider if name.endswith(convert.STEPS))
    wider[name][0] *= 1 + 1e-4
    with pytest.raises(UserError, match="steps was changed: it holds no numbers of 16 bits"):
        convert.to_artifact(wider, header)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("no artifact", "is not a usable artifact"),
        ("changed weight", "blocks.1.mlp"),
        ("lacking tensor", "not the tensors of the settings' model: embedding.weight"),
        ("not finite", "was changed: it holds numbers that are not finite"),
        ("too large", "was changed: it holds numbers that are not finite"),
        ("no settings", "a.json"),
        ("wrong settings", "the settings lack"),
        ("other suffix", "one of both files ends in .safetensors"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, converted, problem, said):
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    out, back = tmp_path / "a.safetensors", tmp_path / "back.lzma"
    described = out.with_suffix(".json")
    source, target = out, back
    if problem == "no artifact":
        source, target = described, tmp_path / "b.safetensors"
    elif problem in ("not finite", "too large"):
        tensors = load_file(out)
        name = next(n for n in tensors if tensors[n].dim() == 1 and not n.endswith(convert.STEPS))
        tensors[name][0] = float("nan") if problem == "not finite" else 1e6  # float16 ends before
        save_file(tensors, out)
    elif problem in ("changed weight", "lacking tensor"):
        tensors = load_file(out)
        name = next(n for n in tensors if n.startswith("blocks.1.mlp") and tensors[n].dim() == 2)
        tensors[name][0, 0] += 0.5 * tensors[f"{name} steps"][0].float()
        if problem == "lacking tensor":
            del tensors["embedding.weight"]
        save_file(tensors, out)
    elif problem == "no settings":
        described.unlink()
    elif problem == "wrong settings":
        described.write_text("{}")
    else:
        target = tmp_path / "b.safetensors"
    done = start(source, "--out", target)
    assert done.returncode == 2
    assert done.stderr.startswith("convert.py: error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not target.exists()


def test_neither_file_is_written_over_what_is_read(tmp_path):
    """An artifact named like the settings that go beside the tensors was."""
    artifact = write_artifact(tmp_path / "a.json")
    kept = artifact.read_bytes()
    # As a user starts it; all other tests start it in this process.
    command = [sys.executable, "-m", "tools.convert", artifact]
    command += ["--out", tmp_path / "a.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{artifact} would be written over" in done.stderr
    assert list(tmp_path.iterdir()) == [artifact] and artifact.read_bytes() == kept
