"""Reading a record: what is refused, in one line with its path, key, value and what is allowed; and what is not."""

import json
import os
from pathlib import Path

import pytest
import synthetic

from moeexp import compare, sync
from moeexp.record import conformance, renamed
from moeexp.record.head import head
from moeexp.record.objective import objective_of
from moeexp.record.record import KEYS, MOST_READ, Record, plain, read_record
from moeexp.report import __main__ as report
from moeexp.report.records import load_records
from moeexp.sweep.history import History

ROOT = Path(__file__).resolve().parents[1]
STORED = [*(path for path in (ROOT / "results").rglob("*.json") if not path.name.startswith(("kernels", "soak"))),
          *(ROOT / "tests" / "data").glob("*.json")]  # fmt: skip


def write(folder, **values):
    folder.mkdir(parents=True)
    path = folder / "record.json"
    path.write_text(json.dumps(synthetic.record(id="ab.7") | values, indent=1))
    return path


def refusal(path):
    with pytest.raises(ValueError) as refused:
        read_record(path)
    line = str(refused.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line.removeprefix(str(path))


VALUES = [
    ("decode_tok_s", "fast", "should be a valid number"),
    ("decode_tok_s", True, "should be a valid number"),
    ("decode_tok_s", -1.0, "greater than or equal to"),
    ("decode_tok_s", 1e300, "less than or equal to"),
    ("status", 'x" onload="y', "should be 'running', 'ok'"),
    ("started", "yesterday", "a date with a zone"),
    ("started", "2026-01-01T00:00:00", "a date with a zone"),
    ("started", "2026-13-01T00:00:00+00:00", "month must be in 1..12"),
    ("id", "../../x", "letters, digits, dots"),
    ("command", "rm", "should be a valid list"),
    ("overrides", [1], "overrides[0]=1: should be a valid string"),
    (
        "check",
        {"passed": True, "parts": [{"name": "a", "passed": True, "tolerances": [{}]}]},
        "check.parts[0].tolerances[0].tolerance",
    ),
    ("check", {"passed": True, "parts": [{"name": "a", "passed": True, "tolerances": [], "report": 1}]}, "check.parts[0].report"),
    (
        "check",
        {"passed": True, "parts": [{"name": "a", "passed": True, "tolerances": [], "report": {"with_logits": "x"}}]},
        "check.parts[0].report.with_logits",
    ),
    ("token_latencies_ms", {"samples": [1.0] * 9, "p50": 1, "p90": 1, "p99": 1, "mean": 1, "sd": 0, "n": 3}, "n=3 is less than"),
    ("rounds", [{"n": 0, "tokens": 5}], "tokens=5 in n=0 steps"),
    ("config", {}, "config.model"),
    ("identity", {"weights": {}}, "identity.weights tells no seed"),
    ("notes", None, "notes=None: should be a valid list"),
    ("memory_gib", {"\x1b[31m": "x"}, "memory_gib.\\x1b[31m='x'"),
]


@pytest.mark.parametrize(("key", "value", "said"), VALUES)
def test_what_a_key_may_not_hold(tmp_path, key, value, said):
    assert said in refusal(write(tmp_path / "a", **{key: value}))


RAW = [
    (b"NaN", "NaN is no number of JSON"),
    (b"-Infinity", "no number of JSON"),
    (b"1e400", ".tolerances.0.value is inf, beyond what a number can be"),
    (b"9" * 10_000, "not JSON that is read here"),
    (b"9" * 200, "beyond what a number can be"),
    (b"[" * 100_000, "nested deeper"),
    (b"[" * 60 + b"]" * 60, "nested deeper"),
    (b"\xff", "not UTF-8"),
    (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
]


@pytest.mark.parametrize(("raw", "said"), RAW, ids=lambda value: repr(value[:12]))
def test_what_python_reads_and_nobody_may_write(tmp_path, raw, said):
    path = write(tmp_path / "a")
    text = path.read_bytes()
    assert text.count(b"2e-06") == 1  # a tolerance's value, deep in the record
    path.write_bytes(text.replace(b"2e-06", raw))
    assert said.replace(".tolerances.0", "check.parts.0.tolerances.0") in refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("prompt_len", [512], "config.prompt_len=a list: should be a valid integer"),
        ("prompt_len", "512", "config.prompt_len='512': should be a valid integer"),
        ("prompt_len", 0, "is of config.prompt_len=0, which is not 1..16777216"),
        ("prompt_len", 1 << 25, "is of config.prompt_len=33554432, which is not 1..16777216"),
        ("batch", -1, "is of config.batch=-1, which is not 1..16777216"),
    ],
)
def test_a_workload_that_has_a_speed_is_a_workload(tmp_path, name, value, said):
    config = plain(synthetic.compose(["model=nano"]))
    assert said in refusal(write(tmp_path / "a", config=config | {name: value}))
    conformance.check(synthetic.record() | {"config": config | {"prompt_len": None}})


def test_what_is_no_file_is_not_waited_for(tmp_path):
    (tmp_path / "folder" / "record.json").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "record.json")
    for name in ("folder", "pipe"):
        assert "is no regular file" in refusal(tmp_path / name / "record.json")
        with pytest.raises(ValueError, match="is no regular file"):
            head(tmp_path / name / "record.json")
    large = write(tmp_path / "large", notes=["x" * MOST_READ])
    assert "has more than 1,000,000 bytes" in refusal(large)
    many = write(tmp_path / "many", overrides=["seed=1"] * 1001)
    assert "overrides=a list: List should have at most 1000 items" in refusal(many)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert "cannot be read" in refusal(loop)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_stored_records_are_of_the_shape(path):
    conformance.check(renamed.record(json.loads(path.read_text())))
    assert set(read_record(path)) == {"schema", *KEYS}


def test_what_runs_write_is_of_the_shape(tmp_path):
    conformance.check(synthetic.refused("batch=0", "prompt_len=0", "quant=int4"))
    values = {"telemetry": synthetic.load(2.0), "stalls": synthetic.stalls(1, 2.0, 9.0), "time_split": synthetic.TIME_SPLIT}
    conformance.check(synthetic.record(**values))
    # Whatever a user gave, cut to the last limit: the readers' keys stay.
    config = plain(synthetic.compose(["model=nano"])) | {"prompt": "x" * 300_000}
    config["tracker"]["tags"] = ["y" * 10_000] * 500
    run = Record(tmp_path / "record.json", id="a", config=config, command=["z" * 9_000] * 400)
    run.set(environment=synthetic.ENVIRONMENT, notes=[], phases_s={f"{'n' * 900}{i}": 1.0 for i in range(900)})
    run.finish("failed")
    assert read_record(run.path)["full_config"]


def test_a_key_that_came_later_is_not_known(tmp_path):
    path = write(tmp_path / "a")
    data = json.loads(path.read_text())
    del data["energy"], data["stalls"]
    path.write_text(json.dumps(data | {"of_a_later_version": [1]}))
    assert read_record(path)["stalls"] is None


@pytest.fixture
def sweep(tmp_path):
    """Eleven whole records and one whose speed is NaN."""
    synthetic.write(tmp_path / "sweep", [synthetic.record(id=f"ab.{number}") for number in range(11)])
    path = write(tmp_path / "sweep" / "bad")
    speed = json.loads(path.read_text())["decode_tok_s"]
    path.write_text(path.read_text().replace(f'"decode_tok_s": {speed}', '"decode_tok_s": NaN', 1))
    return tmp_path / "sweep"


@pytest.mark.parametrize("to", ["md", "html", "wandb"])
def test_a_report_leaves_it_out_and_counts_it(sweep, to, capsys):
    out = sweep / "report"
    assert report.main([str(sweep), "--to", to, "--out", str(out)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out: ") and f"{sweep}/bad/record.json" in said[0]
    assert said[1] == "1 of 12 records left out" and "ab.10" in out.read_text() and "ab.7" in out.read_text()
    assert report.main([str(sweep / "bad"), "--to", to, "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "1 of 1 records left out"


def test_a_command_of_one_record_says_the_line(sweep, capsys):
    for a, b in (("bad", "0"), ("0", "bad")):
        assert compare.main([str(sweep / a), str(sweep / b)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {sweep}/bad/record.json is not JSON that is read here (NaN")
    with pytest.raises(ValueError, match="bad/record.json"):
        load_records([sweep])  # figures and whoever else wants them all
    assert objective_of(sweep / "bad" / "record.json") == 0.0
    assert "it counts as 0 tok/s" in capsys.readouterr().err
    offline = sweep / "bad" / "wandb" / "offline-run-1"
    offline.mkdir(parents=True)
    (offline / "run.wandb").touch()
    assert sync.main(["--dry-run", str(sweep)]) == 0 and "its record is damaged" in capsys.readouterr().out


def test_a_damaged_result_is_no_result(sweep):
    text = json.loads((sweep / "0" / "record.json").read_text()) | {"config_hash": "c", "code_fingerprint": "f", "finished": None}
    for name, date in (("a", "2026-01-01T00:00:00Z"), ("b", "2026-01-01T05:00:00+09:00")):
        write(sweep / name, **text | {"started": date, "id": name})
    history = History([sweep])
    assert history.latest("c", "f").id == "a", "by time, whatever the zone"
    path = sweep / "a" / "record.json"
    path.write_text(path.read_text()[:-200])
    history = History([sweep])
    assert history.latest("c", "f").id == "b" and any("a/record.json" in line for line in history.left_out)
    for spoil in ("yesterday", "2026-02-30T00:00:00Z", "2026-01-01T05:00:00"):
        write(sweep / f"x{spoil}", **text | {"started": spoil})
        with pytest.raises(ValueError, match="which no record has"):
            head(sweep / f"x{spoil}" / "record.json")
    history = History([sweep])  # the others have no first lines of their own
    assert {run.id for run in history.runs} == {"a", "b", "ab.7"} and history.latest("c", "f").id == "b"
    assert [run.id for run in history.runs if run.config_hash == "c"] == ["b"], "what is damaged tells no time either"
