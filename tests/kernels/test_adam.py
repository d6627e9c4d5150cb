"""FusedAdam against torch.optim's AdamW and Adam, and against float64; its scalars, state dicts and refusals."""

from __future__ import annotations

import copy
import importlib
import io
from types import SimpleNamespace

import pytest
import torch
from numerics import DTYPES, assert_no_worse, backends
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phi_fast.kernels import FusedAdam, backend
from phi_fast.kernels.adam import adam_step_, grad_norm_squared, unscale_and_clip

module = importlib.import_module("phi_fast.kernels.adam")
BACKENDS = backends("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((37,), (16, 32), (5, 7, 3), (1,), (4, 0, 2), (33000,))  # ragged, empty, longer than a program handles
RECIPE = {"lr": 2e-4, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}  # phi-1.5's


def draw(seed: int, device: str, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def gradients_of(seed: int, device: str, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    """Gradients that span nine orders of magnitude, as those of a model do."""
    generator = torch.Generator().manual_seed(1000 + seed)
    sizes = [10.0 ** torch.randint(-8, 2, shape, generator=generator) for shape in shapes]
    return [
        (g.to(device) * size.to(device)).to(dtype)
        for g, size in zip(draw(seed, device, shapes=shapes), sizes, strict=True)
    ]


def parameters(device: str, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    return [p.requires_grad_() for p in draw(0, device, dtype, shapes)]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int) -> None:
    for seed in range(1, steps + 1):
        for p, g in zip(params, gradients_of(seed, str(params[0].device)), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_trajectory_is_torchs(device: str, backend_name: str, decoupled: bool) -> None:
    """In fp32, parameters agree to 4 units of 2⁻²³ and moments to 2; the reference agrees bit for bit."""
    steps = 30 if backend_name != "triton" or device == "cuda" else 8  # the interpreter is slow
    ours, theirs = parameters(device), parameters(device)
    options = {**RECIPE, "lr": 1e-2}
    with backend.use(backend_name, op="adam"):
        mine = FusedAdam(ours, decoupled_weight_decay=decoupled, **options)
        run(mine, ours, steps)
    peer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, foreach=False, **options)
    run(peer, theirs, steps)
    bits = {"p": 4, "exp_avg": 2, "exp_avg_sq": 2}
    for a, b in zip(ours, theirs, strict=True):
        pairs = {"p": (a, b), **{key: (mine.state[a][key], peer.state[b][key]) for key in ("exp_avg", "exp_avg_sq")}}
        for name, (x, y) in pairs.items():
            if backend_name == "reference" and device == "cpu":
                assert torch.equal(x, y), name
            scale = y.abs().clamp(min=1.0) if name == "p" else y.abs().max() if y.numel() else y
            assert ((x - y).abs() <= bits[name] * 2.0**-23 * scale).all(), name
        assert mine.state[a]["step"] == steps


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=lambda d: f"grad-{d}")
@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_error_against_float64(device, backend_name, dtype, master, grad_dtype) -> None:
    """One step from a given state errs no more than torch's in fp32; 16-bit weights are the rounded master."""
    grads = gradients_of(3, device, grad_dtype)
    exp_avgs, exp_avg_sqs = draw(1, device), [v.square() for v in draw(2, device)]
    masters = draw(0, device)
    params = [p.to(dtype) for p in masters]

    def torch_step(wide: torch.dtype) -> list[list[Tensor]]:
        leaves = [p.to(wide).requires_grad_() for p in masters]
        optimizer = torch.optim.AdamW(leaves, foreach=False, **RECIPE)
        for p, g, m, v in zip(leaves, grads, exp_avgs, exp_avg_sqs, strict=True):
            p.grad = g.to(wide) * 0.125
            optimizer.state[p] = {"step": torch.tensor(6.0), "exp_avg": m.to(wide), "exp_avg_sq": v.to(wide)}
        optimizer.step()
        states = [optimizer.state[p] for p in leaves]
        return [[p.detach() for p in leaves], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]

    exact, usual = torch_step(torch.float64), torch_step(torch.float32)
    step, scale = torch.tensor(6.0, device=device), torch.tensor(0.125, device=device)
    with backend.use(backend_name, op="adam"):
        lists = (params, grads, exp_avgs, exp_avg_sqs, masters if master else None)
        adam_step_(*lists, step=step, grad_scale=scale, found_inf=torch.zeros((), device=device), **RECIPE)
    assert step == 7
    results = (masters if master else params, exp_avgs, exp_avg_sqs)
    for name, a, b, c in zip(("p", "exp_avg", "exp_avg_sq"), results, usual, exact, strict=True):
        for i in range(len(SHAPES)):
            assert_no_worse(a[i], b[i], c[i], f"{name} {SHAPES[i]}")
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(params, masters, strict=True)) or not master


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_sixteen_bit_parameters_without_master(device: str, backend_name: str) -> None:
    """The step is computed in fp32 from the rounded weight and rounded once, like torch's fp32 step, rounded."""
    for dtype in (torch.float16, torch.bfloat16):
        ours = parameters(device, dtype)
        theirs = [p.detach().float().requires_grad_() for p in ours]
        with backend.use(backend_name, op="adam"):
            run(FusedAdam(ours, **RECIPE), ours, 1)
        for p, g in zip(theirs, gradients_of(1, device), strict=True):
            p.grad = g.to(dtype).float()
        torch.optim.AdamW(theirs, foreach=False, **RECIPE).step()
        different = [(a != b.to(dtype)).float().mean() for a, b in zip(ours, theirs, strict=True) if a.numel()]
        assert max(different) < 1e-3  # a difference in fp32's last bit may change a rounding


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_found_inf_changes_nothing(device: str, backend_name: str, bad: float) -> None:
    params = parameters(device, torch.float16)
    with backend.use(backend_name, op="adam"):
        optimizer = FusedAdam(params, master_weights=True, **RECIPE)
        run(optimizer, params, 2)
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        params[1].grad[3, 4] = bad
        grad_scale, found_inf, _ = unscale_and_clip(grad_norm_squared([p.grad for p in params]), max_norm=1.0)
        assert found_inf == 1
        optimizer.step(grad_scale=grad_scale, found_inf=found_inf)
    after = (params, optimizer.state_dict()["state"])
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    for index, state in before[1].items():
        assert all(torch.equal(state[key], after[1][index][key]) for key in ("step", "exp_avg", "exp_avg_sq", "master"))


@pytest.mark.parametrize(
    ("dtype", "what", "value"),
    [
        (torch.float16, "master", 7e4),  # finite in fp32, but not in the stored fp16 weight
        (torch.float16, "master", float("nan")),
        (torch.bfloat16, "master", 3.4e38),
        (torch.float32, "param", float("inf")),
        (torch.float16, "exp_avg", float("-inf")),
        (torch.float32, "exp_avg_sq", float("nan")),
        (torch.float16, None, 0.0),
        (torch.float32, None, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [0, 40, 32999], ids=lambda at: f"at-{at}")
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_value_that_is_not_finite_sets_the_flag(
    device: str, backend_name: str, at: int, dtype: torch.dtype, what: str | None, value: float
) -> None:
    """One of 33,000 elements, at the beginning, inside a vector or in the tail, is not finite, or none is; eps is 0."""
    masters, shape = draw(0, device, shapes=((33000,),)), ((33000,),)
    states = {"master": masters[0], "exp_avg": draw(1, device, shapes=shape)[0]}
    states["exp_avg_sq"] = draw(2, device, shapes=shape)[0].square() + 0.1
    states["param"] = masters[0].to(dtype)
    if what is not None:
        states[what][at] = value
    lists = [[states[name]] for name in ("param", "exp_avg", "exp_avg_sq")]
    lists.insert(1, [torch.ones(33000, device=device, dtype=dtype)])
    flag = torch.zeros((), device=device)
    options = {"lr": 1e-3, "eps": 0.0, "step": torch.tensor(5.0, device=device)}
    with backend.use(backend_name, op="adam"):
        adam_step_(*lists, masters if dtype != torch.float32 else None, nonfinite=flag, **options)
        assert flag == (what is not None)
        adam_step_(*lists, masters if dtype != torch.float32 else None, **options)  # without the flag
    assert flag == (what is not None)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_skipped_step_leaves_the_flag(device: str, backend_name: str) -> None:
    param, grad, flag = torch.full((9,), float("inf"), device=device), torch.ones(9, device=device), torch.zeros(())
    state = (torch.zeros_like(grad), torch.zeros_like(grad))
    options = {"lr": 1e-3, "step": torch.tensor(0.0, device=device), "found_inf": torch.ones((), device=device)}
    with backend.use(backend_name, op="adam"):
        adam_step_([param], [grad], [state[0]], [state[1]], nonfinite=flag.to(device), **options)
    assert flag == 0


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_unscale_and_clip_as_torch(device: str, backend_name: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    peer = torch.optim.AdamW(theirs, foreach=False, **RECIPE)
    with backend.use(backend_name, op="adam"):
        optimizer = FusedAdam(ours, **RECIPE)
        for seed, loss_scale in ((1, 1024.0), (2, 2048.0), (3, 512.0)):
            for a, b, g in zip(ours, theirs, gradients_of(seed, device), strict=True):
                a.grad, b.grad = g * loss_scale, g.clone()
            norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            scalars = unscale_and_clip(grad_norm_squared([p.grad for p in ours]), loss_scale=loss_scale, max_norm=1.0)
            torch.testing.assert_close(scalars[2], norm, rtol=1e-5, atol=0)
            optimizer.step(grad_scale=scalars[0], found_inf=scalars[1])
            peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_grad_norm(device: str, backend_name: str, dtype: torch.dtype) -> None:
    grads = [*gradients_of(5, device, dtype), *gradients_of(6, device, torch.float32)]
    exact = sum(float(g.double().square().sum()) for g in grads)
    with backend.use(backend_name, op="adam"):
        first, second = grad_norm_squared(grads), grad_norm_squared(grads)
        assert first.dtype == torch.float32 and first.ndim == 0 and torch.equal(first, second)
        assert abs(float(first) - exact) < 1e-6 * exact
        assert torch.equal(grad_norm_squared(grads[0]), grad_norm_squared([grads[0]]))
        assert grad_norm_squared([grads[4]]) == 0  # no elements
        for bad in (float("inf"), float("-inf"), float("nan")):
            grads[5][32999] = bad
            assert not grad_norm_squared(grads).isfinite()


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_flat_partition_and_views(device: str, backend_name: str) -> None:
    """Slices of a flat buffer at odd offsets give the same numbers as the whole, and nothing outside them changes."""
    n = 1003
    master, exp_avg, grad = draw(0, device, shapes=[(n,), (n,), (n,)])
    exp_avg_sq, weights = exp_avg.square(), master.half()
    whole = [t.clone() for t in (master, grad, exp_avg, exp_avg_sq, weights)]

    def step(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor) -> None:
        adam_step_([weights], [grad], [exp_avg], [exp_avg_sq], [master], step=torch.zeros((), device=device), **RECIPE)

    with backend.use(backend_name, op="adam"):
        step(*whole)
        assert torch.equal(whole[4], whole[0].half()) and torch.equal(whole[1], grad)
        for a, b in ((0, 5), (5, 501), (501, n - 3)):
            step(*(t[a:b] for t in (master, grad, exp_avg, exp_avg_sq, weights)))
    for part, all_, start in zip(
        (master, exp_avg, exp_avg_sq, weights), (*whole[:1], *whole[2:]), [0] * 4, strict=True
    ):
        assert torch.equal(part[start : n - 3], all_[start : n - 3])
    assert torch.equal(master[n - 3 :], draw(0, device, shapes=[(n,)])[0][n - 3 :])


def test_parameters_that_sit_out_keep_their_own_count(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    mine, peer = FusedAdam(ours, **RECIPE), torch.optim.AdamW(theirs, foreach=False, **RECIPE)
    for seed in range(1, 9):
        for i, (a, b, g) in enumerate(zip(ours, theirs, gradients_of(seed, device), strict=True)):
            out = (i == 1 and seed in (1, 4)) or (i == 2 and seed in (4, 5))
            a.grad, b.grad = (None, None) if out else (g, g.clone())
        mine.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a]["step"] == peer.state[b]["step"]
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert len({id(mine.state[p]["step"]) for p in ours}) == 3, "the other parameters share one count"


def test_state_dicts_of_torch_load_both_ways(device: str) -> None:
    """3 steps of FusedAdam, 3 of torch's AdamW and 3 of FusedAdam equal 9 steps of torch's."""
    params, theirs = parameters(device), parameters(device)
    run(torch.optim.AdamW(theirs, foreach=False, **RECIPE), theirs, 9)
    state = None
    for first, kind in ((1, FusedAdam), (4, torch.optim.AdamW), (7, FusedAdam)):
        optimizer = kind(params, lr=1.0)
        if state is not None:
            optimizer.load_state_dict(state)
            assert optimizer.param_groups[0]["betas"] == RECIPE["betas"]
        else:
            optimizer.param_groups[0].update(RECIPE)
        for seed in range(first, first + 3):
            for p, g in zip(params, gradients_of(seed, device), strict=True):
                p.grad = g
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_state_of_16_bit_parameters_survives_a_state_dict(device: str) -> None:
    """torch's own load_state_dict would round the moments and the master to bf16."""
    params = parameters(device, torch.bfloat16)
    first = FusedAdam(params, master_weights=True, **RECIPE)
    run(first, params, 3)
    copies = [p.detach().clone().requires_grad_() for p in params]
    second = FusedAdam(copies, master_weights=True)
    second.load_state_dict(first.state_dict())
    for p, q in zip(params, copies, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "master"):
            assert second.state[q][key].dtype == torch.float32
            assert torch.equal(first.state[p][key], second.state[q][key])
            assert p.numel() == 0 or first.state[p][key].data_ptr() != second.state[q][key].data_ptr()
    run(first, params, 2)
    run(second, copies, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_grad_scaler_divides_its_scale_out(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    mine, peer = FusedAdam(ours, **RECIPE), torch.optim.AdamW(theirs, foreach=False, **RECIPE)
    for params, optimizer in ((ours, mine), (theirs, peer)):
        loss = sum((p * g).sum() for p, g in zip(params, gradients_of(1, device), strict=True))
        (scaler.scale(loss) if optimizer is mine else loss).backward()
        scaler.step(optimizer) if optimizer is mine else optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class NoSync(TorchDispatchMode):
    """Fails when a value is read back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(device: str) -> None:
    params = parameters(device)
    for p, g in zip(params, gradients_of(1, device), strict=True):
        p.grad = g
    optimizer = FusedAdam(params, **{**RECIPE, "lr": torch.tensor(1e-3, device=device)})
    with backend.use("triton" if device == "cuda" else "reference", op="adam"), NoSync():
        norm_squared = grad_norm_squared([p.grad for p in params])
        scale, found_inf, _ = unscale_and_clip(norm_squared, loss_scale=torch.tensor(8.0, device=device), max_norm=1.0)
        optimizer.step(grad_scale=scale, found_inf=found_inf)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_lr_as_a_tensor(device: str, backend_name: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    with backend.use(backend_name, op="adam"):
        run(FusedAdam(ours, **{**RECIPE, "lr": torch.tensor(2e-4, device=device)}), ours, 3)
        run(FusedAdam(theirs, **RECIPE), theirs, 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_the_step() -> None:
    ours, theirs = parameters("cuda"), parameters("cuda")
    mine, peer = FusedAdam(ours, **RECIPE), FusedAdam(theirs, **RECIPE)
    for params, optimizer in ((ours, mine), (theirs, peer)):
        for p, g in zip(params, gradients_of(1, "cuda"), strict=True):
            p.grad = g
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for seed in (2, 3):
        for a, b, g in zip(ours, theirs, gradients_of(seed, "cuda"), strict=True):
            a.grad.copy_(g)
            b.grad.copy_(g)
        graph.replay()
        peer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert mine.state[ours[0]]["step"] == 3


def test_a_capture_of_tensors_that_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each replay, a graph would copy the table of addresses from pinned memory that has been reused by then."""
    upload = pytest.importorskip("phi_fast.kernels.triton.adam")._Uploaded
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"take a step first.*zero_grad\(set_to_none=False\)"):
        upload((1, 2, 3), torch.device("cuda", 0))


def test_another_stream_waits_for_the_tables_and_their_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model on another stream steps tensors of the same sizes, so it gets the first model's table."""
    module = pytest.importorskip("phi_fast.kernels.triton.adam")
    log: list[tuple] = []

    class OnTheGPU:
        device = torch.device("cuda", 0)

        def pin_memory(self) -> OnTheGPU:
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> OnTheGPU:
            log.append(("copy", non_blocking))
            return self

        def record_stream(self, stream: SimpleNamespace) -> None:
            log.append(("keeps its memory for", stream.cuda_stream))

    def stream(number: int) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=number, wait_event=lambda event: log.append((number, "waits")))

    current = stream(1)
    monkeypatch.setattr(module.torch, "tensor", lambda *_, **__: OnTheGPU())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: log.append(("recorded",))))
    table = module._Uploaded((1, 2, 3), torch.device("cuda", 0))
    table.here()
    assert log == [("copy", True), ("recorded",)], "the stream of the copy is in order with it"
    current = stream(2)
    for _ in range(2):
        table.here()
    assert log[2:] == [(2, "waits"), ("keeps its memory for", 2)], "once is enough"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    current = stream(3)
    assert table.here() in module._CAPTURED
    module._CAPTURED.clear()
    assert len(log) == 4, "a capture takes no event from outside"


def test_operator_and_compile(device: str) -> None:
    def fresh() -> tuple:
        shapes = [(33,), (8, 8)]
        lists = [draw(i, device, shapes=shapes) for i in range(4)]
        lists[3] = [v.square() for v in lists[3]]
        return *lists, torch.zeros((), device=device)

    params, grads, exp_avgs, exp_avg_sqs, step = fresh()
    one, lr = torch.ones((), device=device), torch.tensor(1e-3, device=device)
    rest = (step, lr, 0.9, 0.98, 1e-7, 0.1, True, one, None, True, None)
    torch.library.opcheck(module._adam_step_op, (params, grads, exp_avgs, exp_avg_sqs, [], *rest))
    halves = [p.half() for p in params]
    torch.library.opcheck(module._adam_step_op, (halves, grads, exp_avgs, exp_avg_sqs, params, *rest))

    def step_(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], step: Tensor) -> None:
        adam_step_(params, [g * 2 for g in grads], m, v, step=step, **RECIPE)

    eager, compiled = fresh(), fresh()
    step_(*eager)
    torch.compile(step_, fullgraph=True, backend="aot_eager")(*compiled)
    flat = [[t for part in whole[:4] for t in part] + [whole[4]] for whole in (eager, compiled)]
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_two_runs_agree_bit_for_bit(device: str, backend_name: str) -> None:
    first, second = parameters(device), parameters(device)
    with backend.use(backend_name, op="adam"):
        for params in (first, second):
            run(FusedAdam(params, **RECIPE), params, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: expected a value >= 0"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): expected two values in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdam([torch.zeros(3, requires_grad=True)], **options)


def test_bad_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"parameter \(3,\) is torch.float64"):
        FusedAdam([torch.zeros(3, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(ValueError, match=r"strides \(6, 2\): expected contiguous"):
        FusedAdam([torch.zeros(4, 6)[:, ::2].requires_grad_()])
    sparse = torch.zeros(3, 2, requires_grad=True)
    sparse.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"\(3, 2\) has a sparse gradient"):
        FusedAdam([sparse]).step()

    good = [torch.zeros(3)]
    options = {"step": torch.zeros(()), "lr": 0.1}
    for lists, message in (
        (([], [], [], []), "params is empty"),
        ((good, [], good, good), "grads has 0 tensors and params 1"),
        ((good, [torch.zeros(4)], good, good), r"grads\[0\] is \(4,\) on cpu, not the 3 elements of params\[0\]"),
        ((good, good, [torch.zeros(3).half()], good), r"exp_avgs\[0\] is torch.float16, not torch.float32"),
        ((good, [torch.zeros(6)[::2]], good, good), r"grads\[0\] has strides \(2,\)"),
        ((good * 2, [*good, torch.zeros(3).half()], good * 2, good * 2), r"grads\[1\] is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            adam_step_(*lists, **options)
    for grads, message in (
        ([], "grads is empty"),
        ([*good, torch.zeros(6)[::2]], r"grads\[1\] is torch.float32 with strides \(2,\) on cpu: expected contiguous"),
        (torch.zeros(3).double(), r"grads\[0\] is torch.float64 .* one of torch.float32, torch.float16"),
        ([*good, torch.zeros(3, device="meta")], r"grads\[1\] .* on meta: expected contiguous, on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            grad_norm_squared(grads)
