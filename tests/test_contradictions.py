"""What two logs of a run say against each other: an honest run's say nothing, and each figure that
is edited breaks something.
"""

import copy
from pathlib import Path

import pytest

import train_gpt as t
from tools import contradictions as evidence
from tools.command import UserError

LOG = Path(__file__).resolve().parent.parent / "logs" / "h200-short-42.txt"


@pytest.fixture(scope="module")
def honest() -> evidence.RunLogs:
    return evidence.read_logs(LOG)


@pytest.fixture
def logs(honest) -> evidence.RunLogs:
    return copy.deepcopy(honest)


def found(logs: evidence.RunLogs, said: str) -> None:
    """A contradiction says this."""
    texts = evidence.contradictions(logs)
    assert any(said in text for text in texts), texts


def edit(logs: evidence.RunLogs, event: str, **values) -> None:
    """Changes the last record of an event."""
    logs.events[event].update(values)


@pytest.mark.parametrize(
    "path", sorted(LOG.parent.glob("h200-*-*.txt")), ids=lambda path: path.stem
)
def test_the_logs_of_honest_runs_hold_no_contradiction(path):
    logs = evidence.read_logs(path)
    assert evidence.contradictions(logs) == []
    assert evidence.history(logs) == "trained in one start"


def test_figures_that_are_edited_in_one_of_the_logs_are_seen(logs):
    edit(logs, "final", val_bpb=1.19)
    found(logs, ".txt has val_bpb 1.20791215, .jsonl 1.19000000")
    edit(logs, "trained", bytes_total=15_000_000)
    found(logs, ".txt has bytes_total 15914779, .jsonl 15000000")
    logs.events["settings"]["machine"]["hardware"] = "8 × NVIDIA H100 80GB HBM3"
    found(logs, "HARDWARE 1 × NVIDIA H200")
    edit(logs, "trained", val_bpb=0.5)  # package's table shows it as "before quantization"
    found(logs, "0.5000")
    edit(logs, "trained", train_clock_seconds=170.0)
    found(logs, "a clock of 177.4 s, .jsonl of 170.000 s")


@pytest.mark.parametrize(
    "value",
    ["/data/" + "long/" * 50, "two  spaces", "a\nprompt  in lines", "d\udce4t", "x" * 199 + "\n "],
)
def test_a_setting_that_the_text_has_cut_or_escaped_is_no_contradiction(logs, value):
    """A path of 300 letters or a prompt of two lines made an honest run one that nobody could
    package; another value still is one.
    """
    logs.events["settings"]["settings"]["data_path"] = value
    logs.text.settings["data_path"] = " ".join(t.shown(value).split())
    assert evidence.contradictions(logs) == []
    logs.text.settings["data_path"] = "y" + logs.text.settings["data_path"]
    found(logs, ".txt has DATA_PATH y")


def test_a_scores_tables_come_to_the_score_and_to_the_text(logs):
    counts = {"scored_tokens": 1000, "bytes": 3000}
    loss = logs.events["final"]["val_loss"]
    table = {"targets": [400, 600], "bytes": [1000.0, 2000.0], "nats": [300 * loss, 700 * loss]}
    seconds = logs.text.evaluation_seconds
    logs.events["final"]["evaluation_seconds"] = seconds + 0.04
    tables = {"seconds": 1.0, "chunks": table}
    logs.events.update({"validation_data": counts, "final_profile": tables})
    assert evidence.other_sums(logs) == []
    for column, value, said in (
        ("nats", [300 * loss, 699 * loss], "the score to another sum"),
        ("bytes", [1000.0, 1999.0], "is of 2,999 bytes, the text has others"),
        ("targets", [400, 601], "is of 1,001 targets"),
        ("nats", ["many"], "has no sums"),
    ):
        logs.events["final_profile"]["chunks"] = table | {column: value}
        found(logs, f"the final score's table chunks {said}" if "sum" not in said else said)
    edit(logs, "final", evaluation_seconds=seconds - 1)
    found(logs, f"evaluation took {seconds} s in .txt, {seconds - 1} s in .jsonl")


def test_steps_that_do_not_fit_the_clock_are_seen(logs):
    edit(logs, "trained", steps=13_000)
    found(logs, "13000 steps of 41.51 ms take 539.6 s, but the training clock stood at 177.4 s")
    found(logs, "the last step logged is 4200, of 13000")


def test_a_clock_set_back_is_given_away_by_the_steps_and_by_the_wall(logs):
    """The last figures alone; the single steps' too; their wall clock too, but for the ends."""
    edit(logs, "trained", train_clock_seconds=17.0, step_avg_ms=4.0)
    logs = logs._replace(text=logs.text._replace(training_seconds=17.0))
    found(logs, "ended at 174.3 s of training, but the whole clock is 17.0 s")
    for record in evidence.steps_of(logs.records):
        record["train_ms"] /= 10.3
        record["step_avg_ms"] /= 10.3
    found(
        logs, "174.3 s passed while steps were logged, of which the training clock counted 16.9 s"
    )
    for record in logs.records:
        record["seconds"] /= 1000
    found(logs, "17.0 s of training were counted while 0.2 s passed")


def test_a_step_that_runs_ahead_and_a_wall_clock_that_runs_back_are_seen(logs):
    evidence.steps_of(logs.records)[9]["train_ms"] += 3000
    found(logs, "step 250: 250 × 41.78 ms are not 13445 ms")
    evidence.steps_of(logs.records)[5]["seconds"] = 1.0
    found(logs, "runs backwards")


@pytest.mark.parametrize("seconds", [float("nan"), None, "12.0", True])
def test_a_wall_clock_that_is_no_number_is_seen(logs, seconds):
    """With NaN beside the steps, nothing bounded the training clock, and nothing told of it."""
    for record in evidence.steps_of(logs.records):
        record["seconds"] = seconds
    found(logs, "the wall clock beside a record is no number")


def test_limits_are_the_contests_whatever_the_settings_say(logs):
    text = logs.text
    text.settings["max_wallclock_seconds"] = "7200.0"
    changed = text._replace(training_seconds=7100.0, evaluation_seconds=4900.0)
    found(logs._replace(text=changed), "training took 7100.0 s of 600 s")
    generous = changed._replace(evaluation_limit=5000.0, total_bytes=16_000_001)
    found(logs._replace(text=generous), "evaluation took 4900.0 s of 600 s")
    found(logs._replace(text=generous), "16,000,001 bytes are over the cap of 16,000,000")
    assert evidence.limit_of("0.0") == evidence.limit_of("what") == evidence.limit_of(1e9) == 600
    assert evidence.limit_of("180.0") == 180
    assert evidence.limit_of("nan") == evidence.limit_of("-1") == 600  # nothing is more than nan


def test_what_is_written_behind_an_evaluation_is_not_its_time(logs):
    """FineWeb's tables of plain windows take seconds, and so may EVAL_NLL_PATH: of an evaluation of
    15 s, 25 seemed to have passed.
    """
    walls = {"evaluation": 20.0, "evaluated": 35.1, "after_quantization": 35.1, "final": 45.0}
    records = [{"event": event, "seconds": wall} for event, wall in walls.items()]
    honest = logs.text._replace(evaluation_seconds=15.0)
    one = logs._replace(text=honest, records=records)
    assert evidence.impossible_evaluations(one) == []
    less = logs._replace(text=honest._replace(evaluation_seconds=5.0), records=records)
    assert evidence.impossible_evaluations(less) == ["evaluation took 5.0 s while 15.1 s passed"]
    older = logs._replace(text=honest, records=[x for x in records if x["event"] != "evaluated"])
    assert evidence.impossible_evaluations(older) == ["evaluation took 15.0 s while 25.0 s passed"]


def test_epochs_given_up_with_time_to_spare_are_seen(logs):
    changed = logs.text._replace(epochs_given_up=1)
    found(logs._replace(text=changed), "1 epochs were given up for lack of time, but evaluation")
    late = logs._replace(text=changed._replace(evaluation_seconds=170.0))
    late.records[-1]["seconds"] += 170.0 - logs.text.evaluation_seconds
    assert evidence.contradictions(late) == []


def test_an_evaluation_that_starts_over_may_log_otherwise(logs):
    """Only the start that trained had VAL_LOSS_EVERY, and lines of steps by its TRAIN_LOG_EVERY."""
    settings = next(record for record in logs.records if record["event"] == "settings")
    settings["settings"] |= {"val_loss_every": 2000, "train_log_every": 1000}
    validation = {"event": "validation", "step": 2000, "val_loss": 4.0, "val_bpb": 1.5}
    kept = [x for x in logs.records if x["event"] != "train" or x["step"] % 1000 == 0]
    later = {"event": "settings", "settings": {"val_loss_every": 0, "train_log_every": 50}}
    again = logs._replace(
        records=[*kept, validation, later], events=logs.events | {"settings": later}
    )
    assert evidence.odd_records(again) == []
    assert evidence.impossible_steps(again, 177.4, 4272.0) == []
    settings["settings"] |= later["settings"]
    assert "validation at step 2000 is not one" in evidence.odd_records(again)[0]
    assert "the last step logged is 4000" in evidence.impossible_steps(again, 177.4, 4272.0)[0]


def stopped_at(logs: evidence.RunLogs, step: int) -> list[dict]:
    """The records that a start would leave which was stopped there."""
    kept = [r for r in logs.records if r["event"] in ("settings", "ready", "train")]
    return [record for record in kept if record.get("step", 0) <= step]


def test_a_resumed_run_is_named_and_its_earlier_starts_must_account_for_it(logs):
    """A checkpoint set back to no step and no second; to a step of another clock; one that nobody
    has seen; and an honest one.
    """
    earlier = [stopped_at(logs, 2000)]
    for resumed, starts, said in (
        ((0, 0.0), [], "no start before that trained"),
        ((0, 0.0), earlier, "to which no start before"),
        ((2500, 100.0), earlier, "to which no start before"),
        ((2000, 20.0), earlier, "by then 83.1 s had been counted"),
        ((2010, 83.5), earlier, ""),
    ):
        text = logs.text._replace(resumed=(resumed,))
        changed = logs._replace(text=text, earlier=starts)
        assert evidence.history(changed).startswith(f"RESUMED from step {resumed[0]} at")
        lost = evidence.lost_parts(changed)
        assert (said in lost[0]) if said else not lost
    nested = [[{"event": "resumed"}, *stopped_at(logs, 2000)]]
    text = logs.text._replace(resumed=((2010, 83.5),))
    (lost,) = evidence.lost_parts(logs._replace(text=text, earlier=nested))
    assert "at step 0" in lost
    # The log of a run that was made anew begins with one that was resumed from another's.
    assert evidence.lost_parts(logs._replace(earlier=nested)) == []
    anew = [*nested, stopped_at(logs, 2000)]
    assert evidence.lost_parts(logs._replace(text=text, earlier=anew)) == []


def test_a_resumption_that_one_log_conceals_is_seen(logs):
    """By .txt alone, by .jsonl alone, or by both although RESUME names a file."""
    text = logs.text._replace(resumed=((2010, 83.5),))
    found(logs._replace(text=text), "the other does not")
    records = [{"event": "resumed"}, *logs.records]
    found(logs._replace(records=records), "the other does not")
    logs.text.settings["resume"] = "logs/other.checkpoint"
    found(logs, "RESUME=logs/other.checkpoint asks for a checkpoint")


def test_another_artifact_than_the_logs_is_seen(logs, tmp_path):
    artifact = tmp_path / "artifact"
    size = logs.events["trained"]["bytes_total"] - logs.events["trained"]["bytes_code"]
    artifact.write_bytes(bytes(size))
    assert evidence.other_artifact(logs, artifact) == []
    edit(logs, "trained", artifact_sha256=evidence.file_sha256(artifact))
    assert evidence.contradictions(logs, artifact) == []
    artifact.write_bytes(bytes(size - 1) + b"x")
    (text,) = evidence.contradictions(logs, artifact)
    assert "another file than the log's" in text
    artifact.write_bytes(b"x")
    assert "has 15,774,850 bytes" in evidence.contradictions(logs, artifact)[0]


def with_hashes(logs: evidence.RunLogs, **changes) -> evidence.RunLogs:
    """A log that names its files, in both of its files, or otherwise in the records."""
    record = {"event": "hashes", "tokenizer": {"t.model": "1" * 64}}
    record |= {"validation": {"v.bin": "2" * 64}, "training": {"a.bin": "3" * 64, "b.bin": ""}}
    record |= {"overlap_documents": None}
    lines = [
        f"SHA-256, tokenizer: t.model {'1' * 64}",
        f"SHA-256, validation: v.bin {'2' * 64}",
        f"SHA-256, training: a.bin {'3' * 64}, 1 not hashed (python data/prepare.py does that)",
        "validation documents that are training documents too: not known",
    ]
    text = logs.text._replace(messages="\n".join([logs.text.messages, *lines, ""]))
    record |= changes
    records = [*logs.records[:1], record | {"seconds": 0.0}, *logs.records[1:]]
    return logs._replace(text=text, records=records, events=logs.events | {"hashes": record})


def test_files_are_the_same_in_both_logs_and_no_shard_is_scored_that_was_learnt(logs):
    honest = with_hashes(logs)
    honest.records[0]["seconds"] = 0.0
    assert evidence.contradictions(honest) == []
    unsaid = ("SHA-256 of the files", "overlap")
    assert not set(unsaid) & set(evidence.unprinted(honest))
    text = honest.text.messages.replace(
        "SHA-256, training:", "SHA-256, training (by manifest.json):"
    )
    text = text.replace("too: not known", "too: 1,000 (by manifest.json)")
    taken = with_hashes(logs, overlap_documents=1000)  # as newer scripts say whose word it is
    taken.records[0]["seconds"] = 0.0
    assert evidence.contradictions(taken._replace(text=taken.text._replace(messages=text))) == []
    assert set(unsaid) <= set(evidence.unprinted(logs))
    other = with_hashes(logs, training={"a.bin": "4" * 64})
    found(
        other, f".txt has training {'3' * 64} of SHA-256 of the files, .jsonl training {'4' * 64}"
    )
    found(with_hashes(logs, overlap_documents=3), ".txt has not known of overlap, .jsonl 3")
    learnt = with_hashes(logs, training={"a.bin": "3" * 64, "b.bin": "2" * 64})
    found(learnt, "v.bin is a training shard too, by its SHA-256")
    found(with_hashes(logs, validation=[1]), ".jsonl validation")


def test_shards_that_a_log_counts_and_does_not_name_are_seen(logs):
    """One whose name was taken out of both logs could be the validation text."""
    logs = with_hashes(logs)
    for kind, count in (("validation", 1), ("training", 2)):
        data = logs.events[f"{kind}_data"] = {"shards": count}
        assert evidence.miscounted_shards(logs) == []
        data["shards"] += 1
        (told,) = evidence.miscounted_shards(logs)
        assert told == f"the log counts {count + 1} {kind} shards, and names {count}"
        found(logs, told)
        data["shards"] = count


def test_files_are_held_against_those_at_hand(logs):
    """By what they hold and by their order, not by name; a log that names none is silent."""
    logs = with_hashes(logs)
    assert evidence.other_files(logs, "validation", {"other.bin": "2" * 64}) == []
    (told,) = evidence.other_files(logs, "validation", {"v.bin": "3" * 64})
    assert "the log's validation is of other files: v.bin 2222222222222222; here are v.bin" in told
    assert evidence.other_files(logs, "training", {"b.bin": "", "a.bin": "3" * 64})
    logs.events.pop("hashes")
    assert evidence.other_files(logs, "validation", {"v.bin": "3" * 64}) == []


def test_a_text_log_alone_can_be_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(LOG.read_bytes())
    logs = evidence.read_logs(path)
    assert logs.events == {}
    assert evidence.contradictions(logs) == []
    path.with_suffix(".jsonl").write_text("")
    with pytest.raises(UserError, match="has no records"):
        evidence.read_logs(path)
