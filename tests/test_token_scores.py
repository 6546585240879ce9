"""Scores of single tokens in tables: where a lead was put, there it is found; what is refused."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t
from tests.support import (
    SOLO,
    called_here,
    document_stream,
    random_model,
    run_environment,
    run_here,
    tiny,
    validation_set,
)
from tools import token_scores as w

LOG2 = np.log(2)


def describe(tokens, **settings) -> w.Text:
    settings = tiny(**{"eval_mode": "plain", "document_reset": True} | settings)
    return w.describe_text(validation_set(np.asarray(tokens, np.uint16)), settings)


def slow_rows(text: w.Text) -> tuple[list[int], list[int]]:
    """By the definition: each target's longest piece seen before, and its token's distance."""
    tokens = text.tokens.tolist()
    longest, distances = [], []
    for place, seen in enumerate(text.seen):
        target = place + 1
        found = [0]
        for length in range(1, w.LONGEST_PIECE + 1):
            piece = tokens[target - length + 1 : target + 1]
            ends = range(seen + length - 1, target)
            if any(tokens[end - length + 1 : end + 1] == piece for end in ends):
                found.append(length)
        back = [target - end for end in range(seen, target) if tokens[end] == tokens[target]]
        longest.append(max(found))
        distances.append(min(back, default=0))
    return longest, distances


def scores_of(text: w.Text, lead: np.ndarray, clock_factor: float = 1.0) -> w.Scores:
    """Ours are 3 nats each; the twin's are more by a lead."""
    ours = np.full((1, len(text.targets)), 3.0)
    return w.Scores(ours, ours + clock_factor * lead)


def tables(text: w.Text, clocks: list[w.Scores]) -> dict[str, list[dict]]:
    counts = np.bincount(text.tokens, minlength=512)
    named = dict(zip((45.0, 90.0), clocks, strict=False))
    return {x.name: w.tabulate(text, x, named) for x in w.group(text, counts)}


@pytest.mark.parametrize("reset", [True, False])
def test_what_could_be_seen_is_found_as_the_definition_says(reset):
    """Few kinds of tokens, so that pieces recur; documents and windows that cut them."""
    tokens = document_stream(400) % 7 + 1
    text = describe(tokens, train_seq_len=24, document_reset=reset)
    longest, distances = slow_rows(text)
    assert set(longest) == {0, 1, 2, 3}
    parted = {x.name: x for x in w.group(text, np.ones(512))}
    inner = text.targets != t.BOS_ID
    assert parted["copying"].row_of[inner].tolist() == np.array(longest)[inner].tolist()
    assert w.piece_distance(text, 1).tolist() == distances
    assert (parted["copying"].row_of[~inner] == len(w.PIECES)).all() and (~inner).any()


def test_a_target_sees_what_its_window_and_its_document_hold():
    """Two documents of 5 and 20 tokens in windows of 8."""
    tokens = [1, *range(4, 8), 1, *range(8, 27)]
    seen = describe(tokens, train_seq_len=8).seen
    assert seen.tolist() == [0] * 5 + [5] * 3 + [8] * 8 + [16] * 8
    stream = describe(tokens, train_seq_len=8, document_scope="scans").seen
    assert stream.tolist() == [0] * 8 + [8] * 8 + [16] * 8


def test_windows_are_those_that_an_evaluation_reads():
    """Of each target, the first token of the excerpt that it is scored from."""
    text = describe(document_stream(300), train_seq_len=32, document_reset=False)
    settings = tiny(eval_mode="plain", ttt_enabled=False)
    first = np.full(len(text.targets), -1)

    class Observer(t.EvaluationObserver):
        def on_score(self, excerpt, scored, nats):
            begins = np.broadcast_to(excerpt.positions[:, :1], scored.shape)
            first[excerpt.positions[scored]] = begins[scored]

    model = random_model(settings)
    validation = validation_set(text.tokens.astype(np.uint16))
    t.Evaluator(model, settings, SOLO, validation, observer=Observer()).evaluate()
    assert first.tolist() == text.seen.tolist()


def test_a_model_that_copies_leads_where_it_can_copy_and_nowhere_else():
    """Half a nat on tokens seen before, twice as much on pairs; later, only on pairs."""
    text = describe(document_stream(3000) % 40 + 1, train_seq_len=256)
    longest, _ = map(np.array, slow_rows(text))
    inner = text.targets != t.BOS_ID
    early = np.where(inner, 0.5 * (longest >= 1) + 0.5 * (longest >= 2), 0.0)
    late = np.where(inner, 1.0 * (longest >= 2), 0.0)
    found = tables(text, [scores_of(text, early), scores_of(text, late)])
    rows = {row["row"]: row for row in found["copying"]}
    assert [rows[name]["lead"] for name in w.PIECES[:3]] == [[0, 0], [0.5, 0], [1, 1]]
    assert rows["token before"]["lead_error"] == [0, 0]
    assert rows[w.END]["lead"] == [0, 0]
    alone = np.count_nonzero(inner & (longest == 1))
    bits = text.target_bytes.sum() * LOG2
    assert rows["token before"]["change"][0] == pytest.approx(-0.5 * alone / bits, abs=1e-6)
    assert rows["pair before"]["change"] == [0]
    share = np.count_nonzero(inner & (longest == 2)) / late.sum()
    assert rows["pair before"]["share"][1] == pytest.approx(share, abs=1e-6)
    new = [row for row in found["both"] if row["row"].endswith(", new")]
    assert new and all(row["lead"] == [0, 0] for row in new)
    distance = {row["row"]: row["lead"][0] for row in found["distance"]}
    assert distance["new"] == 0 and distance["1 to 16"] >= 0.5


def test_rows_sum_up_to_the_whole_lead():
    text = describe(document_stream(2000), train_seq_len=64)
    lead = np.random.default_rng(2).standard_normal(len(text.targets)) + 0.1
    found = tables(text, [scores_of(text, lead), scores_of(text, lead, 0.7)])
    (whole,) = found.pop("all")
    assert whole["lead"][0] == pytest.approx(lead.mean(), abs=1e-6)
    assert whole["share"] == [1, 1]
    assert len(found) == 6
    for rows in found.values():
        assert sum(row["targets"] for row in rows) == len(text.targets)
        for name in ("share", "bpb", "change"):
            sums = np.sum([row[name] for row in rows], axis=0)
            assert sums == pytest.approx(whole[name], abs=1e-5), name


def test_a_lead_at_some_places_is_found_at_them():
    """One document of 3,000 tokens behind one of 100, in windows of 512."""
    tokens = np.array([1, *[5] * 99, 1, *[5] * 2999], np.uint16)
    text = describe(tokens, train_seq_len=512)
    number = np.concatenate([np.arange(2, 101), [0], np.arange(2, 3001)])
    found = tables(text, [scores_of(text, 1.0 * ((number > 64) & (number <= 256)))])
    leads = [(row["row"], row["targets"], row["lead"][0]) for row in found["position"]]
    assert leads == [
        ("1 to 64", 63 + 63, 0),
        ("65 to 256", 36 + 192, 1),
        ("257 to 1,024", 768, 0),
        ("1,025 to 2,048", 1024, 0),
        ("beyond 2,048", 952, 0),
        (w.END, 1, 0),
    ]
    assert found["position"][2]["lead_error"] == [None]  # of one document
    assert [row["row"] for row in found["seen"]] == ["1 to 64", "65 to 256", "257 to 1,024", w.END]


def test_fifths_go_by_frequency_in_training_text_and_keep_a_token_whole():
    """Ten kinds of tokens, equally often scored, of which token 10 + i was trained on i times."""
    tokens = np.concatenate([[1], np.tile(np.arange(10, 20), 50)])
    text = describe(tokens, train_seq_len=64)
    counts = np.zeros(512, np.int64)
    counts[10:20] = np.arange(10)
    parted = w.group_by_frequency(text, counts)
    assert np.array_equal(parted.row_of, (text.targets - 10) // 2)
    assert parted.rows[0] == f"0.0 to {1e6 / 45:,.1f} in a million"


def test_the_standard_error_is_that_of_documents_drawn_anew():
    """Tokens of a document share their lead: the error is far over that of single tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, 300)
    level = random.standard_normal(300)
    sums = np.stack([level * lengths, lengths], 1)
    value, error = w.ratio(sums[:, :1], sums[:, 1:])
    drawn = [sums[random.integers(0, 300, 300)].sum(0) for _ in range(2000)]
    again = np.std([above / below for above, below in drawn])
    assert value[0] == pytest.approx(sums[:, 0].sum() / lengths.sum())
    assert error[0] == pytest.approx(again, rel=0.1)
    _, error = w.ratio(np.array([[0.0], [7.0]]), np.array([[7.0], [7.0]]))
    assert error == pytest.approx([0.5])  # of the mean of 0 and 1, by their sample deviation


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Logs and scores of two runs of each kind, as far as they are read: two clocks."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = t.open_shards(str(shards), "val")[0].read()
    random = np.random.default_rng(0)
    for kind, clock in (("h", 45), ("h", 90), ("t", 45), ("t", 90)):
        nats = random.uniform(1, 3, len(tokens) - 1).astype(np.float32)
        write_run(folder, f"{kind}-{clock}", shards, clock, nats)
    return folder


def write_run(folder, name, shards, clock, nats, mode="plain", **changes):
    np.save(folder / f"{name}.npy", nats)
    validation = [x.sha256 for x in t.open_shards(str(shards), "val")]
    model = shards / "tokenizer.model"
    settings = {"seed": 1, "max_wallclock_seconds": clock, "vocab_size": 512, "train_seq_len": 32}
    settings |= {"document_reset": True, "document_scope": "all", "eval_any_tokens": False}
    settings |= {"data_path": str(shards), "tokenizer_path": str(model)}
    settings |= {"eval_nll_path": f"elsewhere/{name}.npy"} | changes
    hashes = {"tokenizer": {"x": t.file_sha256(model)}, "validation": {"v": validation[0]}}
    loss = float(nats.mean(dtype=np.float64))
    digest = t.summarize_shards(t.open_shards(str(shards), "train"))["digest"]
    events = [
        {"event": "settings", "settings": settings, "machine": {}},
        {"event": "hashes", **hashes},
        {"event": "training_data", "digest": digest},
        {"event": "final", "mode": mode, "val_loss": loss, "val_bpb": loss / 2},
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def start(ours, twin, out, *more) -> tuple[int, str, str]:
    arguments = ["--ours", *ours, "--twin", *twin, "--out", out, *more]
    main = functools.partial(w.run_command, "token_scores.py", w.main, t.UserError)
    done = called_here(main, "token_scores.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_tables_of_all_clocks(runs, tmp_path):
    """The scores lie beside the logs, not where the runs wrote them."""
    kinds = [[runs / f"{kind}-{clock}.jsonl" for clock in (90, 45)] for kind in "ht"]
    status, said, error = start(*kinds, tmp_path / "a.json")
    assert (status, error) == (0, "")
    facts = json.loads((tmp_path / "a.json").read_text())
    assert [run["clock"] for run in facts["runs"]] == [45, 90]
    nats = {name: np.load(runs / f"{name}.npy") for name in ("h-45", "t-45", "h-90", "t-90")}
    leads = [np.mean(nats[f"t-{c}"] - nats[f"h-{c}"], dtype=np.float64) for c in (45, 90)]
    assert facts["tables"]["all"][0]["lead"] == pytest.approx(leads, abs=1e-6)
    heads = [line.split(" | ")[0] for line in said.splitlines() if "targets, %" in line]
    names = ["all", "position", "seen", "frequency", "copying", "distance", "both"]
    assert heads == [f"| {name}" for name in names]


def test_seeds_of_a_clock_are_averaged_and_their_spread_is_told(runs):
    """Of two seeds and one: the variance of a difference of means."""
    logs = [w.read_run(runs / f"h-{clock}.jsonl") for clock in (45, 90)]
    second = logs[1]._replace(settings=logs[1].settings | {"max_wallclock_seconds": 45})
    nats = np.stack([np.load(runs / f"h-{clock}.npy") for clock in (45, 90)])
    found = w.by_clock([logs[0], second], nats.shape[1])
    assert list(found) == [45]
    assert np.array_equal(found[45], nats)
    text = describe(document_stream(600), train_seq_len=32)
    twin = nats[:1] + 0.25
    (whole,) = tables(text, [w.Scores(nats, twin), w.Scores(nats[:1], twin)])["all"]
    assert whole["ours"] == pytest.approx([nats.mean(), nats[0].mean()], abs=1e-6)
    assert whole["lead"] == pytest.approx([twin.mean() - nats.mean(), 0.25], abs=1e-6)
    spread = np.std(nats.mean(1, dtype=np.float64), ddof=1) / 2 / LOG2  # a target has two bytes
    assert whole["bpb_seeds"] == pytest.approx([spread * 1.5**0.5, spread * 2**0.5], abs=1e-6)
    assert whole["change_seeds"] == pytest.approx([spread * 3.5**0.5], abs=1e-6)


def test_what_cannot_be_compared_ends_in_one_line(runs, shards, tmp_path):
    nats = np.load(runs / "t-45.npy")

    def twin(name, shown=nats, **changes):
        return write_run(tmp_path, name, shards, 45, shown, **changes)

    def changed(name, before, after):
        path = twin(name)
        path.write_text(path.read_text().replace(before, after))
        return path

    sha256 = t.open_shards(str(shards), "val")[0].sha256
    digest = t.summarize_shards(t.open_shards(str(shards), "train"))["digest"]
    replaced = twin("replaced")
    np.save(tmp_path / "replaced.npy", nats + 1)
    pickled = twin("pickled")
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    texts = twin("texts")
    np.save(tmp_path / "texts.npy", nats.astype(str))
    archive = twin("archive")
    (tmp_path / "archive.npy").write_bytes(b"PK\3\4 of no archive")
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    cases = [
        (twin("short", nats[:-1]), "does not have a score for each of the text's 599 targets"),
        (twin("window", train_seq_len=64), "TRAIN_SEQ_LEN=64, but"),
        (twin("scope", document_scope="scans"), "DOCUMENT_SCOPE=scans, but"),
        (twin("adapted", mode="plain_ttt"), "scored plain_ttt, not EVAL_MODE=plain"),
        (twin("none", eval_nll_path=""), "it wants EVAL_NLL_PATH"),
        (twin("clock", max_wallclock_seconds=90), "other clocks, ours: 45; twin: 90"),
        (twin("steps", max_wallclock_seconds=0), "not trained to the end of its clock"),
        (changed("text", sha256, "0" * 64), "another validation than"),
        (replaced, "another run's"),
        (pickled, "is no file of scores"),
        (texts, "is no file of scores"),
        (archive, "is no file of scores"),
        (twin("hole", np.where(np.arange(len(nats)), nats, np.nan)), "has no score: its val_loss"),
        (changed("word", '"val_bpb": ', '"val_bpb": null, "x": '), "has no score: its val_loss"),
        (runs / "h-45.jsonl", "a log is given twice"),
        (other, "other.jsonl"),
    ]
    for log, message in cases:
        place = tmp_path / "a.json"
        status, _, error = start([runs / "h-45.jsonl"], [log], place)
        assert status == 2 and error.count("\n") == 1
        assert message in error
        assert not place.exists()
    ours = [changed("trained", digest, "0" * 16)]
    status, _, error = start(ours, [runs / "t-45.jsonl"], tmp_path / "b.json")
    assert status == 2 and "has another training text" in error


@pytest.mark.parametrize("place", ["first", "second"])
def test_runs_of_one_kind_differ_in_clock_and_seed(runs, shards, tmp_path, place):
    """Half the text and one seed twice were averaged as two seeds of a clock."""
    nats = np.load(runs / "h-45.npy")
    digest = t.summarize_shards(t.open_shards(str(shards), "train"))["digest"]
    half = write_run(tmp_path, "half", shards, 45, nats, seed=2)
    half.write_text(half.read_text().replace(digest, "0" * 16))
    cases = [
        (half, "has another training text than"),
        (write_run(tmp_path, "same", shards, 45, nats), "has SEED=1 at 45 s, as"),
        (write_run(tmp_path, "rate", shards, 90, nats, matrix_lr=0.1), "MATRIX_LR="),
    ]
    for log, message in cases:
        ours = [log, runs / "h-45.jsonl"] if place == "first" else [runs / "h-45.jsonl", log]
        twin = [runs / "t-45.jsonl"] + [runs / "t-90.jsonl"] * (log.stem == "rate")
        status, said, error = start(ours, twin, tmp_path / "a.json")
        assert (status, said) == (2, "")
        assert message in error and error.count("\n") == 1
    second = write_run(tmp_path, "second", shards, 45, nats, seed=2)
    ours = [runs / "h-45.jsonl", second]
    status, said, _ = start(ours, [runs / "t-45.jsonl"], tmp_path / "a.json")
    assert status == 0
    assert "(seeds [1, 2])" in said


def test_a_run_scored_again_elsewhere_is_of_its_kind(runs, shards, tmp_path):
    """EVAL_ONLY takes over what trained; how it was started is its own."""
    nats = np.load(runs / "h-45.npy")
    again = {"seed": 2, "eval_only": True, "compile": "off", "eval_stride": 64}
    ours = [runs / "h-45.jsonl", write_run(tmp_path, "again", shards, 45, nats, **again)]
    status, _, error = start(ours, [runs / "t-45.jsonl"], tmp_path / "a.json")
    assert (status, error) == (0, "")


def test_no_input_is_written_over_and_what_lies_elsewhere_is_asked_for(shards, tmp_path):
    nats = np.random.default_rng(0).uniform(1, 3, 599).astype(np.float32)
    ours, twin = (write_run(tmp_path, kind, shards, 45, nats) for kind in "ht")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = shards / "tokenizer.model"
    for out in (*kept, model, tmp_path, Path("/dev/full")):
        status, said, error = start([ours], [twin], out)
        assert (status, said) == (2, "")
        assert str(out) in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    other = tmp_path / "other.model"
    other.write_text("another")
    for option, value, message in (
        ("--tokenizer", tmp_path / "none", "had it: give --tokenizer FILE"),
        ("--tokenizer", other, "has another tokenizer, by its digest: give --tokenizer FILE"),
        ("--data", tmp_path, "had them: give --data FOLDER"),
    ):
        out = tmp_path / "a.json"
        status, _, error = start([ours], [twin], out, option, value)
        assert status == 2 and message in error


def test_a_run_and_its_artifact_scored_again_are_read(monkeypatch, shards, tmp_path):
    """The script's own logs and scores; those of EVAL_ONLY name no training shards."""
    changes = {"eval_mode": "plain", "ttt_enabled": False, "max_wallclock_seconds": 4.0}
    changes |= {"eval_nll_path": tmp_path / "a.npy", "export_reserve_seconds": 3.9}
    changes["iterations"] = 10_000  # the clock is to end it, also where steps are fast
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **changes)) == 0
    again = {"EVAL_ONLY": "1", "RUN_ID": "a", "LOG_DIR": str(tmp_path), "DEVICE": "cpu"}
    again["EVAL_NLL_PATH"] = str(tmp_path / "again.npy")
    assert run_here(monkeypatch, again) == 0
    logs = [[tmp_path / "a.jsonl"], [tmp_path / "a.eval.jsonl"]]
    status, said, error = start(*logs, tmp_path / "where.json")
    assert (status, error) == (0, "")
    assert "4 s: BPB ours" in said
    (whole,) = json.loads((tmp_path / "where.json").read_text())["tables"]["all"]
    assert whole["lead"] == [0]
    assert whole["share"] == [None]
