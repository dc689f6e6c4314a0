"""The benchmark's cases can be made, and a step run, with both backends."""

import itertools

import pytest
import torch

import edm2ext
from benchmarks import op_cases, step_cases, step_split
from edm2ext import ops


def test_cases_have_names_of_their_own() -> None:
    cases = itertools.chain(op_cases.all_cases(step_cases.network_weights()), step_cases.all_cases())
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_step_runs(name: str) -> None:
    with edm2ext.set_backend(name):
        next(step_cases.all_cases()).work()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_split_of_a_step(backend: str) -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 8, 3, 3, requires_grad=True)
    with edm2ext.set_backend(backend):
        found = step_split.split(lambda: ops.mp_conv2d(x, w).sum().backward())
    assert set(found) == {*step_split.PARTS, "total"}
    assert all(found[part] > 0 for part in (*step_split.CONVOLUTIONS, "other ops"))
    assert sum(found[part] for part in step_split.PARTS) == pytest.approx(found["total"])
    line = "onednn_verbose,v1,primitive,exec,cpu,{},brg,forward,shapes,,,sizes,{}"
    report = "\n".join(["onednn_verbose,v1,info", line.format("convolution", 3), line.format("reorder", 1)])
    assert step_split.share_of_reorders(report) == 0.25
    assert step_split.share_of_reorders("") == 0
