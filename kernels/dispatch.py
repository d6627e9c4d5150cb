"""Which calls run kernels on addresses, and which torch must see as one op of its library.

A kernel reads and writes memory behind torch's back. That is right for tensors that have memory, while nobody records
or transforms what happens. In every other case the call goes to the op registered with torch.library, which torch's
dispatcher handles as one of its own: it computes shapes under FakeTensorMode, records one node under make_fx and
torch.jit.trace, loops under vmap. What neither can do is refused here, before an address is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C
_KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_WITH_MEMORY = 0
for _key in _KEYS:
    _WITH_MEMORY |= _C.DispatchKeySet(getattr(_C.DispatchKey, _key)).raw_repr()
"""The dispatch keys that a tensor may have whose elements lie, as they are, at its address."""

_TRACERS = (_C._TorchDispatchModeKey.FAKE, _C._TorchDispatchModeKey.PROXY, _C._TorchDispatchModeKey.FUNCTIONAL)
_DERIVATIVES = (_C._functorch.TransformType.Grad, _C._functorch.TransformType.Jvp)


def readable(x: Tensor) -> bool:
    """Whether x's elements lie at its address: no fake, meta, batched or sparse tensor, no wrapper around others, no
    view that torch negates when it reads it."""
    return not _C._dispatch_keys(x).raw_repr() & ~_WITH_MEMORY


def by_library(op: str, **arguments: Tensor | Sequence[Tensor] | None) -> bool:
    """Whether this call of `op` must go to the op registered with torch.library.

    arguments: every tensor, list of tensors or None that the op takes, by name.

    Raises TypeError, naming the argument and the way out, for what is no tensor and for a tensor that the op cannot
    take in any way (DTensor, sparse, nested); ValueError for one whose storage was freed; NotImplementedError under
    torch.func.grad, torch.func.jvp and forward-mode differentiation.
    """
    if torch.compiler.is_compiling():
        return True
    result = _traced(op)
    for name, tensor in _named(arguments):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if not readable(tensor):
            _refuse(op, name, tensor)
            result = True
        elif tensor.numel() and not tensor.data_ptr():
            raise ValueError(
                f"{op}: the storage of {name} {tuple(tensor.shape)} has been freed, as FSDP and ZeRO do between two "
                "uses of a parameter; gather it first"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise _no_forward_mode(op)
    return result


def backward_by_library(op: str, *grads: Tensor | None) -> bool:
    """`by_library` for the backward pass of an autograd.Function, whose incoming gradients are `grads`.

    Also True with create_graph=True (gradients are then enabled inside a backward): the library's backward op knows its
    own derivative, or that it has none (`once`).
    """
    return torch.is_grad_enabled() or by_library(op, grad=[grad for grad in grads if grad is not None])


def once(op: str, backward_op: Any) -> None:
    """Let differentiating the custom op `backward_op`, the gradient of `op`, raise NotImplementedError.

    Without it the second derivative would be left out of the sum in silence.
    """

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise _twice(op)

    backward_op.register_autograd(refuse)


def constants(op: str, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of `op` that no graph leads to, ready to be returned from a backward with create_graph=True:
    differentiating them raises as `once` says."""
    if not torch.is_grad_enabled():
        return list(grads)
    anchor = torch.empty(0, requires_grad=True, device="cpu")
    return [None if grad is None else _Constant.apply(op, grad.detach(), anchor) for grad in grads]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, grad, anchor):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise _twice(ctx.op)


def _twice(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op} can be differentiated once, and this needs its second derivative: a backward pass went through "
        "gradients that were made with create_graph=True. Detach those gradients, or use PyTorch's own functions"
    )


def _named(arguments: dict[str, Tensor | Sequence[Tensor] | None]) -> Iterable[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", tensor) for i, tensor in enumerate(value))
        elif value is not None:
            yield name, value


def _traced(op: str) -> bool:
    if _C._are_functorch_transforms_active():
        for interpreter in _C._functorch.get_interpreter_stack() or ():
            if interpreter.key() in _DERIVATIVES:
                raise NotImplementedError(
                    f"{op} cannot be differentiated by torch.func (grad, vjp, jvp, jacrev, hessian): use "
                    "torch.autograd.grad, or PyTorch's own functions. torch.func.vmap can be used"
                )
        return True
    if _C._len_torch_dispatch_stack() and any(_C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return True
    return torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0 or torch.jit.is_tracing()


def _refuse(op: str, name: str, x: Tensor) -> None:
    """Raise for what torch's dispatcher would hand to the kernel as it is, or refuse without a way out."""
    way_out: Callable[[str], str] | None = None
    if hasattr(x, "to_local"):  # DTensor, without importing torch.distributed
        kind, way_out = "a DTensor", "pass {0}.to_local(), and put the result back with DTensor.from_local".format
    elif x.is_nested:
        kind, way_out = "a nested tensor", "pass its rows one by one, or {0}.to_padded_tensor(0.0)".format
    elif x.layout is not torch.strided:
        kind, way_out = f"a tensor of layout {x.layout}", "pass {0}.to_dense()".format
    if way_out is not None:
        raise TypeError(f"{op}: {name} is {kind}; expected a plain tensor: {way_out(name)}")


def _no_forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op} has no forward-mode derivative: use reverse mode (torch.autograd.grad), or PyTorch's own functions"
    )
