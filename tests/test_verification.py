"""What the checks of a group say of one another."""

from __future__ import annotations

import torch

from moeexp.check import verify
from moeexp.check.check import Trace
from moeexp.check.reference import ReferenceRun
from moeexp.check.verify import References, digest, first_divergence
from moeexp.run.experiment import _divergence

PROMPT = 3


def trace(generated: list[int], experts: list[list[int]] | None = None) -> Trace:
    """One sequence of three prompt tokens; `experts`: [position][slot] of the only layer."""
    fed = torch.tensor([[1, 2, 3, *generated[:-1]]])
    chosen = torch.tensor([experts or [[0, 1]] * fed.shape[1]])[:, None]
    return Trace(fed, PROMPT, torch.zeros(1), chosen, {}, next_token=torch.tensor(generated[-1:]))


def test_tokens_that_diverge_are_placed_and_explained():
    first = trace([7, 8, 9, 5])
    assert first_divergence("a", first, trace([7, 8, 9, 5])) is None
    found = first_divergence("a", first, trace([7, 8, 4, 4]))
    assert found == {
        "from": "a",
        "sequence": 0,
        "position": 5,
        "other_choice_from": None,
    }
    last = first_divergence("a", first, trace([7, 8, 9, 6]))
    assert last["position"] == 6, "the last token too, which is never fed"


def test_another_choice_of_experts_explains_only_what_comes_after_it():
    same, swapped, other = [0, 1], [1, 0], [0, 2]
    first = trace([7, 8, 9, 5], [same] * 6)
    later = first_divergence("a", first, trace([7, 8, 4, 4], [same] * 5 + [other]))
    assert later["position"] == 5 and later["other_choice_from"] is None
    before = first_divergence("a", first, trace([7, 8, 4, 4], [same, swapped, other, same, other, same]))
    assert before["other_choice_from"] == 2, "the order of the same experts is no other choice"
    assert "near-tie" in _divergence(later) and "from position 2 on other experts" in _divergence(before)


def test_only_runs_on_the_same_prompt_and_sampler_are_compared():
    references = References()
    assert references.first_divergence("a", trace([7, 8]), "greedy") is None
    assert references.first_divergence("b", trace([7, 9]), "gumbel") is None
    assert references.first_divergence("c", trace([7, 9]), "greedy")["from"] == "a"
    assert references.first_divergence("d", trace([7, 8]), "greedy") is None


def reference(size: int) -> ReferenceRun:
    """Of `size` bytes beside four of a router's logit."""
    empty = torch.empty(0)
    return ReferenceRun(
        None, None, empty, 1, torch.float32, torch.zeros(size // 4), torch.zeros(1), empty, {}
    )  # fmt: skip


def test_of_references_only_so_much_is_kept_and_what_was_used_last(monkeypatch):
    monkeypatch.setattr(verify, "KEPT_BYTES", 2 * 104)
    references, made = References(), []

    def get(name):
        def make():
            made.append(name)
            return reference(100)

        found = references.get(name, (), make)
        references.put_away()
        return found

    part = references.get("part", (), object)
    first = get("a")
    get("b"), get("a"), get("c")
    assert made == ["a", "b", "c"] and references.reused == ["a"]
    assert get("a") is first, "used after b, which had to go"
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert references.get("part", (), object) is not part, "older than all that"
    monkeypatch.setattr(verify, "KEPT_BYTES", 103)
    get("d"), get("d")
    assert made[4:] == ["d", "d"], "one that is too large is not kept at all"


def test_references_lie_on_the_host_between_two_checks(monkeypatch):
    moved = []
    monkeypatch.setattr(ReferenceRun, "to", lambda self, device: (moved.append(device), self)[1])
    references = References()
    for name in ("a", "b"):
        references.get(name, (), lambda: reference(100))
    references.put_away()
    assert moved == ["cpu", "cpu"]


def test_a_large_reference_leaves_the_device_where_the_host_has_room(monkeypatch):
    moved = []
    monkeypatch.setattr(ReferenceRun, "to", lambda self, device: (moved.append(device), self)[1])
    monkeypatch.setattr(verify, "KEPT_BYTES", 104)
    verify._aside(reference(100))
    assert not moved, "as large as what is kept"
    monkeypatch.setattr(verify.free_memory, "of_host", lambda: 2 * 108 - 1)
    verify._aside(reference(104))
    assert not moved, "the host has no room for two of them"
    monkeypatch.setattr(verify.free_memory, "of_host", lambda: 2 * 108)
    verify._aside(reference(104))
    assert moved == ["cpu"]


def test_the_same_bytes_in_another_shape_are_other_tokens():
    """A prompt of four tokens and two prompts of two are not compared, and share no reference."""
    ids = torch.tensor([[5, 6, 5, 6]])
    assert digest(ids) == digest(ids.clone()) and digest(ids) != digest(ids.view(2, 2))
    assert digest(ids) != digest(ids.to(torch.int32)) and digest(ids) != digest(ids + 1)
