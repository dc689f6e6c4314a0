"""The benchmark's cases can be made, and a step run, with both backends."""

import itertools

import pytest

import edm2ext
from benchmarks import op_cases, step_cases


def test_cases_have_names_of_their_own() -> None:
    cases = itertools.chain(op_cases.all_cases(step_cases.network_weights()), step_cases.all_cases())
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_step_runs(name: str) -> None:
    with edm2ext.set_backend(name):
        next(step_cases.all_cases()).work()
