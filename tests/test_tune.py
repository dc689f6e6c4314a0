"""The tuner without a GPU: times are injected, and our kernels are stood in for by torch's convolution."""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from edm2ext import ops, reference, tune
from edm2ext.ops import conv_choice
from edm2ext.ops.conv_choice import Choice, Problem
from python_train import UserError, plan
from python_train.config import make_options
from python_train.network import Precond
from python_train.trainer import Trainer

module = importlib.import_module("edm2ext.ops.mp_conv2d")
pytestmark = pytest.mark.skipif(not module.backend._library.LOADED, reason="no native library")
GPU = tune.GPU("Imaginary 9000", 132)
FORWARD = Problem(0, 8, 64, 64, 192, 192, 3, 3, torch.float16, "silu", True)
GRAD_W = Problem(2, 8, 16, 16, 384, 192, 1, 1, torch.bfloat16)
QKV = Problem(0, 8, 16, 16, 384, 1152, 1, 1, torch.float16, "qkv", True)
HALVES = Problem(0, 8, 16, 16, 96, 192, 1, 1, torch.float16, "", True, cat=64)
TILES = 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing chosen before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    conv_choice.forget()
    yield tmp_path / "edm2ext"
    conv_choice.forget()


def times(found: dict[str, float], otherwise: float = 9.0) -> tune.Measure:
    """A stopwatch that shows these milliseconds."""
    return lambda problem, choice: found.get(tune.name_of(choice), otherwise)


def never(problem: Problem, choice: Choice) -> float:
    raise AssertionError(f"{problem} was timed")


@pytest.mark.parametrize(
    "problem", [FORWARD, GRAD_W, FORWARD._replace(follows="sum", keep=False), QKV, HALVES], ids=str
)
def test_problems_as_text(problem: Problem):
    assert tune.problem_of(str(problem)) == problem
    assert str(HALVES) == "forward 8x16x16 64+32->192 1x1 float16 keep"


def test_the_network_says_which_problems_there_are():
    options = make_options("img512-xs", precision="bf16", model_channels=32, channel_mult=(1, 2), num_blocks=1)
    found = plan.convolutions(options, 16, 4, 10, images=3)
    assert len(found) == len(set(found))
    assert {problem.direction for problem in found} == {0, 1, 2}
    assert all(problem.batch == 3 and problem.dtype == torch.bfloat16 for problem in found)
    assert Problem(0, 3, 16, 16, 32, 32, 3, 3, torch.bfloat16, "silu", True) in found
    assert {problem.follows for problem in found if problem.direction == 0} == {"", "silu", "sum", "qkv"}
    assert Problem(0, 3, 16, 16, 5, 32, 3, 3, torch.bfloat16) in found  # the input convolution, which can be padded
    halves = Problem(0, 3, 16, 16, 96, 32, 1, 1, torch.bfloat16, "", True, cat=64)
    assert {halves, halves._replace(direction=2, keep=False)} < set(found)
    assert halves._replace(direction=1, keep=False, cat=0) in found
    assert plan.convolutions(make_options("digits"), 8, 1, 10, images=2) == []  # float32
    with pytest.raises(UserError, match=r"preset must be one of img512-.*, got 'digits'"):
        plan.convolutions_of_preset("digits", 8, "fp16")


def test_plans_for_every_tile():
    for problem in (FORWARD, GRAD_W):
        found = tune.plans(problem, 132, wgmma=False)
        assert {tile for tile, _ in found} == set(range(TILES))
        assert len(found) == len(set(map(tuple, found))) <= 3 * TILES
    assert all(splits > 1 for _, splits in tune.plans(GRAD_W, 132)[:2])  # six tiles would leave the GPU idle
    assert all(splits == 1 for tile, splits in tune.plans(Problem(0, 1, 1, 1, 8, 8, 1, 1, torch.float16), 132))


def test_the_fastest_is_picked():
    offers = tune.offers(FORWARD, GPU)
    assert offers[0] == []
    assert offers[-1] is None
    assert len(offers) > TILES
    assert tune.pick(FORWARD, offers, times({"2x1": 1.0, "own": 2.0}))[0] == [2, 1]
    assert tune.pick(FORWARD, offers, times({"torch": 1.0}))[0] is None
    assert tune.pick(FORWARD, offers, times({}))[0] == []  # the library's own among equals


def test_halves_come_after_what_they_are_compared_with():
    whole = HALVES._replace(keep=False, cat=0)
    grad_w = HALVES._replace(direction=2, keep=False)
    assert tune.with_alternatives([HALVES, grad_w, FORWARD]) == [
        whole,
        whole._replace(direction=2),
        grad_w,
        HALVES,
        FORWARD,
    ]
    assert tune.with_alternatives([grad_w]) == [whole._replace(direction=2), grad_w]
    assert tune.with_alternatives([HALVES._replace(keep=False)]) == [whole, HALVES._replace(keep=False)]
    hopper = GPU._replace(wgmma=True)
    assert all(choice is None or not choice or choice[0] < TILES for choice in tune.offers(HALVES, hopper))
    chosen: list[Problem] = []

    def measure(problem: Problem, choice: Choice) -> float:
        assert all(other in conv_choice.chosen() for other in conv_choice.alternatives(problem))
        chosen.append(problem)
        return 1.0 if choice is None else 2.0

    timed = tune.tune([HALVES], measure, GPU)
    assert list(timed) == list(dict.fromkeys(chosen)) == tune.with_alternatives([HALVES])
    assert conv_choice.choice(HALVES) is None


def test_the_best_are_timed_twice():
    asked: dict[str, int] = {}

    def measure(problem: Problem, choice: Choice) -> float:
        name = tune.name_of(choice)
        asked[name] = asked.get(name, 0) + 1
        return {"torch": 1.0, "own": (1.1, 0.9)[asked[name] - 1] if asked[name] < 3 else 0}.get(name, 5.0)

    choice, found = tune.pick(FORWARD, [[], [0, 1], [1, 1], None], measure)
    assert choice == []
    assert found == {"own": 0.9, "torch": 1.0, "0x1": 5.0, "1x1": 5.0}
    assert sorted(asked.values()) == [1, 2, 2, 2]


def test_what_cannot_serve_is_left_out():
    def measure(problem: Problem, choice: Choice) -> float:
        if choice != []:
            raise RuntimeError("no such kernel")
        return 1.0

    with pytest.warns(UserWarning, match="0x1 is left out: no such kernel"):
        assert tune.pick(FORWARD, [[], [0, 1]], measure)[0] == []
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(RuntimeError, match="nothing computes forward 8x64x64"),
    ):
        tune.pick(FORWARD, [[0, 1]], measure)


def test_choices_are_kept_on_disk(cache: Path):
    timed = tune.tune([FORWARD, GRAD_W], times({"torch": 1.0}), GPU)
    assert set(timed) == {FORWARD, GRAD_W}
    assert timed[FORWARD]["torch"] == 1.0
    (file,) = cache.iterdir()
    assert "Imaginary-9000" in file.name
    assert json.loads(file.read_text()) == {
        "version": tune.VERSION,
        "choices": {str(FORWARD): "torch", str(GRAD_W): "torch"},
    }
    assert tune.tune([FORWARD], never, GPU) == {}  # chosen in this process
    conv_choice.forget()
    assert tune.tune([FORWARD, GRAD_W], never, GPU) == {}  # in the file
    assert tune.choices() == {str(FORWARD): "torch", str(GRAD_W): "torch"}
    conv_choice.forget()
    assert list(tune.tune([FORWARD, FORWARD._replace(batch=9)], times({"3x1": 1}), GPU)) == [FORWARD._replace(batch=9)]
    assert len(tune.read(file)) == 3
    tune.tune([FORWARD], times({"1x1": 1.0}), GPU, again=True)
    assert conv_choice.choice(FORWARD) == [1, 1]
    assert len(tune.read(file)) == 3
    tune.tune([FORWARD], times({}), GPU._replace(name="another"))
    assert len(list(cache.iterdir())) == 1  # nothing to time: chosen already


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 99, "choices": {}}', '{"version": 1}', '{"version": 1, "choices": {"nonsense": []}}',
     '{"version": 1, "choices": []}', f'{{"version": 1, "choices": {{"{FORWARD}": [1]}}}}'],
)  # fmt: skip
def test_damaged_files_are_passed_over_and_replaced(cache: Path, content: str):
    file = tune.cache_file(GPU.name)
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="is passed over"):
        tune.tune([FORWARD], times({"torch": 1.0}), GPU)
    assert tune.read(file) == {FORWARD: None}
    assert [f.name for f in cache.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written(cache: Path):
    cache.write_text("not a folder")
    with pytest.warns(UserWarning, match="hold for this process only"):
        tune.tune([FORWARD], times({"torch": 1.0}), GPU)
    assert conv_choice.choice(FORWARD) is None


def test_pinned():
    saved = {str(FORWARD): [2, 1], str(GRAD_W): "torch"}
    tune.load(saved)
    assert tune.choices() == saved
    assert tune.tune([FORWARD, GRAD_W], never, GPU) == {}
    with pytest.warns(UserWarning, match="no kernels here for the plans of 1 convolutions"):
        tune.load({str(FORWARD): [2, 3], str(GRAD_W): [17, 1]})
    assert tune.choices() == {str(FORWARD): [2, 3], str(GRAD_W): "torch"}


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"forward": []}, "expected a convolution such as"),
        ({str(FORWARD): [1]}, r"expected \[\], \[tile, splits\] or \"torch\""),
        ({str(FORWARD): [1, -1]}, r"got \[1, -1\]"),
        ({str(FORWARD): "cudnn"}, "got 'cudnn'"),
    ],
)
def test_bad_choices(saved: dict[str, object], message: str):
    with pytest.raises(ValueError, match=f"tune: .*{message}"):
        tune.load(saved)
    assert tune.choices() == {}


def test_rank_0_decides(monkeypatch: pytest.MonkeyPatch):
    shared: list[object] = []

    def broadcast(objects: list[object], src: int) -> None:
        assert src == 0
        if rank == 0:
            shared[:] = objects
        else:
            objects[:] = shared

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    rank = 0
    tune.tune([FORWARD], times({"3x1": 1.0}), GPU)
    decided = tune.choices()
    conv_choice.forget()
    rank = 1
    assert tune.tune([FORWARD], never, GPU) == {}
    assert tune.choices() == decided == {str(FORWARD): [3, 1]}


def test_training_states_hold_the_choices():
    options = make_options("digits", model_channels=8, channel_mult=(1,), attn_resolutions=())
    trainer = Trainer(Precond(**options.network_config(8, 1, 10)), options)
    saved = {str(FORWARD): [2, 1], str(GRAD_W): "torch"}
    tune.load(saved)
    state = trainer.state_dict()
    conv_choice.forget()
    trainer.load_state_dict(state)
    assert tune.choices() == saved
    del state["convolutions"]
    trainer.load_state_dict(state)  # an older one


# ---- what ops make of it ----


@pytest.fixture
def plans_taken(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Stands in for our kernels on the CPU: the plans that they were called with."""
    taken: list[list[int]] = []

    def forward(x: Tensor, w: Tensor, gain: Tensor | None, plan: list[int]) -> Tensor:
        taken.append(plan)
        y = F.conv2d(x, w, padding=w.shape[2] // 2)
        return y + 1 if plan == [1, 1] else y  # a plan that computes nonsense

    def silu(x: Tensor, w: Tensor, c: Tensor, keep: bool, plan: list[int]) -> tuple[Tensor, Tensor]:
        y = forward(x, w, None, plan)
        return reference.mp_silu_modulated(y, c), y if keep else y.new_empty(0)

    def summed(
        x: Tensor, w: Tensor, skip: Tensor, t: float, clip: float, mask: bool, plan: list[int]
    ) -> tuple[Tensor, Tensor]:
        y = forward(x, w, None, plan)
        clipped, bits = torch.ops.edm2.mp_sum_clipped(skip, y, t, clip)
        return clipped, bits if mask else bits.new_empty(0)

    def heads(x: Tensor, w: Tensor, eps: float, keep: bool) -> tuple[Tensor, ...]:
        y = forward(x, w, None, [])
        return *reference.qkv_norm(y, y.shape[1] // 192), y if keep else y.new_empty(0)

    def backward_input(grad: Tensor, w: Tensor, plan: list[int]) -> Tensor:
        taken.append(plan)
        return F.conv_transpose2d(grad, w, padding=w.shape[2] // 2)

    def backward_weight(grad: Tensor, x: Tensor, height: int, width: int, plan: list[int]) -> Tensor:
        taken.append(plan)
        shape = (grad.shape[1], x.shape[1], height, width)
        return torch.nn.grad.conv2d_weight(x, shape, grad, padding=height // 2).float()

    monkeypatch.setattr(module, "on_tensor_cores", lambda *arguments: True)
    monkeypatch.setattr(module, "_mp_conv2d", forward)
    monkeypatch.setattr(module, "_mp_conv2d_silu_modulated", silu)
    monkeypatch.setattr(module, "_mp_conv2d_sum", summed)
    monkeypatch.setattr(module, "_mp_conv2d_qkv_norm", heads)
    monkeypatch.setattr(module, "_mp_conv2d_backward_input", backward_input)
    monkeypatch.setattr(module, "_mp_conv2d_backward_weight", backward_weight)
    return taken


def step(follows: str) -> tuple[list[Tensor], list[Problem]]:
    """y and all gradients of a convolution in bfloat16, and the problems that it asked about."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(24, 16, 3, 3, requires_grad=True)
    other = torch.randn(2, 24).bfloat16() if follows == "silu" else torch.randn(2, 24, 5, 6).bfloat16()
    other = (other if follows == "silu" else other.contiguous(memory_format=torch.channels_last)).requires_grad_()
    then = {"": None, "silu": ops.ModulatedSiLU(other), "sum": ops.SumWith(other, 0.3)}[follows]
    with conv_choice.recording() as problems:
        y = ops.mp_conv2d(x, w, then=then)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, w, *([other] if follows else [])])
    return [y.detach(), *gradients], list(problems)


@pytest.mark.parametrize("follows", ["", "silu", "sum"])
def test_ops_obey(plans_taken: list[list[int]], follows: str):
    own, problems = step(follows)
    assert plans_taken == [[], [], []]
    assert [problem.direction for problem in problems] == [0, 1, 2] or [p.direction for p in problems] == [0, 2, 1]
    assert problems[0] == Problem(0, 2, 5, 6, 16, 24, 3, 3, torch.bfloat16, follows, follows == "silu")
    tune.load({str(problem): [problem.direction, 7] for problem in problems})
    step(follows)
    assert sorted(plans_taken[3:]) == [[0, 7], [1, 7], [2, 7]]
    tune.load({str(problem): "torch" for problem in problems})
    by_torch, _ = step(follows)
    assert len(plans_taken) == 6
    for a, b in zip(own, by_torch, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


def test_compiled_graphs_hold_the_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TENSOR_CORES", module._TENSOR_CORES._replace(meta=True))
    x = torch.empty(2, 16, 5, 6, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w, c = torch.empty(24, 16, 3, 3, device="meta"), torch.empty(2, 24, device="meta")
    plans: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        plans.extend(node.args[-1] for node in graph.graph.nodes if "mp_conv2d_silu_modulated" in str(node.target))
        return graph

    tune.load({str(Problem(0, 2, 5, 6, 16, 24, 3, 3, torch.bfloat16, "silu")): [2, 7]})
    with torch.no_grad():
        compiled = torch.compile(
            lambda x: ops.mp_conv2d(x, w, then=ops.ModulatedSiLU(c)), backend=backend, fullgraph=True, dynamic=False
        )
        assert compiled(x).shape == (2, 24, 5, 6)
    assert plans == [[2, 7]]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
def test_compiled_graphs_read_halves(monkeypatch: pytest.MonkeyPatch):
    """In both directions, if that was chosen."""
    monkeypatch.setattr(module, "_TENSOR_CORES", module._TENSOR_CORES._replace(meta=True))
    shape = (2, 64, 5, 6), (2, 32, 5, 6)
    a, b = (torch.empty(s, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last) for s in shape)
    w = torch.empty(24, 96, 1, 1, device="meta", requires_grad=True)
    a.requires_grad_()
    graphs: list[str] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    forward = Problem(0, 2, 5, 6, 96, 24, 1, 1, torch.bfloat16, "", True, cat=64)
    for choice, ours in (([3, 2], True), (None, False)):
        torch.compiler.reset()
        graphs.clear()
        tune.load({str(forward): "torch" if choice is None else choice})
        compiled = torch.compile(
            lambda a, b, w: ops.mp_cat_conv2d(a, b, w),
            backend=aot_autograd(fw_compiler=collect),
            fullgraph=True,
            dynamic=False,
        )
        outputs = compiled(a, b, w)
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
        for graph, op in zip(graphs, ("mp_cat_conv2d.default", "mp_cat_conv2d_backward_weight.default"), strict=True):
            assert (op in graph) == ours
            assert ("mp_cat_silu_only" in graph) == ours
        assert ("[3, 2]" in graphs[0]) == ours
    torch.compiler.reset()


def test_wrong_results_are_not_chosen(plans_taken: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "_FLUSH_BYTES", 16)
    monkeypatch.setattr(tune, "offers", lambda problem, gpu: [[], [1, 1], [2, 1], None])
    timer = tune.Timer("cpu")
    monkeypatch.setattr(timer, "time", lambda: {"1x1": 0.1, "2x1": 0.5}.get(tune.name_of(conv_choice.choice(p)), 1.0))
    for p in step("sum")[1]:  # the stand-in's nonsense is the forward pass's
        wrong = pytest.warns(UserWarning, match="1x1 is left out: its result is off by")
        with contextlib.nullcontext() if p.direction else wrong:
            tune.tune([p], timer, GPU)
        assert conv_choice.choice(p) == ([1, 1] if p.direction else [2, 1])


def test_heads_are_timed_with_and_without_fusion(plans_taken: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "_FLUSH_BYTES", 16)
    small = Problem(0, 2, 3, 4, 16, 192, 1, 1, torch.bfloat16, "qkv", True)
    timer = tune.Timer("cpu")
    monkeypatch.setattr(timer, "time", lambda: 1.0)
    for choice, taken in (([], []), ([2, 1], [2, 1]), (None, None)):
        plans_taken.clear()
        assert timer(small, choice) == 1.0
        assert plans_taken == ([] if taken is None else [taken])
    assert tune.offers(small, GPU)[0] == []


@pytest.fixture
def ops_taken(plans_taken: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for our kernels: which were called, those of an MP-Cat's halves among them."""
    taken: list[str] = []
    cat_module = importlib.import_module("edm2ext.ops.mp_cat_conv2d")

    def noted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            taken.append(name)
            return function(*arguments)

        return call

    joined = reference.mp_cat
    standing_in = {
        "mp_cat": lambda a, b, t: joined(a, b, t),
        "mp_cat_silu": lambda a, b, t: joined(a, b, t, silu=True),
        "mp_cat_silu_only": lambda a, b, t: joined(a, b, t, silu=True)[1],
        "mp_cat_conv2d": lambda a, b, w, t, plan: F.conv2d(joined(a, b, t), w),
        "mp_cat_conv2d_backward_weight": lambda grad, a, b, t, plan: module._mp_conv2d_backward_weight(
            grad, joined(a, b, t), 1, 1, plan
        ),
    }
    for name, function in standing_in.items():
        monkeypatch.setattr(cat_module, f"_{name}", noted(name, function))
    for name in ("mp_conv2d", "mp_conv2d_backward_weight"):
        monkeypatch.setattr(module, f"_{name}", noted(name, getattr(module, f"_{name}")))
    return taken


def test_halves_are_timed_with_all_that_they_save(ops_taken: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "_FLUSH_BYTES", 16)
    timer = tune.Timer("cpu")
    monkeypatch.setattr(timer, "time", lambda: 1.0)
    problem = Problem(0, 2, 3, 4, 96, 16, 1, 1, torch.bfloat16, "", True, cat=64)
    halves = ["mp_cat_conv2d", "mp_cat_silu_only"]
    for keep, choice, taken in (
        (True, [], [*halves, "mp_cat_conv2d_backward_weight", "mp_conv2d_backward_weight"]),  # of the stand-in
        (True, None, ["mp_cat_silu", "mp_conv2d", "mp_conv2d_backward_weight"]),
        (False, [3, 2], halves),
        (False, None, ["mp_cat_silu", "mp_conv2d"]),
    ):
        of = problem._replace(keep=keep)
        timer(of, None)  # what is expected
        ops_taken.clear()
        assert timer(of, choice) == 1.0
        assert ops_taken == taken
    grad_w = problem._replace(direction=2, keep=False)
    timer(grad_w, None)
    ops_taken.clear()
    timer(grad_w, None)
    assert ops_taken == ["mp_cat", "mp_conv2d_backward_weight"]


def test_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "convolutions_of_preset", lambda *arguments: [FORWARD, GRAD_W])
    result = CliRunner().invoke(tune.main, ["--preset", "img512-s", "--list"])
    assert result.exit_code == 0, result.output
    assert f"{FORWARD}: own, 0x1" in result.output
    assert result.output.strip().endswith("torch")
    if not torch.cuda.is_available():
        result = CliRunner().invoke(tune.main, ["--preset", "img512-s"])
        assert result.exit_code == 1
        assert "needs a GPU; --list says what it would try" in result.output
    monkeypatch.undo()
    result = CliRunner().invoke(tune.main, ["--preset", "digits", "--list"])
    assert result.exit_code == 1
    assert "Error: preset must be one of" in result.output


def test_table():
    timed = tune.tune([FORWARD], times({"torch": 2.0, "3x1": 1.0}), GPU)
    rows = list(tune._table([FORWARD, GRAD_W], timed))
    assert rows[2] == f"| {FORWARD} | 3x1 | 1.0000 | 1.0000 | 2.0000 | 2.00 |"
    assert rows[3] == f"| {GRAD_W} | own | kept | kept | kept | kept |"
