"""Files of older versions of the script mean what they meant: tests/data holds some, with what was
computed from them.

They were made by make_former_files.py. Who adds a setting that a header holds adds to
FORMER_DEFAULTS what older files mean by its absence; these tests fail until then.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests import make_former_files
from tests.make_former_files import FOLDER, FixedBatches, nats
from tests.support import SOLO, Quiet, tiny
from tools.command import run_command

COMMITS = ["b6028ee"]
each_commit = pytest.mark.parametrize("commit", COMMITS)


def header_of(path: Path) -> dict:
    """The header of an artifact or a checkpoint."""
    return json.loads(path.read_bytes()[8:].split(b"\n", 1)[0])


def with_header(path: Path, header: dict, folder: Path) -> Path:
    """The same file with another header under a right checksum."""
    data = path.read_bytes()
    payload = data[:-32].split(b"\n", 1)[1]
    copy = folder / path.name
    copy.write_bytes(b"".join(t.seal(data[:8], header, payload)))
    return copy


def known(commit: str, what: str) -> torch.Tensor:
    """The nats that the commit's own script computed."""
    return torch.tensor(json.loads((FOLDER / f"{commit}.json").read_text())[what])


def assert_same(nats: list[list[float]], expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Up to what another torch or processor rounds otherwise."""
    torch.testing.assert_close(torch.tensor(nats), expected, rtol=tolerance, atol=tolerance)


def checkpoint_settings(path: Path) -> t.Settings:
    """Settings of the run that wrote a checkpoint, which a resumed one must have."""
    header = header_of(path)
    former = {n: t.FORMER_DEFAULTS[n] for n in t.TRAINING_FIELDS if n in t.FORMER_DEFAULTS}
    training = {n: header[n] for n in t.TRAINING_FIELDS if n in header}
    free = {"resume": str(path), "warmup_steps": 0, "train_log_every": 1, "checkpoint_every": 0.0}
    return dataclasses.replace(tiny(), **former | training | free)


def make_trainer(settings: t.Settings) -> t.Trainer:
    """A trainer of a new model, as before a run, that says nothing."""
    return t.Trainer(t.build_model(settings, SOLO), settings, SOLO, 64, 1e6, Quiet())


@each_commit
def test_every_setting_that_an_older_file_lacks_has_a_former_default(commit):
    """And none that is written in every file, which a default would never reach."""
    names = {
        "artifact": set(t.artifact_header(tiny())),
        "checkpoint": {*t.TRAINING_FIELDS, *t.PROGRESS_FIELDS},
    }
    for what, ours in names.items():
        theirs = set(header_of(FOLDER / f"{commit}.{what}"))
        assert theirs <= ours, "the script no longer knows what these mean"
        assert ours - theirs <= set(t.FORMER_DEFAULTS), "what do older files mean by their absence?"
    settings = {field.name: field.default for field in dataclasses.fields(t.Settings)}
    for name, value in t.FORMER_DEFAULTS.items():
        assert any(name in ours for ours in names.values())
        assert type(value) is type(settings.get(name, value))


@each_commit
def test_an_older_artifact_has_the_scores_that_it_had(commit):
    model, settings = t.load_model(FOLDER / f"{commit}.artifact", tiny(), set(), SOLO)
    assert_same(nats(model), known(commit, "artifact"))
    header = header_of(FOLDER / f"{commit}.artifact")
    assert all(getattr(settings, name) == value for name, value in header.items())


@each_commit
def test_an_older_checkpoint_goes_on_as_it_would_have(commit, signal_handlers):
    """Two more steps, with optimizers' state and average, end at the same model."""
    settings = checkpoint_settings(FOLDER / f"{commit}.checkpoint")
    trainer = make_trainer(settings)
    trainer.resume()
    assert (trainer.steps_done, trainer.clock.seconds(), trainer.qat_k) == (3, 1.25, 6.5)
    trainer.run(FixedBatches(settings, 3), None)
    assert_same(nats(trainer.model), known(commit, "checkpoint"), 1e-4)


def test_files_of_todays_script_can_be_made(tmp_path, signal_handlers):
    """As they will have to be when their layout changes: they are read as those that are kept."""
    make_former_files.make_files(t, "now", tmp_path)
    expected = json.loads((tmp_path / "now.json").read_text())
    model, _ = t.load_model(tmp_path / "now.artifact", tiny(), set(), SOLO)
    assert_same(nats(model), torch.tensor(expected["artifact"]))
    settings = checkpoint_settings(tmp_path / "now.checkpoint")
    trainer = make_trainer(settings)
    trainer.resume()
    assert (trainer.steps_done, trainer.clock.seconds(), trainer.qat_k) == (3, 1.25, 6.5)
    trainer.run(FixedBatches(settings, 3), None)
    assert_same(nats(trainer.model), torch.tensor(expected["checkpoint"]), 1e-4)


@pytest.fixture
def script_of_last_commit(monkeypatch, tmp_path):
    """A function: commits a script, in a repository of its own, from which files are then made."""
    repository = tmp_path / "repository"

    def commit(script: str) -> None:
        (repository / "train_gpt.py").write_text(script, encoding="utf-8")
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "a script")):
            subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True)

    if shutil.which("git") is None:
        pytest.skip("needs git")
    repository.mkdir()
    monkeypatch.setattr(make_former_files, "ROOT", repository)
    monkeypatch.setattr(make_former_files, "FOLDER", tmp_path / "files")
    monkeypatch.setitem(sys.modules, "train_gpt", t)  # which load_script() takes the place of
    return commit


def make(monkeypatch, commit: str) -> int:
    """The exit status of the command that makes a commit's files."""
    monkeypatch.setattr(sys, "argv", ["make_former_files.py", commit])
    return run_command("make_former_files.py", make_former_files.main)


def test_the_command_makes_a_commits_files(
    script_of_last_commit, monkeypatch, tmp_path, signal_handlers
):
    # Not the same file: its operators would bear the names of today's, and take them along.
    script_of_last_commit(Path(t.__file__).read_text(encoding="utf-8") + "# of another commit\n")
    assert make(monkeypatch, "HEAD") == 0
    found = tmp_path / "files"
    assert {path.name.removeprefix("HEAD.") for path in found.iterdir()} == {
        "artifact",
        "checkpoint",
        "json",
    }
    assert header_of(found / "HEAD.artifact").keys() == t.artifact_header(tiny()).keys()


@pytest.mark.parametrize(
    ("commit", "said"),
    [
        ("nobody", "git show nobody:train_gpt.py: .*; give a commit of this repository"),
        ("HEAD", "HEAD's script has no Settings: start this file as of HEAD, which calls what was"),
    ],
)
def test_a_commit_whose_files_cannot_be_made_is_told_in_one_line(
    script_of_last_commit, monkeypatch, capsys, commit, said
):
    """Of an older script, whose functions had other names, a traceback was told."""
    script_of_last_commit("import torch\n\n\ndef Ranks(*_):\n    pass\n")
    assert make(monkeypatch, commit) == 2
    assert re.fullmatch(f"make_former_files.py: error: {said}.*\n", capsys.readouterr().err)


def test_a_deleted_setting_may_have_the_value_that_means_what_is_done_now():
    """Of whatever type a file has it; else the error says what is done."""
    usual = t.artifact_header(tiny())
    assert not {name.upper() for name in [*usual, *t.TRAINING_FIELDS]} & t.REFUSED.keys()
    for name, value in {"sdclip_mlp": 1.0, "sdclip_attention": 1, "use_lzma": True}.items():
        assert t.read_header(json.dumps(usual | {name: value}), usual) == usual
        for other in (2.0, not value, None, [value], {}):
            with pytest.raises(t.OtherVersionError) as error:
                t.read_header(json.dumps(usual | {name: other}), usual)
            assert str(error.value).endswith(f"lacks: ['{name}'] ({t.REFUSED[name.upper()][1]})")


@pytest.mark.parametrize("line", ["[[1, 2]]", '[[null, 2], ["a", 3]]', "[]", '["ab"]', "7", "{"])
def test_a_header_that_is_no_object_is_none(line):
    """Also where Python would make a dict of it, of names that are no text."""
    with pytest.raises(t.UserError, match="its header lacks settings of this script"):
        t.read_header(line, t.artifact_header(tiny()))


def test_a_field_that_a_header_lacks_is_its_former_default(monkeypatch, tmp_path):
    """Not the setting's default of today, nor what the environment says of it."""
    path = FOLDER / "b6028ee.artifact"
    header = header_of(path)
    del header["logit_softcap"], header["document_reset"]
    copy = with_header(path, header, tmp_path)
    with pytest.raises(t.UserError, match="its header lacks settings .*: document_reset, logit"):
        t.load_model(copy, tiny(), set(), SOLO)
    monkeypatch.setitem(t.FORMER_DEFAULTS, "logit_softcap", 12.5)
    monkeypatch.setitem(t.FORMER_DEFAULTS, "document_reset", True)
    monkeypatch.setitem(t.FORMER_DEFAULTS, "seed", 5)  # no artifact's field
    model, settings = t.load_model(copy, tiny(), set(), SOLO)
    assert (settings.logit_softcap, settings.document_reset) == (12.5, True)
    assert settings.seed == tiny().seed
    assert (torch.tensor(nats(model)) - known("b6028ee", "artifact")).abs().max() > 0.01
    with pytest.raises(t.UserError, match="LOGIT_SOFTCAP=20.0 contradicts .* has 12.5"):
        t.load_model(copy, tiny(logit_softcap=20.0), {"logit_softcap"}, SOLO)
    monkeypatch.setitem(t.FORMER_DEFAULTS, "logit_softcap", 30.0)
    model, _ = t.load_model(copy, tiny(logit_softcap=20.0), set(), SOLO)
    assert_same(nats(model), known("b6028ee", "artifact"))


def test_a_checkpoint_that_lacks_a_field_belongs_to_runs_with_its_former_default(
    monkeypatch, tmp_path
):
    path = FOLDER / "b6028ee.checkpoint"
    header = header_of(path)
    decay = header.pop("ema_decay")
    copy = with_header(path, header, tmp_path)
    settings = dataclasses.replace(checkpoint_settings(path), resume=str(copy))
    with pytest.raises(t.UserError, match="its header lacks settings of this script: ema_decay"):
        make_trainer(settings).resume()
    monkeypatch.setitem(t.FORMER_DEFAULTS, "ema_decay", decay)
    make_trainer(settings).resume()
    monkeypatch.setitem(t.FORMER_DEFAULTS, "ema_decay", 0.5)
    with pytest.raises(t.UserError, match=f"EMA_DECAY=0.5, not {decay}"):
        make_trainer(settings).resume()


@pytest.mark.parametrize(
    ("name", "said"),
    [("model_dims", "'model_dims'"), ("a\nb", r"'a\\nb'"), ("x" * 1000, "'xxx"), ("é", r"\\xe9")],
    ids=["plain", "two lines", "long", "not ASCII"],
)
@pytest.mark.parametrize("what", ["artifact", "checkpoint"])
def test_a_field_that_nobody_knows_is_refused_by_name(tmp_path, what, name, said):
    """Of a newer version: what it means cannot be guessed."""
    path = FOLDER / f"b6028ee.{what}"
    copy = with_header(path, header_of(path) | {name: 1}, tmp_path)
    settings = checkpoint_settings(FOLDER / "b6028ee.checkpoint")
    with pytest.raises(t.UserError, match=f"settings that this script lacks: .*{said}") as error:
        if what == "artifact":
            t.load_model(copy, tiny(), set(), SOLO)
        else:
            make_trainer(dataclasses.replace(settings, resume=str(copy))).resume()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_run_does_not_start_over_because_this_script_lacks_a_setting_of_its_checkpoint(tmp_path):
    """It is no damaged file, and what it holds would be written over."""
    path = FOLDER / "b6028ee.checkpoint"
    copy = with_header(path, header_of(path) | {"model_dims": 1}, tmp_path)
    free = {"resume": "auto", "log_dir": str(tmp_path), "run_id": copy.stem}
    settings = dataclasses.replace(checkpoint_settings(path), **free)
    whose = "(another version's); RESUME=never starts anew"
    with pytest.raises(t.UserError, match=re.escape(f"lacks: ['model_dims'] {whose}") + "$"):
        make_trainer(settings).resume()
    make_trainer(dataclasses.replace(settings, resume="never")).resume()
