"""A record from a stranger, or damaged: either reported or one line, by every reader; none hangs, none runs what it holds."""

import itertools
import os
import random

import pytest
import record_fuzz

FEW = 40  # in `make test`, of all records together


def seed():
    """Another one every time, or MOEEXP_FUZZ_SEED to see a failure again."""
    found = int(os.environ.get("MOEEXP_FUZZ_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"MOEEXP_FUZZ_SEED={found}")
    return random.Random(found)


def fuzz(folder, count):
    generator, bases = seed(), record_fuzz.bases()
    readers = record_fuzz.Readers(folder, bases[1])
    sources = [record_fuzz.damages(base, generator) for base in bases]
    for what, data in itertools.islice(itertools.chain.from_iterable(zip(*sources, strict=True)), count):
        readers.read(what, data)


def test_a_few_damaged_records_are_reported_or_one_line(tmp_path):
    fuzz(tmp_path, FEW)


@pytest.mark.slow
def test_many_damaged_records_are_reported_or_one_line(tmp_path):
    fuzz(tmp_path, 1500)
