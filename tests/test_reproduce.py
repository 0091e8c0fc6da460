"""`moeexp.reproduce`: its judgement, what it refuses to read, and one run in earnest."""

import copy
import json

import pytest
import synthetic

from moeexp import reproduce


def lines_of(old, new):
    agree, lines = reproduce.judge(old, new)
    return agree, "\n".join(lines)


def test_the_same_again_agrees():
    agree, text = lines_of(synthetic.record(id="a"), synthetic.record(id="b", seed=5))
    assert agree and text.count("agrees") == 3 and "no difference" in text


def test_a_small_drift_agrees_and_a_large_one_does_not():
    old = synthetic.record(id="a", noise=0.001)
    agree, text = lines_of(old, synthetic.record(id="b", ms=1.03, noise=0.001))
    assert agree and "no difference beyond run-to-run noise; 5 % allowed for" in text
    agree, text = lines_of(old, synthetic.record(id="b", ms=1.1, noise=0.001))
    assert not agree and "decode speed       DIFFERS" in text


def test_on_a_shared_cpu_more_drift_agrees_but_not_any():
    old = synthetic.record(id="a", noise=0.001, device="cpu")
    agree, text = lines_of(old, synthetic.record(id="b", ms=1 / 1.26, noise=0.001, device="cpu"))
    assert agree and "beyond run-to-run noise; 40 % allowed for" in text
    agree, text = lines_of(old, synthetic.record(id="b", ms=1.6, noise=0.001, device="cpu"))
    assert not agree and "slower" in text


def test_under_unlike_load_speed_is_not_judged():
    old, new = (synthetic.record(id=f"{n}", ms=n, device="cpu", telemetry=synthetic.load(4 * n)) for n in (1, 3))
    agree, text = lines_of(old, new)
    assert agree and "unlike conditions  load of other processes" in text and "not judged" in text


def test_a_speed_without_an_interval_agrees_within_the_noise():
    old, near, far = (synthetic.record(id=f"{ms}", samples=[ms] * 5) for ms in (1.0, 1.04, 1.2))
    assert lines_of(old, near)[0] and not lines_of(old, far)[0]


def test_other_tokens_or_another_status_do_not_agree():
    old = synthetic.record(id="a")
    agree, text = lines_of(old, synthetic.record(id="b") | {"generated_ids": [[1, 9, 3]]})
    assert not agree and "row 0 differs from token 1 on: 2 → 9" in text
    agree, text = lines_of(old, synthetic.record(id="b", status="incorrect"))
    assert not agree and "ok → incorrect" in text and "only one of the two publishes one" in text


def test_on_another_gpu_speed_is_not_judged():
    new = copy.deepcopy(synthetic.record(id="b", ms=3.0))
    new["environment"]["gpu"]["name"] = "another"
    agree, text = lines_of(synthetic.record(id="a"), new)
    assert agree and "not judged" in text and "unlike conditions  GPU" in text
    new = synthetic.record(id="b", ms=3.0) | {"code_fingerprint": "changed"}
    agree, text = lines_of(synthetic.record(id="a"), new)
    assert not agree and "unlike conditions  code: c0de / changed" in text


def run_main(folder, monkeypatch, new, *more):
    monkeypatch.setattr(reproduce, "run_again", lambda record, out, *, trust: new)
    return reproduce.main([str(folder / "0"), "--out", str(folder / "again"), *more])


def test_main_says_by_its_exit_code(tmp_path, monkeypatch, capsys):
    old = synthetic.record(id="a")
    folder = synthetic.write(tmp_path, [old])
    assert run_main(folder, monkeypatch, old) == 0 and "it agrees" in capsys.readouterr().out
    assert run_main(folder, monkeypatch, synthetic.record(ms=2.0)) == 1
    assert "it does NOT agree" in capsys.readouterr().out
    assert run_main(folder, monkeypatch, synthetic.record(ms=2.0), "--tolerance", "1.5") == 0
    assert run_main(folder, monkeypatch, synthetic.record(ms=1.03), "--tolerance", "0") == 1
    assert run_main(folder, monkeypatch, old, "--tolerance", "-2") == 2
    assert "give 0 or more" in capsys.readouterr().err
    assert reproduce.main([str(tmp_path / "missing")]) == 2
    assert "is no record" in capsys.readouterr().err
    (folder / "again").mkdir()
    (folder / "again" / "file").touch()
    assert run_main(folder, monkeypatch, old) == 2 and "is not empty" in capsys.readouterr().err


def test_a_config_that_no_longer_exists_is_one_line(tmp_path, capsys):
    old = synthetic.record(id="a")
    old["config"]["quant"]["name"] = "int3"
    assert reproduce.main([str(synthetic.write(tmp_path, [old]) / "0")]) == 2
    error = capsys.readouterr().err
    assert "the record's config no longer composes" in error and "int3" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_real_run_is_reproduced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from moeexp.cli import main

    overrides = ["model=nano", "export=eager", "quant=none", "new_tokens=8", "tracker.mode=disabled", "seed=3"]
    assert main([*overrides, "hydra.run.dir=first"]) == 0
    code = reproduce.main(["first", "--out", "second", "--tolerance", "5"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "tokens             agrees" in text
    first, second = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("first", "second"))
    assert first["config_hash"] == second["config_hash"]
