"""tools/report: every section from a log that has all, what fills those of one that has nothing,
text that would be a script, and the page in a browser.
"""

import html
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE, called_here, run_environment, run_here, start_here
from tools.command import UserError
from tools.report import __main__ as report
from tools.report import charts, markup
from train_gpt import FIELDS

ROOT = Path(__file__).resolve().parent.parent
SEEDS = sorted((ROOT / "logs" / "web-60s-180s").glob("s180-*.jsonl"))
TITLES = ["Result", "Clocks", "Curves", "Settings", "Bytes", "Machine", "Data", "Quantization"]
TITLES += ["Where the bits are", "Test-time training", "Sample", "Audit"]
TAKE = "document.title='taken'"
EVIL = f'</script><script>{TAKE}</script><img src=x onerror="{TAKE}">'
AUDIT = """**NOT ISOLATED: the script could read and write anything here.**

| check | result | evidence |
| --- | --- | --- |
| 16,000,000 bytes | holds | 15,930,000 of a \\| b & <c> |
| causal | FAILS | token 17 |

Not checked: clocks.
"""
SETTINGS = {
    "run_id": "full",
    "preset": "short",
    "seed": 1337,
    "eval_only": False,
    "train_batch_tokens": 1000,
    "max_wallclock_seconds": 180.0,
    "eval_max_seconds": 700.0,
    "eval_mode": "sliding",
    "eval_stride": 512,
    "ttt_enabled": True,
    "ttt_epochs": 2,
    "ttt_chunk_tokens": 8,
    "quantizer": "gptq",
    "sample_prompt": EVIL,
}
MACHINE = {"python": "3.12.3", "hardware": "1 × H200", "host": EVIL}
CHUNKS = [8, 8, 4]  # targets
TABLE = {"targets": [4, 6, 10], "bytes": [0.0, 16.0, 48.0], "nats": [10.0, 20.0, 40.0]}
PLAIN = dict.fromkeys(("document_length", "document_position", "window_position"), TABLE)
PLAIN |= {"chunks": {"targets": CHUNKS, "bytes": [24.0, 24.0, 16.0], "nats": [27.2, 24.0, 11.2]}}
SLIDING = dict.fromkeys(("document_length", "document_position"), TABLE)
ADAPTED = {"first_epoch": [26.4, 23.6, 0.0], "last_epoch": [25.6, 23.2, 0.0], "epochs": [2, 2, 0]}
ADAPTED |= {"score_seconds": [5.0, 4.0, 2.0], "adapt_seconds": [9.5, 8.5, 0.0]}
SLIDING |= {"chunks": PLAIN["chunks"] | {"nats": [26.4, 22.4, 10.4]} | ADAPTED}
KINDS = {"embedding, int8": 3_632_136, "MLP, int6": 11_000_000, "rest": 1_000_000}
FILES = {"tokenizer": {"books.model": "0123" * 16}, "validation": {"books_val_0.bin": "4567" * 16}}
FILES |= {"training": {"books_train_0.bin": "89ab" * 16, "books_train_1.bin": ""}}
COUNTS = {"shards": 1, "documents": 1297, "tokens": 895_065}


def full_log(path: Path, steps: int = 30, **settings) -> Path:
    """A log with each record that a run can write."""
    chosen = SETTINGS | {"run_id": path.stem} | settings
    hashes = {name: name[0] * 64 for name in ("script", "artifact")}
    begun = {"settings": chosen, "machine": MACHINE, "given": ["preset", "seed"]}
    records = [("settings", 0.1, begun | {"script_sha256": hashes["script"]})]
    counts = COUNTS | {"scored_tokens": 895_064, "bytes": 3_288_846}
    records.append(("validation_data", 0.2, counts))
    records.append(("training_data", 0.3, {"shards": 2, "tokens": 60_000, "digest": "b15bfb93"}))
    records.append(("hashes", 0.4, FILES | {"overlap_documents": 0}))
    records.append(("ready", 10.0, {}))
    for step in range(1, steps + 1):
        loss = 5.0 - step / 17
        times = {"step": step, "train_ms": 41.5 * step, "step_avg_ms": 41.5}
        records.append(("train", 10 + step, times | {"train_loss": loss, "lr_factor": 1 / step}))
    score = {"val_loss": 3.25, "val_bpb": 1.23456789}
    records.append(("validation", 45.0, {"step": steps} | score))
    times = {"text_seconds": 10.18, "pass_seconds": 0.39, "factor_seconds": 0.63}
    records.append(("calibration", 46.0, {"source": "self", "tokens": 131_072} | times))
    records.append(("quantized", 47.0, {"k": 15.06, "quantize_seconds": 0.77}))
    sizes = {"bytes_total": 15_931_456, "bytes_code": 299_320, "peak_bytes": 17_808_120_832}
    trained = {"steps": steps, "step_avg_ms": 41.5, "starts": 1, "train_clock_seconds": 177.75}
    trained |= sizes | score | {"sdclip_k": 15.06, "artifact_sha256": hashes["artifact"]}
    trained["bytes_by_kind"] = KINDS
    records.append(("trained", 50.0, trained))
    plain = {"val_loss": 3.3, "val_bpb": 1.25678901, "mode": "plain", "evaluation_seconds": 1.75}
    records += [("after_quantization", 52.0, plain), ("after_quantization_profile", 52.1, PLAIN)]
    kinds = {"bpb_by_kind": {"mamba": 0.0125, "attention": -0.001}}
    records.append(("quantization_loss", 55.0, kinds))
    told = {"prompt": EVIL, "sample": f"{EVIL} and so on", "tokens": 200}
    records.append(("sample", 60.0, told | {"temperature": 0.8, "top_p": 0.95}))
    records.append(("evaluation", 60.1, {"attempt": 2}))
    final = {"val_loss": 3.0, "val_bpb": 1.21987654, "epochs_given_up": 3, "mode": "sliding_ttt"}
    final |= {"evaluation_seconds": 33.25, "artifact_sha256": hashes["artifact"]}
    records += [("final", 93.5, final), ("final_profile", 93.6, SLIDING)]
    lines = [{"event": event, "seconds": at} | values for event, at, values in records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def full(tmp_path) -> list[Path]:
    """The arguments for a page in which every section has its data."""
    (tmp_path / "audit.md").write_text(AUDIT)
    return [full_log(tmp_path / "full.jsonl"), "--audit", tmp_path / "audit.md"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The page of such a log with drawings, which take seconds."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "audit.md").write_text(AUDIT)
    log = full_log(folder / "full.jsonl")
    made(folder, log, "--audit", folder / "audit.md", "--static")
    return folder / "report.html"


def made(folder: Path, *arguments) -> str:
    """The page that these arguments make."""
    out = folder / "report.html"
    assert called_here(report.main, "report", *arguments, "--out", out).returncode == 0
    return out.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """What a page shows, by the text of its sections; its elements, and its charts' data."""

    def __init__(self, text: str):
        super().__init__()
        self.open = []
        self.tags = []
        self.sections = {}
        self.charts = []
        self.heading = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.charts.append(json.loads(text))
        elif tag == "h2":
            self.heading = text
            self.sections[text] = ""
        elif self.heading and tag not in ("script", "style"):
            self.sections[self.heading] += f" {text}"

    def classes(self) -> list[str]:
        return [attributes.get("class", "") for _, attributes in self.tags]


# What each section of the full log's page must show.
SHOWN = {
    "Result": [
        "1.2199",
        "1.21987654",
        "1.23456789",
        "1.25678901",
        "41.50",
        "final",
        "30",
        "attempts at evaluation 2",
    ],
    "Clocks": [
        "177.8 s of 180 s",
        "33.2 s of 600 s",
        "scoring 11.0 s; adapting 18.0 s; loading and the rest 4.2 s",
        "sliding, adapting, final 1.21988 33.25",
        "plain, after quantization 1.25679 1.75",
        "93.5 s in all",
        "GPTQ, packing 40.0",
    ],
    "Curves": ["Training loss", "Learning rates", "Time of a step"],
    "Settings": ["PRESET", "short", "SEED", "1337", "12 others", EVIL],
    "Bytes": [
        "15,931,456 of 16,000,000",
        "299,320 code, 15,632,136 model, 68,544 left",
        "embedding, int8 3,632,136, 23.2%",
        "MLP, int6 11,000,000, 70.4%",
    ],
    "Machine": ["3.12.3", "1 × H200", "17,808,120,832", EVIL],
    "Data": [
        *("895,064", "3,288,846", "1,297", "30,000, 0.50", "b15bfb93", "s" * 64, "a" * 64),
        *("SHA-256 of 4 files", "validation: books_val_0.bin " + "4567" * 16, "0123" * 16),
        *("training: books_train_1.bin not hashed", "training documents, too: 0"),
    ],
    "Quantization": [
        *("15.06", "131,072", "10.18", "0.39", "0.63", "+0.022221", "+0.012500", "-0.001000")
    ],
    # 20 / 16 / ln 2 and 40 / 48 / ln 2 bits per byte.
    "Where the bits are": [
        *("By length of the document", "By place in the document", "By place in a plain window"),
        *("1 25.00% 1.8034", "2 to 3 75.00% 1.2022"),
    ],
    "Test-time training": [
        *(
            "sliding windows, stride 512, adapting",
            "0.036912 bits",
            "3",
            "Nats of",
            "Time of adapting",
        ),
        *("epochs 4", "its last epoch less its first -0.07500"),
    ],
    "Sample": [EVIL, "and so on", "200 tokens, temperature 0.8, top p 0.95"],
    "Audit": ["15,930,000 of a | b & <c>", "FAILS", "NOT ISOLATED", "Not checked: clocks."],
}


def assert_whole(text: str) -> None:
    """That a page has every section, with the log's numbers in it, and nothing from elsewhere."""
    page = Page(text)
    assert list(page.sections) == TITLES == list(SHOWN)
    assert "missing" not in page.classes()
    for title, wanted in SHOWN.items():
        for one in wanted:
            assert one in " ".join(page.sections[title].split()), (title, one)
    names = {tag for tag, _ in page.tags}
    assert not names & {"img", "link", "iframe", "base", "object"}
    sources = [value for _, said in page.tags for key, value in said.items() if "src" in key]
    assert sources == []


def test_a_log_with_every_record_fills_every_section(tmp_path, full):
    text = made(tmp_path, *full)
    assert_whole(text)
    assert 1_000_000 < len(text.encode()) < 6_000_000


def test_so_it_does_with_drawings(drawn):
    text = drawn.read_text(encoding="utf-8")
    assert_whole(text)
    assert len(text.encode()) < 300_000
    assert "plotly" not in text
    assert Page(text).charts == []
    # Loss by step, second and token; rates, step times; three tables; chunks thrice.
    assert text.count("<svg") == 11
    assert "currentColor" in text and charts.INK not in text


def test_a_run_of_the_script_fills_every_section_but_the_audits(monkeypatch, shards, tmp_path):
    """Its own records, whose form the log above only repeats."""
    asked = {"quantization_report": True, "sample_prompt": "A", "sample_tokens": 4}
    assert run_here(monkeypatch, run_environment(shards, tmp_path, **asked)) == 0
    log = tmp_path / "a.jsonl"
    page = Page(made(tmp_path, log))
    assert list(page.sections) == TITLES
    assert page.classes().count("missing") == 1 and "No audit was given" in page.sections["Audit"]
    events = {record["event"]: record for record in map(json.loads, log.read_text().splitlines())}
    wanted = {"Result": f"{events['final']['val_bpb']:.8f}"}
    wanted["Clocks"] = f"{events['final']['evaluation_seconds']:.2f}"
    wanted["Bytes"] = f"{events['trained']['bytes_by_kind']['MLP, int6']:,}"
    wanted["Quantization"] = f"{events['quantization_loss']['bpb_by_kind']['MLP']:+.6f}"
    wanted["Sample"] = "4 tokens, temperature 0.8, top p 0.95"
    wanted["Data"] = next(iter(events["hashes"]["validation"].values()))
    table = events["final_profile"]["document_position"]
    bits = table["nats"][3] / math.log(2) / table["bytes"][3]
    wanted["Where the bits are"] = (
        f"4 to 7 {table['bytes'][3] / sum(table['bytes']):.2%} {bits:.4f}"
    )
    wanted["Test-time training"] = f"epochs {sum(events['final_profile']['chunks']['epochs']):,.0f}"
    for title, one in wanted.items():
        assert one in " ".join(page.sections[title].split()), title


def test_curves_are_the_logs_numbers(tmp_path, full):
    losses, rates, times, length, _, window, *chunks = Page(made(tmp_path, *full)).charts
    records = [json.loads(line) for line in full[0].read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"]
    raw, mean, validation = losses["curves"]
    assert raw["y"] == [record["train_loss"] for record in steps]
    assert raw["xs"]["step"] == [record["step"] for record in steps]
    assert raw["xs"]["second of training"] == [round(r["train_ms"] / 1000, 3) for r in steps]
    assert raw["xs"]["million tokens"] == [record["step"] / 1000 for record in steps]
    assert mean["y"] == pytest.approx(raw["y"], abs=1e-4)  # a line is its own mean
    assert validation["y"] == [3.25] and validation["xs"]["step"] == [30]
    assert rates["curves"][0]["y"] == [record["lr_factor"] for record in steps]
    assert times["curves"][0]["y"] == [41.5] * 29
    assert length["curves"][0]["xs"] == {"tokens of the document": [1, 2]}
    assert length["ticks"][:5] == ["0", "1", "2", "4", "8"] and length["ticks"][-1] == "16384"
    assert window["curves"][0]["y"] == pytest.approx([1.80337, 1.20225], abs=1e-5)
    scores, gains, seconds = (chart["curves"] for chart in chunks)
    assert [curve["name"] for curve in scores] == ["full: plain windows, frozen", "full"]
    assert scores[0]["y"] == pytest.approx([3.4, 3.0, 2.8])
    assert scores[1]["y"] == pytest.approx([3.3, 2.8, 2.6])
    assert scores[1]["xs"]["chunk"] == [1, 2, 3]
    assert gains[0]["y"] == [pytest.approx(0.1), pytest.approx(0.05), None]
    assert [curve["y"] for curve in seconds] == [[9.5, 8.5, None], [5.0, 4.0, 2.0]]


def test_a_section_without_data_names_the_setting_that_fills_it(tmp_path):
    log = tmp_path / "bare.jsonl"
    settings = {"settings": SETTINGS, "machine": {}}
    log.write_text(json.dumps({"event": "settings", "seconds": 0.1} | settings) + "\n")
    page = Page(made(tmp_path, log, "--static"))
    assert list(page.sections) == TITLES
    wanted = {"Clocks": "EVAL_ONLY", "Curves": "TRAIN_LOG_EVERY", "Bytes": "TARGET_MB"}
    wanted |= {"Data": "DATA_PATH", "Quantization": "QUANTIZATION_REPORT", "Settings": "PRESET"}
    wanted |= {"Test-time training": "RUN_ID", "Sample": "SAMPLE_PROMPT"}
    wanted |= {"Where the bits are": "EVAL_ONLY"}
    for title, name in wanted.items():
        assert name in page.sections[title]
    assert "hashes of the files" in page.sections["Data"]
    assert "--audit audit.md" in page.sections["Audit"]
    assert "no score; last told: settings" in page.sections["Result"].replace("  ", " ")
    told = " ".join(page.sections.values())
    for name in re.findall(r"([A-Z][A-Z0-9_]+)=", told):
        assert name.lower() in FIELDS, name


def test_a_run_that_does_not_adapt_names_the_setting_that_would(tmp_path):
    log = full_log(tmp_path / "frozen.jsonl", ttt_enabled=False)
    change(log, "final_profile", **PLAIN)
    text = Page(made(tmp_path, log)).sections
    told = text["Test-time training"]
    assert "TTT_ENABLED=1" in told and "Nats of each chunk" in told and "its last epoch" not in told
    assert "scoring 11" not in text["Clocks"] and "33.2 s of 600 s" in text["Clocks"]


def test_bytes_of_a_run_whose_script_did_not_count_them_are_named(tmp_path):
    log = full_log(tmp_path / "uncounted.jsonl")
    text = log.read_text().replace('"bytes_by_kind"', '"other"')
    log.write_text(text)
    page = Page(made(tmp_path, log, full_log(tmp_path / "counted.jsonl")))
    assert "Not in the log of uncounted: bytes by kind of layer" in page.sections["Bytes"]
    assert "counted: bytes of the model by kind of layer" in page.sections["Bytes"]


def test_of_several_runs_those_that_lack_a_section_are_named(tmp_path, full):
    older = tmp_path / "older.jsonl"
    older.write_text(SEEDS[0].read_text())
    sections = Page(made(tmp_path, full[0], older)).sections
    assert "Not in the log of s180-1337" in sections["Sample"]
    assert "Not given, but different:" in sections["Settings"]
    assert "1.17384673" in sections["Result"] and "1.21987654" in sections["Result"]


def test_a_run_has_one_colour_whatever_other_runs_leave_out(tmp_path, full):
    scored = ROOT / "logs" / "web-60s-180s" / "e-plain-ttt.eval.jsonl"  # no training: no curves
    losses = Page(made(tmp_path, scored, full[0])).charts[0]
    assert {curve["colour"] for curve in losses["curves"]} == {charts.COLOURS[1]}
    text = Page(made(tmp_path, scored, "--static")).sections
    assert "1.1" in text["Result"] and "EVAL_ONLY=0" in text["Curves"]


def test_the_audits_lines_keep_their_order():
    shown = markup.from_markdown(AUDIT)
    assert shown.index("NOT ISOLATED") < shown.index("<table>") < shown.index("Not checked")


def test_a_drawings_scale_keeps_the_digits_that_tell_its_marks_apart(drawn):
    text = drawn.read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for kind in "xy":
            ticks = re.findall(rf'id="{kind}tick_\d+">(.*?)</text>', drawing, re.DOTALL)
            told = [tick.rpartition(">")[2] for tick in ticks]
            assert len(told) == len(set(told)), told


def test_seeds_have_a_mean_and_other_runs_have_none(tmp_path, full):
    text = Page(made(tmp_path, *SEEDS)).sections["Result"]
    assert "differ in SEED alone: mean 1.17354, sample standard deviation 0.00036" in text
    text = Page(made(tmp_path, SEEDS[0], full[0])).sections["Result"]
    assert "mean" not in text


def test_long_runs_keep_to_the_bytes(tmp_path):
    log = full_log(tmp_path / "long.jsonl", steps=15_000)
    assert len(made(tmp_path, log, "--static").encode()) < 300_000
    text = made(tmp_path, log)
    assert len(text.encode()) < 6_000_000
    drawn = Page(text).charts[0]["curves"][0]["xs"]["step"]
    assert 5_000 <= len(drawn) <= charts.MOST_RECORDS + 1
    assert drawn[0] == 1 and drawn[-1] == 15_000


def test_a_run_that_diverged_is_drawn_as_far_as_it_came(tmp_path):
    log = full_log(tmp_path / "diverged.jsonl")
    lines = log.read_text().replace(f'"train_loss": {5.0 - 30 / 17}', '"train_loss": NaN')
    log.write_text(lines)
    raw = Page(made(tmp_path, log)).charts[0]["curves"][0]
    assert raw["y"][-1] is None and all(map(math.isfinite, raw["y"][:-1]))
    made(tmp_path, log, SEEDS[0], "--static")


def test_what_the_contest_limits_is_shown_when_it_is_broken():
    shown = markup.bar("training", [700.0], 600.0, "700 s of 600 s")
    assert 'class="track over"' in shown and "width:100.00%" in shown
    assert 'class="track"' in markup.bar("training", [600.0], 600.0, "")


# ---- Mistakes ------------------------------------------------------------------------------------


def change(log: Path, event: str, **values) -> None:
    """Writes other values into a record."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [r | values if r["event"] == event else r for r in records]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("event", "values"),
    [
        ("train", {"train_loss": "low"}),
        ("trained", {"bytes_total": "many"}),
        ("trained", {"val_bpb": [1]}),
        ("settings", {"machine": 3}),
        ("sample", {"sample": None}),
        ("quantization_loss", {"bpb_by_kind": "all"}),
        ("trained", {"bytes_by_kind": {"MLP": "most"}}),
        ("final_profile", {"document_length": {"bytes": [1.0], "nats": [1.0, 2.0]}}),
        ("final_profile", {"chunks": {"targets": [0], "nats": [1.0]}}),
        ("final_profile", {"chunks": [1]}),
        ("hashes", {"validation": ["a"]}),
        ("final", {"seconds": {}, "val_bpb": {}}),
    ],
    ids=str,
)
def test_what_is_no_figure_is_one_line(tmp_path, event, values):
    log = full_log(tmp_path / "odd.jsonl")
    change(log, event, **values)
    with pytest.raises(UserError, match="is not a run's .jsonl log"):
        made(tmp_path, log)


def test_an_audit_without_a_table_is_refused(tmp_path, full):
    full[2].write_text("nothing\n")
    with pytest.raises(UserError, match="--audit: there is no table"):
        made(tmp_path, *full)


def test_the_command_line_tells_what_it_made_and_a_mistake_in_one_line(tmp_path, full):
    command = [sys.executable, "-m", "tools.report", str(full[0]), "--out"]
    out = tmp_path / "page.html"
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: {out.stat().st_size:,} bytes, 1 run\n"
    full[0].write_text("hello\n")
    done = start_here("tools.report", full[0], "--out", out)
    assert done.returncode == 2
    assert done.stderr == f"report.py: error: {full[0]} is not a run's .jsonl log\n"


# ---- In a browser --------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
# Where all is to be checked, a missing browser is a failure.
unseen = not BROWSER and not os.environ.get("CI")
needs_browser = pytest.mark.skipif(unseen, reason="no Chromium: apt-get install chromium")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
OPTIONS += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]


def opened(path: Path, folder: Path) -> tuple[str, list[str]]:
    """What a page has become in a browser, and what its console was told."""
    assert BROWSER, "no Chromium: apt-get install chromium"
    command = [BROWSER, *OPTIONS, f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("way", ["interactive", "static"])
def test_a_browser_shows_all_and_complains_of_nothing(tmp_path, full, drawn, way):
    made(tmp_path, *full)
    shown, console = opened(drawn if way == "static" else tmp_path / "report.html", tmp_path)
    assert console == []
    assert "<title>Report of full</title>" in shown  # no text of the log has run
    if way == "interactive":
        assert 'data-drawn="9"' in shown
        assert shown.count("scatterlayer") >= 9 and "by million tokens</button>" in shown
        shown = shown.replace(report.plotly(), "")
    sections = dict.fromkeys(TITLES, "")
    for title, part in zip(TITLES, re.split("<h2>.*?</h2>", shown)[1:], strict=True):
        sections[title] = re.sub("<[^>]*>", " ", part)
    for title, wanted in SHOWN.items():
        for one in wanted:
            assert one in " ".join(html.unescape(sections[title]).split())


@needs_browser
def test_a_page_that_is_broken_is_noticed(tmp_path, full):
    """By the console's lines, which the test above finds none of; no other script is let run."""
    text = made(tmp_path, *full)
    page = tmp_path / "broken.html"
    text = text.replace('"curves":[', '"curves":[[', 1)
    page.write_text(text.replace("<h1>", "<script>document.title = 'taken'</script><h1>"))
    shown, console = opened(page, tmp_path)
    assert "<title>taken" not in shown
    refused = [line for line in console if "Content Security Policy" in line]
    assert refused
    assert any("Error" in line for line in console if line not in refused)


# In a frame as wide as a phone: what the page's own script would not tell.
FRAME = """<body><iframe src="inner.html" style="width:390px;height:800px;border:0"></iframe>
<script>
onmessage = (event) => { document.body.dataset.told = JSON.stringify(event.data); };
</script>
"""
ASK = """
(async () => {
  while (!document.body.dataset.drawn) await new Promise((next) => setTimeout(next, 50));
  document.querySelectorAll(".axes button")[1].click();
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const title = document.querySelector(".xtitle").textContent;
  const points = document.querySelectorAll(".plot")[0].data[0].x.length;
  parent.postMessage({ wide, title, points, width: innerWidth }, "*");
})();
"""


@needs_browser
def test_a_phone_need_not_scroll_sideways_and_a_button_changes_the_axis(tmp_path, full):
    text = made(tmp_path, full[0], *SEEDS)
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "inner.html").write_text(text.replace("</body>", f"<script>{ASK}</script></body>"))
    (tmp_path / "frame.html").write_text(FRAME)
    shown, console = opened(tmp_path / "frame.html", tmp_path)
    assert console == []
    told = re.search('data-told="([^"]*)"', shown)
    assert told, "the page did not draw"
    found = json.loads(told[1].replace("&quot;", '"'))
    assert found == {"wide": 0, "title": "second of training", "points": 30, "width": 390}
