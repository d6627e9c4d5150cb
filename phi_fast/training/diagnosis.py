"""Diagnosis of a diverged run: the first layer and op whose output or gradient was not finite, and the rows in it.

The step's micro-batches are run again with hooks on every module and autograd node. This costs one more step, once, at
the end of the run. The model is not changed: no gradient reaches its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data import TokenLoader
from ..errors import PhiFastError
from ..model.lora import merged_state
from ..model.merged import OUTSIDE, to_split
from ..model.phi import Block
from ..model.reference import ParallelBlock, ReferencePhi, rotary_cos_sin, within_documents
from .distributed import World
from .parameters import trained_weights

SLOWER = "--resume --allow-change with a lower --learning-rate"
"""Advice that works under every schedule. With a constant learning rate --allow-change would not be needed."""


class Diverged(PhiFastError, RuntimeError):
    """The run cannot go on: a loss that is not finite, or gradients that overflow at the lowest loss scale."""


@dataclass(frozen=True)
class Overflow:
    """The first tensor that was not finite."""

    what: str
    """Such as "the output of gelu in layers.2.mlp"."""
    forward: bool
    """True in the forward pass or in the weights, false in the backward pass."""
    rows: tuple[int, ...]
    """Rows of the micro-batch in which it is not finite; all rows if the tensor has no batch dimension."""
    largest: float
    """Its largest finite magnitude."""
    data: str = ""
    """The rank, the rows of the training stream, and their corpora."""


def find_overflow(
    model: nn.Module, loader: TokenLoader, micro_batches: int, scale: float, world: World
) -> Overflow | None:
    """Run the last `micro_batches` of `loader` again, with the loss times `scale`; every rank gets the same result.

    Returns None if everything was finite this time: then the sum over micro-batches or ranks overflowed.
    """
    loader.seek(loader.row - micro_batches * loader.batch * world.size)
    found = None
    for _ in range(micro_batches):
        batch = next(loader)
        if batch.trained == 0:
            continue  # it adds nothing to the loss, and has no mean of its own
        there = batch.to(world.device)
        found = first_overflow(model, there.input_ids, there.labels, scale, there.cu_seqlens)
        if found is not None:
            corpora = loader.mixture.components
            rows = ", ".join(f"{batch.rows[i]} ({corpora[int(batch.components[i])].name})" for i in found.rows)
            found = replace(found, data=f"on rank {world.rank}, rows {rows} of the training stream")
            break
    return next((each for each in world.gather(found) if each is not None), None)


def first_overflow(
    model: nn.Module, input_ids: Tensor, labels: Tensor, scale: float = 1.0, cu_seqlens: Tensor | None = None
) -> Overflow | None:
    """Find the first non-finite tensor in `model(input_ids, labels)` and the backward pass of loss × scale.

    A block of `Phi` is a single op, so it is run again as `reference.ParallelBlock` to find the op inside it. If plain
    PyTorch in the same dtype does not overflow, the block itself is reported.
    """
    batch = len(input_ids)
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Overflow(f"the weights of {name}, before the step", True, tuple(range(batch)), _largest(parameter))
    with Probe(model, batch, functions=isinstance(model, ReferencePhi)) as probe:
        loss = model(input_ids, labels, cu_seqlens=cu_seqlens).loss
        probe.look(loss, "the loss, from lm_head's logits", forward=True)
        probe.claim(loss, "lm_head and the loss")
    if probe.found is None:
        torch.autograd.grad(loss * scale, list(trained_weights(model).values()), allow_unused=True)
    if probe.found is not None and isinstance(probe.module, Block):
        inside = _inside(probe.module, probe.name, probe.inputs[probe.module], probe.gradient, cu_seqlens)
        return inside or probe.found
    return probe.found


class Probe(TorchFunctionMode):
    """Checks every module's output in `module`, and every gradient of the backward pass, until one is not finite.

    functions: check every torch function's result too. Not for the kernels, which allocate uninitialised memory.
    """

    def __init__(self, module: nn.Module, batch: int, *, functions: bool, prefix: str = "") -> None:
        super().__init__()
        self.found: Overflow | None = None
        self.module: nn.Module | None = None
        """The module it was found in."""
        self.name = ""
        self.gradient: Tensor | None = None
        """The gradient that entered the node whose gradients were not finite; None in the forward pass."""
        self.inputs: dict[nn.Module, Tensor] = {}
        """The first input of each module."""
        self._batch, self._functions = batch, functions
        self._names = {child: (prefix + name).rstrip(".") or "the model" for name, child in module.named_modules()}
        self._running: list[nn.Module] = []
        self._claimed: set[Any] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._begin))
            self._handles.append(module.register_forward_hook(self._end))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._functions and self._running and isinstance(result, Tensor):
            where = self._names[self._running[-1]]
            self.look(result, f"the output of {func.__name__} in {where}", forward=True, module=self._running[-1])
        return result

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._running.append(module)
        if inputs and isinstance(inputs[0], Tensor):
            self.inputs[module] = inputs[0]

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running.pop()
        if isinstance(output, Tensor):
            self.look(output, f"the output of {self._names[module]}", forward=True, module=module)
            self.claim(output, self._names[module], module)

    def look(
        self,
        tensor: Tensor,
        what: str,
        *,
        forward: bool,
        module: nn.Module | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        """Record `tensor` if it is the first that is not finite."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self.found is not None or not tensor.is_floating_point() or _finite(tensor):
                return
            rows = list(range(self._batch))
            if tensor.dim() > 1 and len(tensor) == self._batch:
                rows = [i for i in rows if not _finite(tensor[i])]
            self.found = Overflow(what, forward, tuple(rows), _largest(tensor))
            self.module, self.name, self.gradient = module, self._names.get(module, ""), gradient

    def claim(self, output: Tensor, where: str, module: nn.Module | None = None) -> None:
        """Check the gradients of the backward nodes behind `output`; those that are new are attributed to `where`."""
        waiting = [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._claimed or hasattr(node, "variable"):
                continue
            self._claimed.add(node)
            waiting += [next_node for next_node, _ in node.next_functions]

            def watch(computed: Any, incoming: Any, name: str = node.name()) -> None:
                op = name.rstrip("0123456789").removesuffix("Backward").lstrip("_")
                for tensor in computed:
                    if tensor is not None:
                        what = f"the gradient of {op} in {where}"
                        self.look(tensor, what, forward=False, module=module, gradient=incoming[0])

            node.register_hook(watch)


def _inside(block: Block, name: str, x: Tensor, gradient: Tensor | None, cu_seqlens: Tensor | None) -> Overflow | None:
    """Find the first non-finite tensor inside a block, from its input x (batch, sequence, d) and output gradient."""
    merged = {f"layers.0.{key}": value for key, value in merged_state(block).items()}
    split = to_split({**dict.fromkeys(OUTSIDE, x), **merged})
    layer = "model.layers.0."
    plain = ParallelBlock(block.config).to(x)
    plain.load_state_dict({key.removeprefix(layer): value for key, value in split.items() if key.startswith(layer)})
    x = x.detach().requires_grad_()
    with Probe(plain, len(x), functions=True, prefix=f"{name}.") as probe:
        visible = None if cu_seqlens is None else within_documents(cu_seqlens, *x.shape[:2])
        out = plain(x, *rotary_cos_sin(block.config, x.shape[1], x.device, x.dtype), visible)
    if probe.found is None and gradient is not None:
        torch.autograd.grad(out, [x, *plain.parameters()], gradient)
    return probe.found


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _largest(tensor: Tensor) -> float:
    return float(torch.nan_to_num(tensor.detach().float(), nan=0.0, posinf=0.0, neginf=0.0).abs().max())


def explain(
    found: Overflow | None, step: int, loss: float, scale: float, precision: str, checkpoint: Path | None
) -> str:
    """Write the message of a run that diverged in step `step`: what was found, and what to try."""
    text = f"step {step} cannot be taken: the loss is {loss:g}, "
    text += f"the loss scale {scale:g}. " if precision == "fp16" else f"in {precision}. "
    if found is None:
        text += "When run again, every micro-batch was finite: their sum overflowed, or the hardware made an error. "
    else:
        text += f"First non-finite tensor: {found.what} (largest finite value {found.largest:.3g}), {found.data}. "
    return text + f"This step updated nothing; {_kept(checkpoint)}. To try: {_advice(found, precision)}"


def explain_broken(model: nn.Module, step: int, lr: float, checkpoint: Path | None) -> str:
    """Write the message of a run whose update in step `step`, at learning rate `lr`, left a non-finite value."""
    broken = next((name for name, parameter in model.named_parameters() if not _finite(parameter)), None)
    what = f"the weights of {broken}" if broken else "an optimizer moment"
    return (
        f"the update of step {step}, at learning rate {lr:g}, left {what} not finite. It is not saved; "
        f"{_kept(checkpoint)}. To try: {SLOWER}"
    )


def _kept(checkpoint: Path | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def _advice(found: Overflow | None, precision: str) -> str:
    if found is not None and found.what.startswith("the weights"):
        return f"move the newest checkpoint away, and {SLOWER}"
    if precision == "fp16" and found is not None and found.forward:
        return f"--resume --precision bf16, or {SLOWER}; a lower loss scale does not help"
    if precision == "fp16":
        return f"--resume --precision bf16, --resume with a lower --min-loss-scale, or {SLOWER}"
    return f"{SLOWER}, --resume with a lower --gradient-clipping, or --resume --skip-spikes 6"
