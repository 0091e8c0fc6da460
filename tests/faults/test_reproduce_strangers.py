"""`moeexp.reproduce` of a record from a stranger: each of its keys given every kind of JSON. It is one line, or starts the
record's own config and nothing more; no code that it names runs in this process, and in another one only with --trust."""

import contextlib
import io
import itertools
import sys
from pathlib import Path

import pytest
import record_fuzz
from record_fuzz import damages, dumped, nodes, replaced, seeded

from moeexp import reproduce
from moeexp.config import schema
from moeexp.config.compose import compose
from moeexp.record.record import plain
from moeexp.report import command_line

FEW = 40
# What would be more than a value, if it got through to Hydra, a shell or an import.
TEXTS = (
    "evil:f", "evil", "evil.deep:f", "${oc.env:HOME}", "--config-dir=.", "--config-dir", "-cd", "artifact=evil", "???",
    "hydra.callbacks.a._target_=evil.f", "+hydra.callbacks.a={_target_: evil.f}", "hydra/launcher=evil", "a b=c", "1,2",
    "choice(1,2)", "'; touch ran; '", "$(touch ran)", "../../quant/int4", "artifact_trust=true", "a\u202eb",
)  # fmt: skip
TABLES = (
    {"_target_": "evil.f"}, {"evil": {"_target_": "evil.f", "_args_": [1]}}, ["--config-dir", "."], ["python", "--multirun"],
    {"name": "evil:f"}, [{"_target_": "evil.f"}], {"artifact": "evil"},
)  # fmt: skip
VALUES = (*record_fuzz.VALUES, *TEXTS, *TABLES)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What `reproduce` would have started."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\n")
    found = []
    done = type("Done", (), {"returncode": 2})
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: found.append(words[1:]) or done)
    yield found
    assert "evil" not in sys.modules and not Path("ran").exists()


def again(what, data, started, *more):
    """The arguments that it starts, None where it is refused."""
    Path("record.json").write_bytes(data)
    started.clear()
    out, err = io.StringIO(), io.StringIO()
    with record_fuzz.in_time(what), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = reproduce.main([*more, "record.json", "--out", "out"])
    said = err.getvalue()
    errors = [line for line in said.split("\n") if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and len(errors[0]) <= 400 and not out.getvalue(), (what, code, said)
    assert len(started) <= 1 and (said.startswith("$ ") if started else said == f"{errors[0]}\n"), (what, said)
    assert not {"\x1b", "\r", "\u202e"} & set(said), (what, said)
    return started[0] if started else None


def may_be_started(what, words, record, *, trusted):
    """Settings of the schema alone, which compose to the record's config."""
    assert words[:2] == ["-m", "moeexp"], what
    config = words[2:]
    named = command_line.code_of(record)
    assert trusted or not named, what
    if config[0] == "--config-dir":
        assert trusted and any("--config-dir" in one for one in named), what
        return
    keys = [word.partition("=")[0].lstrip("+").split(".")[0] for word in config]
    assert set(keys) <= set(schema.Config.__dataclass_fields__) | {"hydra"}, (what, config)
    assert [word for word in config if word.startswith("hydra")] == ["hydra.run.dir=out"], (what, config)
    trust = [word for word in config if word.startswith("artifact")]
    assert len(trust) == 2 * (record["config"].get("artifact") is not None), (what, config)
    composes(what, config, record["config"])


def composes(what, arguments, wanted):
    found = plain(compose([word for word in arguments if not word.startswith("hydra")]))
    flat = command_line._flat(found)
    for path, value in command_line._flat(wanted).items():
        fixed = wanted.get("artifact") is not None and path in command_line.FIXED
        meant = (path, flat[path], value) in command_line.MEANT
        assert fixed or meant or flat[path] == value, (what, path, flat[path], value)


def checked(what, data, started):
    """How often it is refused, of a run without trust and one with it. A migrated record is compared as it is read."""
    refused = 0
    for more in ((), ("--trust",)):
        words = again(what, data, started, *more)
        refused += words is None
        if words is not None:
            may_be_started(what, words, reproduce.read(Path("record.json")), trusted=bool(more))
    return refused


def cases(generator):
    """Half of them a value of `VALUES` somewhere, half any damage; of all records."""
    bases = record_fuzz.bases()
    others = [damages(base, generator) for base in bases]
    while True:
        index = generator.randrange(len(bases))
        place = generator.choice([place for place in nodes(bases[index]) if place])
        value = generator.choice(VALUES)
        yield f"{'.'.join(map(str, place))} = {value!r:.60}", dumped(replaced(bases[index], place, value))
        yield next(others[index])


def test_the_whole_records_start_what_they_were(started):
    for record in record_fuzz.bases()[:2]:
        assert checked("whole", dumped(record), started) == 0


def test_a_few_records_of_strangers_start_their_config_or_nothing(started):
    for what, data in itertools.islice(cases(seeded()), FEW):
        checked(what, data, started)


@pytest.mark.slow
def test_many_records_of_strangers_start_their_config_or_nothing(started):
    for what, data in itertools.islice(cases(seeded()), 2000):
        checked(what, data, started)


@pytest.mark.slow
def test_every_place_of_what_is_run_starts_its_config_or_nothing(started):
    generator, record, refused, total = seeded(), record_fuzz.bases()[2], 0, 0
    for place in nodes(record):
        if place and place[0] in ("config", "command", "overrides", "identity", "id"):
            for value in generator.sample(VALUES, 10):
                total += 2
                refused += checked(
                    f"{'.'.join(map(str, place))} = {value!r:.60}", dumped(replaced(record, place, value)), started
                )
    assert total / 2 < refused < total, (refused, total)
