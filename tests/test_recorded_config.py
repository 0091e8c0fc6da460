"""Records from strangers: nothing that a record says runs, is imported, or arrives as anything but itself."""

import copy
import dataclasses
import json
import os
import random
import shlex
import sys
from pathlib import Path

import pytest
import synthetic

from moeexp import reproduce
from moeexp.config import axes, schema
from moeexp.config.architecture import Architecture
from moeexp.config.compose import compose
from moeexp.config.recorded import ARCHITECTURE, MOST, check
from moeexp.config.sources import SHIPPED_CHECKPOINT
from moeexp.record.record import plain
from moeexp.report import command_line
from moeexp.report.html import page as html_report

LINE = 400  # characters of an error
# What resembles Hydra's grammar, OmegaConf's, a shell's or Python's.
TEXTS = [
    "${oc.env:HOME}", "\\${oc.env:HOME}", "\\\\${oc.env:HOME}", "a${", "${now:%Y}", "${oc.decode:'1'}",
    "${moeexp_id:}", "$(touch ran)", "`touch ran`", "; touch ran", "&& touch ran", "'; touch ran; '", '"; import os',
    "!!", "~/x", "-m", "--multirun", "a,b", "1,2", "choice(1,2)", "range(3)", "interval(0,1)", "sort(b,a)", "int(3)",
    "glob(*)", "extend_list(a)", "(1, 2)", "[1,2]", "{a: b}", "[", "}", "=", "a=b", "+a=b", "~a", "@x", "null",
    "true", "Yes", "1e3", "nan", "inf", "-0", "0x1f", "1_000", "\\", "\\\\", '\\"', "\\\\'", "'", '"', '"""', "a\\",
    "a\\'b", " a ", "a  b", "#x", "%s", "a:b", "a/b", "../model/nano", ".", "", "line\nbreak", "tab\tbed", "cr\rlf",
    "nul\0", "esc\x1b[2J", "del\x7f", "c1\x85", "\u2028", "\u202e", "\ud800", "é", "你", "😀", "???", "x" * 5000,
    "y" * 30_000, "hydra/launcher", "_target_", "os:system", "builtins:exec", "a:b:c", "a.b:c", ":", "a:", "<script>",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 255, 1 << 24, (1 << 24) + 1, 1 << 31, (1 << 63) - 1, 1 << 63, 10**30, 10**5000, 0.0, -0.0, 0.5, 1.0,
    1e-6, 5e-324, 1e308, 2.5e7, float("nan"), float("inf"), float("-inf"), True, False,
]  # fmt: skip
OTHERS = [
    None, [], {}, [[]], [{}], ["a"], [1, 2], [1, "a"], [None], [True], [1.5], ["a,b", "${oc.env:HOME}", "'"],
    {"a": 1}, {"_target_": "os.system"}, {"_target_": "builtins.exec", "_args_": ["open('ran', 'w')"]},
    ["x" * 40_000], [1] * 8193, {"name": "int4"}, {"name": {"name": "int4"}},
]  # fmt: skip
KEYS = [
    "+hydra.callbacks.a", "++hydra.callbacks.a", "hydra.callbacks.a._target_", "hydra", "hydra/launcher",
    "+hydra/launcher", "hydra.run.dir", "hydra.searchpath", "hydra.job.chdir", "hydra.sweeper", "~hydra", "~quant",
    "+quant", "++batch", "batch=2 new_tokens", "batch=1,2", "quant@model", "quant@_global_", "defaults", "_target_",
    "experiment", "", " ", "\n", "a\0", "--config-dir", "-m", "x" * 30_000, "${oc.env:HOME}", "$(touch ran)",
    "model.name", "ops.linear", "tracker.mode", "\u2028", "\ud800", "__class__", "name",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Fails where a process is started, a module that is not ours is imported, or a command made a file."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def refuse(*arguments, **keywords):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(reproduce.subprocess, "run", refuse)
    yield
    assert not {"evil", "this", "antigravity"} & (set(sys.modules) - before) and not Path("ran").exists()


def base(*overrides):
    return copy.deepcopy(synthetic.record(*(overrides or ("export=eager", "quant=none")), device="cpu"))


def outcome(config, derive=command_line.arguments_of):
    """What moeexp.reproduce would start, or a refusal in one short line. Anything else fails."""
    try:
        return derive(base() | {"config": config})
    except ValueError as error:
        text = str(error)
        assert text.isprintable() and len(text) <= LINE, text[:1000]
        return text


def compared(config):
    kept = {key: value for key, value in config.items() if key not in axes.NOT_REPEATED}
    return kept | {"model": kept["model"] | {"architecture": None}}


def composes_to(arguments, config):
    """The test's own comparison: the whole config, and shapes by what they mean."""
    found = plain(compose(arguments))
    kept = {group: {name: config[group][name] for name in config[group]} for group in ("model", "quant", "ops", "sampler")}
    assert compared(found) == compared(config | kept)
    if config["model"]["weights"] == "random":
        assert Architecture.from_hf(found["model"]["architecture"]) == Architecture.from_hf(config["model"]["architecture"])
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+")
        assert key.split(".")[0] in schema.Config.__dataclass_fields__ and not key.startswith(("hydra", "tracker", "launcher"))
    return True


def places(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def put(config, place, value):
    config = copy.deepcopy(config)
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


def whole(config):
    """With its shapes in full, as a snapshot's are recorded."""
    shapes = Architecture.from_hf(config["model"]["architecture"]).to_hf()
    return config | {"model": config["model"] | {"architecture": shapes}}


CONFIG = whole(base()["config"])
PLACES = list(places(CONFIG))


def test_the_places_are_every_field_of_the_schema():
    names = {".".join(place) for place in PLACES}
    assert {field.name for field in dataclasses.fields(schema.Config)} <= names
    assert {f"{g}.{field.name}" for g, of in schema.GROUPS.items() for field in dataclasses.fields(of)} <= names
    top = {f"model.architecture.{key}" for key in ("rope_theta", "original_max_position_embeddings")}
    assert "model.architecture.rope_parameters.rope_theta" in names and set(MOST) <= names | top
    assert set(Architecture.from_folder(SHIPPED_CHECKPOINT).to_hf()) <= set(ARCHITECTURE), "as records have it"


@pytest.mark.slow
def test_a_value_of_any_kind_at_any_place_is_refused_or_arrives_as_it_was():
    """In each round every place gets a value; those that are not refused come together in one config, as composing one
    takes a moment, and that is to arrive as it is. Shapes depend on one another, so they are composed one at a time."""
    draw, accepted, refused = random.Random(14), 0, 0
    for number in range(12):
        values, together = (TEXTS, NUMBERS, OTHERS)[number % 3], CONFIG
        for place in PLACES:
            value = draw.choice(values)
            config = put(CONFIG, place, value)
            found = outcome(config, command_line.command_of)
            if found.startswith("python -m moeexp"):
                accepted += 1
                if len(place) < 3 and place not in (("model", "weights"), ("model", "architecture")):
                    together = put(together, place, value)
                elif len(place) > 2 and config["model"]["architecture"] != CONFIG["model"]["architecture"] and number < 9:
                    assert composes_to(command_line.arguments_of(base() | {"config": config}), config)
            else:
                refused += 1
        assert composes_to(command_line.arguments_of(base() | {"config": together}), together)
    assert accepted > 100 and refused > 600, (accepted, refused)


def allowed(text, *, lines=False):
    control = set("\0\r\x1b\x7f\x85\ud800") | (set() if lines else set("\n\t"))
    return text != "???" and not set(text) & control and (lines or len(text) <= 4096)


# Texts that a command may hold in any field, as composing a config takes a moment: one goes into each of these.
FIELDS = [
    "dispatch", "state", "export", "dtype", "allocator", "check", "device", "engine", "model.weights", "model.heldout",
    "ops.sample",
]  # fmt: skip


def test_a_text_arrives_as_it_was_in_every_field_and_list():
    for start in range(0, len(TEXTS), len(FIELDS)):
        config = put(CONFIG, ("quant", "skip"), [text for text in TEXTS if allowed(text)])
        config["model"]["architecture"] = None
        for path, text in zip(FIELDS, TEXTS[start:], strict=False):
            fits = allowed(text) and (path != "ops.sample" or ":" not in text)
            tried = put(config, tuple(path.split(".")), text)
            assert fits or isinstance(outcome(tried), str)
            config = tried if fits else config
        overrides = command_line.overrides_of(config)
        assert compared(plain(compose(overrides))) == compared(config)
        assert shlex.split(shlex.join(overrides)) == overrides


@pytest.mark.slow
def test_a_prompt_arrives_as_the_text_it_was():
    for text in [one for one in TEXTS if not allowed(one, lines=True)]:
        assert isinstance(outcome(put(CONFIG, ("prompt",), text)), str)
    everything = "".join(text for text in TEXTS if allowed(text, lines=True)) + "\\"
    for text in ("line\nbreak\tand \u2028 more", "y" * 30_000, everything, *random.Random(3).sample(TEXTS[:40], 6)):
        config = put(CONFIG, ("prompt",), text)
        found = outcome(config)
        assert compose(found).prompt == text
        assert shlex.split(command_line.command_of(base() | {"config": config}))[3:] == found


@pytest.mark.parametrize("group", [None, "model", "quant", "ops", "sampler", "tracker", "launcher", "architecture"])
def test_a_key_that_is_no_field_is_refused(group):
    for key in KEYS[:-1] if group in ("model", "quant", "sampler", "tracker") else KEYS:
        place = (key,) if group is None else ("model", "architecture", key) if group == "architecture" else (group, key)
        for value in (None, {"_target_": "os.system"}):
            found = outcome(put(CONFIG, place, value))
            assert isinstance(found, str) and "no setting of moeexp" in found


def test_a_missing_field_is_a_default_or_a_refusal():
    for place in [place for place in PLACES if len(place) < 3]:
        config = copy.deepcopy(CONFIG)
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        needed = place[0] in ("model", "quant", "sampler", "ops") and place[-1] in (place[0], "name", "default")
        assert isinstance(outcome(config), str) == needed


@pytest.mark.parametrize("config", [None, [], "x", 1, {}, {"model": None}, {"model": {"name": []}}], ids=str)
def test_what_is_no_config_is_refused(config):
    assert isinstance(outcome(config), str)


def test_a_group_is_chosen_from_what_there_is():
    names = ["../quant/int4", "int4.yaml", "int4,none", "../model/nano", "/etc/x", ".", "int4@x", "none'", "İnt4", "int4 "]
    for name in names:
        for group in ("model", "quant", "sampler"):
            found = outcome(put(CONFIG, (group, "name"), name))
            assert "no longer composes" in found and f"is not a choice of {group}" in found


@pytest.mark.parametrize(
    "place, value",
    [(("vocab_size",), 1 << 40), (("num_hidden_layers",), 5000), (("layer_types",), ["a"]), (("rope_parameters",), [1]),
     (("rope_parameters",), {"_target_": "x"}), (("rope_parameters", "rope_type"), "yarn"), (("rms_norm_eps",), "1e-6"),
     (("num_experts",), 8.0), (("num_experts",), None), (("eos_token_id",), [[1]])],
    ids=str,
)  # fmt: skip
def test_shapes_are_checked_too(place, value):
    found = outcome(put(CONFIG, ("model", "architecture", *place), value))
    assert isinstance(found, str) and "model.architecture" in found


def test_shapes_of_random_weights_are_those_of_the_record():
    """They were left out: a model with four experts ran again with eight, and was said to differ."""
    shapes = ["model.architecture.num_experts=4", "model.architecture.rope_theta=5e5", "+model.architecture.eos_token_id=[3,5]"]
    config = base("export=eager", *shapes)["config"]
    found = outcome(config)
    assert {one.lstrip("+").removeprefix("model.architecture.") for one in found if "architecture" in one} == {
        "num_experts=4", "rope_theta=500000.0", "eos_token_id=[3,5]",
    }  # fmt: skip
    assert composes_to(found, config)


def test_a_snapshot_of_other_shapes_is_not_the_one_that_ran():
    config = base("model=tiny")["config"]
    assert isinstance(outcome(config), list)
    config["model"]["architecture"]["rms_norm_eps"] = 1e-5
    assert "these are not the weights" in outcome(config)
    config["model"]["weights"] = "/nowhere/at/all"
    assert "is not a folder" in outcome(config)


CODE = {
    "an op": (lambda r: r["config"]["ops"].update(router="evil:f"), "ops.router='evil:f' imports the Python module evil"),
    "every op": (lambda r: r["config"]["ops"].update(default="evil.deep:f"), "imports the Python module evil.deep"),
    "config files": (lambda r: r["command"].extend(["--config-dir", "evil"]), "--config-dir='evil' reads config files"),
    "config files, =": (lambda r: r["command"].append("--config-dir=evil"), "--config-dir='evil' reads config files"),
    "an artifact": (lambda r: r["config"].update(artifact="evil"), "artifact='evil' loads native code"),
}


@pytest.mark.parametrize("name", CODE)
def test_what_names_code_needs_trust(name, monkeypatch, capsys):
    change, says = CODE[name]
    Path("evil.py").write_text("open('ran', 'w')\n")
    record = base("export=eager")
    change(record)
    folder = synthetic.write(Path("records"), [record])
    assert reproduce.main([str(folder / "0")]) == 2
    error = capsys.readouterr().err
    assert says in error and "--trust" in error and error.count("\n") == 1 and len(error) <= LINE
    with pytest.raises(ValueError, match="--trust"):
        command_line.command_of(record)
    page = html_report.page([record], title="t")
    commands = page.count('<pre class="command">')
    assert ("Run it only if you trust" in page or "As it was given" in page or "is not shown" in page) and commands <= 1
    started = []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: started.append(words) or exit_code(2))
    Path("evil").mkdir()
    assert reproduce.main([str(folder / "0"), "--trust"]) == 2 and len(started) == 1
    assert "could not be run here" in capsys.readouterr().err


def exit_code(code):
    return type("Result", (), {"returncode": code})()


def test_of_many_ops_the_refusal_is_still_one_short_line():
    config = put(CONFIG, ("ops",), dict.fromkeys(CONFIG["ops"], "m" * 3000 + ":f"))
    found = outcome(config)
    assert "(and 9 more)" in found and "--trust" in found


def test_a_callback_that_a_record_adds_is_refused(monkeypatch, capsys):
    """Each key of a config became an override: this one imported a module before the run began."""
    record = base()
    record["config"]["+hydra.callbacks.a"] = {"_target_": "moeexp_kernels.user_ops.sources", "name": "evil:f"}
    Path("evil.py").write_text("open('ran', 'w')\n")
    folder = synthetic.write(Path("records"), [record])
    for more in ([], ["--trust"]):
        assert reproduce.main([str(folder / "0"), *more]) == 2
        error = capsys.readouterr().err
        assert "has '+hydra.callbacks.a', which is no setting" in error and error.count("\n") == 1


def test_a_report_shows_no_command_that_could_name_code():
    record = base()
    record["config"]["+hydra.callbacks.a"] = {"_target_": "os.system"}
    callback = "+hydra.callbacks.a._target_=os.system"
    for word in (callback, "hydra/launcher=x", "--config-dir=x", "ops.router=a:b", "batch=${oc.env:A}", "a\x1b"):
        page = html_report.page([record | {"overrides": [word]}], title="t")
        assert 'class="command"' not in page
        assert "is not shown" in page or "holds the character" in page
    page = html_report.page([record | {"overrides": ["batch=2"]}], title="t")
    assert "As it was given; the record&#39;s config has" in page and page.count('class="command"') == 1


BROKEN = {
    "no status": lambda r: r.pop("status"),
    "no config": lambda r: r.pop("config"),
    "no command": lambda r: r.pop("command"),
    "a command of numbers": lambda r: r.update(command=[1]),
    "tokens of text": lambda r: r.update(generated_ids=[[1], 2]),
    "samples of text": lambda r: r["token_latencies_ms"].update(samples="abc"),
    "a speed of text": lambda r: r.update(decode_tok_s="fast"),
    "an environment of text": lambda r: r.update(environment="x"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_record_is_one_line(name, tmp_path, capsys):
    record = base()
    BROKEN[name](record)
    assert reproduce.main([str(synthetic.write(tmp_path / "records", [record]) / "0")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) <= LINE + len(str(tmp_path))


NO_JSON = ["", "{", "[]", "1", "\ud800", "[" * 100_000, '{"schema": 1' + "0" * 5000 + "}", " " * 20_000_000]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: ascii(text)[:20])
def test_neither_is_what_is_no_json(text, capsys):
    Path("record.json").write_bytes(text.encode(errors="surrogatepass"))
    assert reproduce.main(["record.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) <= LINE


def test_checking_reads_no_file_and_no_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("builtins.open", None)
    check(json.loads(json.dumps(CONFIG)))
