"""FusedAdam's options: torch's keywords, parameters with other strides (channels_last), no bias correction."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from numerics import assert_no_worse, backends
from torch import Tensor

from phi_fast.kernels import FusedAdam, backend
from phi_fast.kernels.adam import adam_step_, grad_norm_squared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = backends(DEVICE)
RECIPE = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def leaf() -> Tensor:
    return draw(0, 3).requires_grad_()


def torchs_keywords() -> dict[str, object]:
    """The keywords of AdamW and Adam, with their defaults."""
    parameters = {**inspect.signature(torch.optim.Adam).parameters, **inspect.signature(torch.optim.AdamW).parameters}
    return {name: parameter.default for name, parameter in parameters.items() if name != "params"}


def test_torchs_keywords_at_their_defaults_give_torchs_step() -> None:
    keywords = torchs_keywords()
    assert {"amsgrad", "foreach", "fused", "maximize", "capturable", "differentiable"} <= set(keywords)
    keywords.pop("decoupled_weight_decay", None)  # a keyword of Adam; FusedAdam is decoupled
    ours, theirs = leaf(), leaf()
    for p, kind in ((ours, FusedAdam), (theirs, torch.optim.AdamW)):
        optimizer = kind([p], **keywords)
        p.grad = draw(1, 3)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("amsgrad", True, "False"),
        ("maximize", True, "False"),
        ("differentiable", True, "False"),
        ("fused", False, "None or True"),
        ("foreach", "yes", "None or False or True"),
        ("capturable", None, "False or True"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: object, allowed: str) -> None:
    message = f"{name}={value!r}: FusedAdam takes {allowed}; use torch.optim.AdamW"
    with pytest.raises(ValueError, match=message):
        FusedAdam([leaf()], **{name: value})
    with pytest.raises(ValueError, match=message):
        FusedAdam([{"params": [leaf()], name: value}])


def test_values_that_change_no_result_are_taken() -> None:
    for keywords in ({"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": True}):
        assert FusedAdam([leaf()], **keywords).param_groups[0].items() >= keywords.items()
    assert FusedAdam([leaf()], 1e-3, (0.9, 0.999), 1e-8, 0.0, False).defaults["amsgrad"] is False  # torch's order


def saved_by_torch(**keywords: object) -> dict:
    p = leaf()
    optimizer = torch.optim.AdamW([p], **RECIPE, **keywords)
    p.grad = draw(1, 3)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_a_state_dict_of_another_algorithm_is_refused(name: str) -> None:
    optimizer = FusedAdam([leaf()])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"{name}=True: FusedAdam takes False"):
        optimizer.load_state_dict(saved_by_torch(**{name: True}))
    assert optimizer.state_dict() == before


def test_a_state_of_another_shape_is_refused() -> None:
    optimizer = FusedAdam([draw(0, 4).requires_grad_()])
    with pytest.raises(ValueError, match=r"saved exp_avg of parameter 0 is \(3,\), .*: expected \(4,\)"):
        optimizer.load_state_dict(saved_by_torch())
    assert not optimizer.state


@pytest.mark.parametrize("keywords", [{"foreach": False}, {"fused": False}, {"capturable": True, "foreach": True}])
def test_a_state_dict_of_any_of_torchs_implementations_loads(keywords: dict) -> None:
    if "capturable" in keywords and DEVICE == "cpu":
        keywords = {"foreach": True}
    p = leaf()
    optimizer = FusedAdam([p], bias_correction=False)
    optimizer.load_state_dict(saved_by_torch(**keywords))
    assert optimizer.param_groups[0]["bias_correction"] is False, "what the saved group lacks is this optimizer's own"
    p.grad = draw(2, 3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def layouts(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters that are not contiguous but have no gaps in memory, and one that is contiguous."""
    conv = draw(0, 6, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    conv3d = draw(1, 4, 2, 3, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    pointwise = draw(2, 8, 4, 1, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    return [p.requires_grad_() for p in (conv, conv3d, pointwise, draw(3, 7, 9).to(dtype).T, draw(4, 7, 9).to(dtype))]


def set_gradients(params: list[Tensor], step: int, *, as_parameters: bool) -> None:
    for i, p in enumerate(params):
        grad = draw(10 * step + i, *p.shape).to(p.dtype)
        p.grad = torch.empty_like(p).copy_(grad) if as_parameters else grad


@pytest.mark.parametrize("as_parameters", [True, False], ids=["gradients alike", "gradients contiguous"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_parameters_of_other_strides_step_as_torchs(backend_name: str, as_parameters: bool) -> None:
    ours, theirs = layouts(), layouts()
    mine, peer = FusedAdam(ours, **RECIPE), torch.optim.AdamW(theirs, foreach=False, **RECIPE)
    with backend.use(backend_name, op="adam"):
        for step in range(1, 4):
            for params, optimizer in ((ours, mine), (theirs, peer)):
                set_gradients(params, step, as_parameters=as_parameters)
                optimizer.step()
        norm_squared = grad_norm_squared([p.grad for p in ours])
    exact = sum(p.grad.double().square().sum() for p in ours)
    assert abs(norm_squared - exact) <= 1e-6 * exact
    for p, q, fresh in zip(ours, theirs, layouts(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert p.stride() == fresh.stride() == mine.state[p]["exp_avg"].stride()
        torch.testing.assert_close(mine.state[p]["exp_avg_sq"], peer.state[q]["exp_avg_sq"], rtol=1e-6, atol=1e-7)


def test_state_of_other_strides_loads_into_the_parameters() -> None:
    ours, contiguous = layouts(torch.bfloat16), [p.detach().contiguous() for p in layouts(torch.bfloat16)]
    theirs = [p.requires_grad_() for p in contiguous]
    optimizers = [FusedAdam(params, master_weights=True, **RECIPE) for params in (ours, theirs)]
    for step in range(1, 5):
        if step == 3:  # each continues from the other's state
            saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(saved), strict=True):
                optimizer.load_state_dict(state)
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step, as_parameters=True)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert optimizers[0].state[p]["master"].stride() == p.stride()
        assert torch.equal(optimizers[0].state[p]["master"], optimizers[1].state[q]["master"])


def test_lists_of_different_strides_are_refused() -> None:
    last = draw(0, 2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    plain = draw(1, 2, 3, 4, 4)
    scalars = {"step": torch.zeros((), device=DEVICE), "lr": 0.1}
    with pytest.raises(ValueError, match=r"grads\[0\] has strides .*: expected the strides \(48, 1, 12, 3\) of params"):
        adam_step_([last], [plain], [last], [last], **scalars)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has strides \(48, 1, 12, 3\): expected contiguous"):
        adam_step_([plain], [plain], [last], [plain], **scalars)
    with pytest.raises(ValueError, match=r"params\[0\] has strides \(6, 2\): expected contiguous"):
        adam_step_(
            [torch.zeros(4, 6)[:, ::2]], [torch.zeros(4, 3)], [torch.zeros(4, 3)], [torch.zeros(4, 3)], **scalars
        )


def uncorrected_step(decoupled: bool, wide: torch.dtype, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> list[Tensor]:
    """Adam's step as apex writes it with bias_correction=False, in plain PyTorch."""
    p, g, m, v = (x.to(wide) for x in (p, g, m, v))
    (beta1, beta2), lr, decay = RECIPE["betas"], RECIPE["lr"], RECIPE["weight_decay"]
    if not decoupled:
        g = g + decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = m / (v.sqrt() + RECIPE["eps"])
    return [p - lr * (update + decay * p if decoupled else update), m, v]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_without_bias_correction(backend_name: str, decoupled: bool) -> None:
    """The third step is compared, because the correction would change it."""
    given = (draw(0, 333), draw(1, 333), draw(2, 333), draw(3, 333).square())
    exact, usual = (uncorrected_step(decoupled, wide, *given) for wide in (torch.float64, torch.float32))
    p, g, m, v = (x.clone() for x in given)
    options = {"decoupled": decoupled, "bias_correction": False, "step": torch.full((), 2.0, device=DEVICE)}
    with backend.use(backend_name, op="adam"):
        adam_step_([p], [g], [m], [v], **options, **RECIPE)
    for name, a, b, c in zip(("p", "exp_avg", "exp_avg_sq"), (p, m, v), usual, exact, strict=True):
        assert_no_worse(a, b, c, name)
    assert options["step"] == 3

    leaf = given[0].clone().requires_grad_()
    optimizer = FusedAdam([leaf], bias_correction=False, decoupled_weight_decay=decoupled, **RECIPE)
    zeros = torch.zeros_like(leaf, requires_grad=False)
    leaf.grad = given[1]
    with backend.use(backend_name, op="adam"):
        optimizer.step()
    torch.testing.assert_close(
        leaf.detach(), uncorrected_step(decoupled, torch.float32, *given[:2], zeros, zeros)[0], rtol=1e-6, atol=1e-6
    )


def test_without_bias_correction_under_compile() -> None:
    def step_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor) -> None:
        adam_step_([p], [g], [m], [v], step=step, bias_correction=False, **RECIPE)

    def fresh() -> list[Tensor]:
        return [draw(0, 9), draw(1, 9), draw(2, 9), draw(3, 9).square(), torch.zeros((), device=DEVICE)]

    eager, compiled = fresh(), fresh()
    step_(*eager)
    torch.compile(step_, fullgraph=True, backend="aot_eager")(*compiled)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
