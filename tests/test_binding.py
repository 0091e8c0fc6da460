"""Binding: everything is compared before anything is bound. The loader is a fake here: it would accept all of this."""

from pathlib import Path

import pytest
import torch
from moeexp_runner.binding import CompiledMethod, TensorSpec, assert_shared, mismatches

CPU = torch.device("cpu")
TENSORS = {name: torch.zeros(3, 4) for name in ("w.a", "w.b", "w.c", "w.d", "w.e", "w.f")}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


class FakeRunner:
    def __init__(self, names):
        self.names, self.loads, self.calls = names, [], 0

    def get_constant_fqns(self):
        return list(self.names)

    def load_constants(self, tensors, *, check_full_update, user_managed):
        self.loads.append((tensors, check_full_update, user_managed))

    def __call__(self, *inputs):
        self.calls += 1
        return inputs[0]


@pytest.fixture
def method(monkeypatch):
    made = []

    def load(path, *, run_single_threaded):
        assert path == "p.pt2" and run_single_threaded is True
        made.append(FakeRunner(SPECS))
        return made[0]

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    method = CompiledMethod(Path("p.pt2"), SPECS, device=CPU)
    method.fake = made[0]
    return method


def test_spec_round_trip():
    spec = TensorSpec.of(torch.zeros(3, 4, dtype=torch.bfloat16).t())
    assert spec == TensorSpec((4, 3), "torch.bfloat16", (1, 4))
    assert TensorSpec.from_json({"shape": [4, 3], "dtype": "torch.bfloat16", "stride": [1, 4]}) == spec


def test_every_mismatch_in_one_message_and_nothing_bound(method):
    wrong = {
        "w.A": TENSORS["w.a"],  # a wrong name: one missing, one too many
        "w.b": torch.zeros(3, 5),
        "w.c": torch.zeros(3, 4, dtype=torch.float16),
        "w.d": torch.zeros(4, 3).t(),
        "w.e": torch.zeros(3, 4, device="meta"),
        "w.f": TENSORS["w.f"],
    }
    with pytest.raises(ValueError) as caught:
        method.bind(wrong)
    message = str(caught.value)
    assert "(7 mismatches)" in message and "\n" not in message
    for text in (
        "w.a is missing",
        "w.A is not a constant of this method",
        "w.b has shape (3, 5), expected (3, 4)",
        "w.c has dtype torch.float16, expected torch.float32",
        "w.d has stride (1, 3), expected (4, 1)",
        "w.e is on meta, expected cpu",
    ):
        assert text in message
    assert "w.f" not in message
    assert not method.fake.loads and not method.bound
    with pytest.raises(RuntimeError, match="bind"):
        method(torch.zeros(1))
    assert method.fake.calls == 0


def test_one_dropped_and_one_too_many(method):
    with pytest.raises(ValueError, match=r"\(1 mismatches\).*: w.c is missing$"):
        method.bind({name: tensor for name, tensor in TENSORS.items() if name != "w.c"})
    with pytest.raises(ValueError, match=r"\(1 mismatches\).*: w.g is not a constant of this method$"):
        method.bind(TENSORS | {"w.g": torch.zeros(3, 4)})
    assert not method.fake.loads


def test_a_refused_rebinding_leaves_the_first_one(method):
    method.bind(TENSORS)
    with pytest.raises(ValueError):
        method.bind(TENSORS | {"w.a": torch.zeros(9)})
    assert len(method.fake.loads) == 1 and method.bound == TENSORS


def test_what_fits_is_shared_and_callable(method):
    method.bind(TENSORS)
    ((loaded, full, shared),) = method.fake.loads
    assert full is True and shared is True
    assert all(loaded[name] is tensor for name, tensor in TENSORS.items()) and loaded.keys() == TENSORS.keys()
    x = torch.ones(2)
    assert method(x) is x
    method.close()
    with pytest.raises(RuntimeError, match="bind"):
        method(x)


def test_device_index_matters_where_one_is_wanted():
    def lines(where, wanted):
        tensor = torch.zeros(2, device="meta")
        fake = type("OnDevice", (), {"device": where, "shape": tensor.shape, "dtype": tensor.dtype, "stride": tensor.stride})
        return list(mismatches({"w": TensorSpec.of(tensor)}, {"w": fake}, device=wanted))

    cuda = torch.device
    assert lines(cuda("cuda", 1), cuda("cuda", 0)) == ["w is on cuda:1, expected cuda:0"]
    assert lines(cuda("cuda", 1), cuda("cuda")) == []
    assert lines(CPU, cuda("cuda", 0)) == ["w is on cpu, expected cuda:0"]


def test_a_package_and_a_manifest_that_disagree(monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *a, **k: FakeRunner(["w.a", "w.z"]))
    with pytest.raises(RuntimeError, match=r"only in the package: \['w.z'\], only in the manifest: \['w.b', .*delete"):
        CompiledMethod(Path("p.pt2"), SPECS, device=CPU)


def test_methods_must_share_one_tensor_per_name(monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *a, **k: FakeRunner(SPECS))
    one, two = (CompiledMethod(Path("p.pt2"), SPECS, device=CPU) for _ in range(2))
    one.bind(TENSORS)
    two.bind(dict(TENSORS))
    assert_shared({"prefill": one, "decode": two})
    two.bind(TENSORS | {"w.b": TENSORS["w.b"].clone()})
    with pytest.raises(AssertionError, match="w.b differs between prefill and decode"):
        assert_shared({"prefill": one, "decode": two})
