"""parallel_block against float64 beside a plain PyTorch block, and its cost: products, copies, bytes kept."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_no_worse, double, gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from phi_fast.kernels import backend, fuse_rotary, parallel_block, rotary_table, use

GPU = torch.cuda.is_available()
BACKENDS = ("auto", "reference") if GPU else ("auto", "reference", "triton")
ROTARY = {"triton, RoPE inside": ("triton", True), "auto, RoPE before": ("auto", False)}
"""The other choice of `fuse_rotary` for each back end that can apply RoPE inside attention."""
LEVELS = ("none", "norm_gelu", "all")
NAMES = ("norm_weight", "norm_bias", "in_weight", "in_bias", "out_weight", "out_bias_attention", "out_bias_mlp")


def make(batch: int, sequence: int, heads: int, mlp: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    d = 64 * heads
    generator = torch.Generator().manual_seed(sequence)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors = {
        "x": 2 * draw(batch, sequence, d),
        "norm_weight": 1 + 0.1 * draw(d),
        "norm_bias": 0.1 * draw(d),
        "in_weight": draw(3 * d + mlp, d) * d**-0.5,
        "in_bias": 0.5 * draw(3 * d + mlp),
        "out_weight": draw(d, d + mlp) * (d + mlp) ** -0.5,
        "out_bias_attention": 0.5 * draw(d),
        "out_bias_mlp": 0.5 * draw(d),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def ours(recompute: str = "norm_gelu"):
    def block(x: Tensor, **parameters: Tensor) -> Tensor:
        cos, sin = rotary_table(x.shape[1] + 3, 32, device=x.device)
        return parallel_block(x, **parameters, cos=cos, sin=sin, num_heads=x.shape[-1] // 64, recompute=recompute)

    return block


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with 32 rotated dims: (batch, heads, sequence, 64) -> (batch, sequence, heads * 64)."""
    c, s = (table.to(q.dtype) for table in rotary_table(q.shape[2], 32, device=q.device))

    def rotate(t: Tensor) -> Tensor:
        a, b, rest = t.split((16, 16, 32), -1)
        return torch.cat((a * c - b * s, b * c + a * s, rest), -1)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True).transpose(1, 2).flatten(2)


def plain(x: Tensor, starts: tuple[int, ...] | None = None, **p: Tensor) -> Tensor:
    """The block as most models implement it: one Linear after the other, in x's dtype. Each document, from one of
    `starts` to the next, is attended to alone."""
    batch, sequence, d = x.shape
    h = F.layer_norm(x, (d,), p["norm_weight"], p["norm_bias"])
    sizes = [d, d, d, p["in_bias"].shape[0] - 3 * d]
    parts = zip(p["in_weight"].split(sizes), p["in_bias"].split(sizes), strict=True)
    q, k, v, u = (F.linear(h, w, b) for w, b in parts)
    q, k, v = (t.view(batch, sequence, -1, 64).transpose(1, 2) for t in (q, k, v))
    documents = itertools.pairwise(starts or (0, sequence))
    o = torch.cat([attend(*(t[:, :, a:b] for t in (q, k, v))) for a, b in documents], 1)
    dense, fc2 = p["out_weight"].split((d, sizes[3]), 1)
    attention = F.linear(o, dense, p["out_bias_attention"])
    return attention + F.linear(F.gelu(u, approximate="tanh"), fc2, p["out_bias_mlp"]) + x


def upstream(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.device, x.dtype)


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("choice", [*BACKENDS, *ROTARY])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "sequence", "heads", "mlp"), [(2, 9, 1, 96), (1, 17, 2, 512)])
def test_error_forward_and_gradients(choice, dtype, batch, sequence, heads, mlp, device):
    inputs = make(batch, sequence, heads, mlp, dtype, device)
    dout = upstream(inputs["x"])
    name, inside = ROTARY.get(choice, (choice, None))
    with use(name), fuse_rotary(inside):
        actual = gradients(ours(), inputs, dout)
    expected, exact = gradients(plain, inputs, dout), gradients(plain, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


STARTS = (0, 5, 6, 17)
"""Starts of the documents in a packed row, and its end; one document is a single token."""


@pytest.mark.interpreted_in_bf16
@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_documents_are_blocks_of_their_own(choice, dtype, level, device):
    """The output is that of each document alone, and every gradient is the sum over the documents."""
    inputs = make(1, STARTS[-1], 2, 96, dtype, device)
    dout = upstream(inputs["x"])
    cu_seqlens = torch.tensor(STARTS, dtype=torch.int32, device=device)

    def packed(x: Tensor, **parameters: Tensor) -> Tensor:
        cos, sin = rotary_table(x.shape[1], 32, device=x.device)
        options = {"num_heads": 2, "recompute": level, "cu_seqlens": cu_seqlens}
        return parallel_block(x, **parameters, cos=cos, sin=sin, **options)

    def apart(x: Tensor, **parameters: Tensor) -> Tensor:
        return torch.cat([plain(x[:, a:b], **parameters) for a, b in itertools.pairwise(STARTS)], 1)

    def joined(x: Tensor, **parameters: Tensor) -> Tensor:
        return plain(x, STARTS, **parameters)  # sums a weight's gradient over all documents in one product, too

    with use(choice):
        actual = gradients(packed, inputs, dout)
    expected, exact = gradients(joined, inputs, dout), gradients(apart, double(inputs), dout)
    for name in actual:
        assert_no_worse(actual[name], expected[name], exact[name], name)


def test_fuse_rotary_chooses_who_rotates(device):
    """Checks the default of each back end, each choice, and that the earlier choice returns afterwards."""
    on = torch.device(device)
    before = backend.rotary_inside(on)
    assert before is not GPU
    with fuse_rotary(not before):
        assert backend.rotary_inside(on) is not before
    assert backend.rotary_inside(on) is before
    with use("sdpa", op="attention"):
        assert not backend.rotary_inside(on)
        with fuse_rotary(True), pytest.raises(ValueError, match="'sdpa' cannot apply RoPE inside attention"):
            backend.rotary_inside(on)


def test_documents_need_one_row(device):
    inputs = make(2, 9, 1, 96, torch.float32, device)
    cos, sin = rotary_table(9, 32, device=device)
    documents = torch.tensor([0, 9], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1, not 2"):
        parallel_block(**inputs, cos=cos, sin=sin, num_heads=1, cu_seqlens=documents)


@pytest.mark.parametrize("choice", BACKENDS)
def test_recompute_levels_and_repeated_runs_agree_bit_for_bit(choice, device):
    inputs = make(1, 9, 1, 64, torch.float32, device)
    dout = upstream(inputs["x"])
    with use(choice):
        first, *others = (gradients(ours(level), inputs, dout) for level in ("norm_gelu", *LEVELS))
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("level", LEVELS)
def test_frozen_parameters_change_no_other_gradient(level, device):
    inputs = make(2, 9, 1, 64, torch.float32, device)
    dout = upstream(inputs["x"])
    every = gradients(ours(level), inputs, dout)
    for wanted in (*((name,) for name in inputs), ("in_bias", "out_bias_mlp"), NAMES[2:5]):
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in inputs.items()}
        ours(level)(**leaves).backward(dout)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, every[name]), name


def test_torchs_activation_checkpointing_changes_no_bit(device):
    inputs = make(2, 9, 1, 64, torch.float32, device)
    dout = upstream(inputs["x"])

    def checkpointed(**leaves):
        return checkpoint(lambda: ours()(**leaves), use_reentrant=False)

    plain_run, again = gradients(ours(), inputs, dout), gradients(checkpointed, inputs, dout)
    assert all(torch.equal(plain_run[name], again[name]) for name in plain_run)


def test_frozen_parameters_cost_no_product(device):
    counts = {}
    for wanted in (("x", *NAMES), ("x",), ("in_weight",), ("out_weight",), ("norm_bias",), ("out_bias_mlp",)):
        leaves = {n: t.requires_grad_(n in wanted) for n, t in make(1, 9, 1, 64, torch.float32, device).items()}
        out = ours()(**leaves)
        with Ledger() as ledger:
            out.backward(upstream(out))
        counts[wanted] = ledger.products
    assert list(counts.values()) == [4, 2, 2, 1 + 1, 2, 1]


def test_the_two_output_biases_do_not_share_a_gradient(device):
    leaves = {name: t.requires_grad_() for name, t in make(1, 5, 1, 64, torch.float32, device).items()}
    ours()(**leaves).sum().backward()
    a, b = leaves["out_bias_attention"].grad, leaves["out_bias_mlp"].grad
    assert torch.equal(a, b)
    a.zero_()
    assert b.abs().sum() > 0


def test_inference_and_autocast_change_nothing(device):
    inputs = make(1, 9, 1, 64, torch.float32, device)
    expected = gradients(ours(), inputs, upstream(inputs["x"]))
    with torch.no_grad():
        assert torch.equal(ours()(**inputs), expected["out"])
    with torch.autocast(device, dtype=torch.bfloat16):
        within = gradients(ours(), inputs, upstream(inputs["x"]))
    for name, value in expected.items():
        assert torch.equal(value, within[name]), name


def test_strided_input_and_expanded_gradient(device):
    inputs = make(2, 9, 1, 64, torch.float32, device)
    expected = gradients(ours(), inputs, torch.ones_like(inputs["x"]))
    x = torch.stack((inputs["x"], inputs["x"]), -1)[..., 0].requires_grad_()
    out = ours()(**(inputs | {"x": x}))
    out.sum().backward()
    assert torch.equal(out, expected["out"])
    assert torch.equal(x.grad, expected["x"])


VIEWS = {
    "view",
    "_unsafe_view",
    "slice",
    "t",
    "permute",
    "transpose",
    "unsqueeze",
    "split",
    "as_strided",
    "detach",
    "alias",
    "expand",
}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided"}


class Ledger(TorchDispatchMode):
    """Counts matrix products; lists kernels by name, and other ops that write at least d numbers per token."""

    def __init__(self, large: int = 9 * 64) -> None:
        super().__init__()
        self.large, self.products, self.others, self.kernels = large, 0, [], []
        self.inside, self.stack = False, contextlib.ExitStack()

    def __enter__(self):
        real = backend.implementation

        def implementation(op, device):
            module = real(op, device)
            names = [name for name in ("forward", "backward", "rotate_", "product") if hasattr(module, name)]
            listed = {name: self._listed(f"{op}.{name}", getattr(module, name)) for name in names}
            return SimpleNamespace(**{**vars(module), **listed})

        patch = pytest.MonkeyPatch()
        patch.setattr(backend, "implementation", implementation)
        self.stack.callback(patch.undo)
        return super().__enter__()

    def __exit__(self, *error):
        self.stack.close()
        return super().__exit__(*error)

    def _listed(self, name, primitive):
        def run(*args, **kwargs):
            product = name == "weight_gradient.product"  # by any back end
            self.products += product
            self.kernels.append("product" if product else name)
            self.inside = True
            try:
                return primitive(*args, **kwargs)
            finally:
                self.inside = False

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.inside:
            if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"):
                self.products += 1
                self.kernels.append("product")
            elif name == "sum":
                self.kernels.append("column sums")
            elif name not in VIEWS | ALLOCATIONS:
                written = result if isinstance(result, Tensor) else None
                if written is not None and written.numel() >= self.large:
                    self.others.append(name)
        return result


@pytest.mark.parametrize(
    "attention",
    ["auto", pytest.param("sdpa", marks=pytest.mark.skipif(GPU, reason="torch's FlashAttention takes 16 bits"))],
)
@pytest.mark.parametrize("level", LEVELS)
def test_two_products_forward_four_backward_and_nothing_between(level, attention, device):
    """The dispatcher sees no op outside the kernels that writes a (tokens, ...) tensor. This project's attention can
    apply RoPE while loading; for torch's, q and k are rotated first."""
    leaves = {name: t.requires_grad_() for name, t in make(1, 9, 1, 64, torch.float32, device).items()}
    dout = upstream(leaves["x"])
    with use(attention, op="attention"), fuse_rotary(True if attention == "auto" else None):
        with Ledger() as forward:
            out = ours(level)(**leaves)
        with Ledger() as backward:
            out.backward(dout)
    # The two biases share one gradient tensor, which autograd copies for the second: (d,) numbers.
    assert forward.others == []
    assert backward.others == []
    rotary = ["rotary.rotate_"] if attention == "sdpa" else []
    ahead = ["layer_norm.forward", "product", *rotary, "attention.forward", "bias_gelu.forward"]
    assert forward.kernels == [*ahead, "product"]
    again = ["layer_norm.forward"] if level == "norm_gelu" else []
    assert backward.kernels == [
        *(ahead if level == "all" else []),
        *("product", "attention.backward", *rotary, "bias_gelu.backward"),
        *("product", "column sums", *again, "product", "column sums"),
        *("product", "layer_norm.backward"),
    ]
    assert forward.products == 2
    assert backward.products == (5 if level == "all" else 4)


@pytest.mark.skipif(GPU, reason="the profiler's own names are those of the CPU")
def test_products_on_row_strided_slices_copy_nothing():
    """The profiler, which sees inside the products, shows that none of them makes an operand contiguous."""
    leaves = {name: t.requires_grad_() for name, t in make(2, 32, 1, 256, torch.float32, "cpu").items()}
    dout = upstream(leaves["x"])
    with use("cpp"), use("reference", op="attention"), torch.profiler.profile(record_shapes=True) as profile:
        ours()(**leaves).backward(dout)
    products = [event for event in profile.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    copies = [
        (product.name, child.input_shapes[0])
        for product in products
        for child in product.cpu_children
        if child.name in ("aten::copy_", "aten::clone", "aten::contiguous")
    ]
    assert len(products) == 6
    # On a CPU addmm first writes its bias, a broadcast row, to the output; no operand is copied.
    assert copies == [("aten::addmm", [64, 448])]


def kept_bytes(model, *inputs: Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward, each counted once, without parameters."""
    ours = {p.untyped_storage().data_ptr() for p in model.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs[0]()
    return sum(kept.values())


@pytest.mark.parametrize(("level", "numbers"), [("none", 14), ("norm_gelu", 9), ("all", 1)])
def test_bytes_kept_for_backward(level, numbers, device):
    """Counted in units of d numbers per token, x included; mean, rstd, log-sum-exp and the rotary table are small."""
    leaves = {name: t.requires_grad_() for name, t in make(1, 32, 2, 512, torch.float32, device).items()}
    alive = []
    kept = kept_bytes({n: t for n, t in leaves.items() if n != "x"}, lambda: alive.append(ours(level)(**leaves)))
    small = (0 if level == "all" else 4 * 32 * (2 + 2)) + 2 * 4 * 35 * 16
    assert kept == numbers * 32 * 128 * 4 + small


def good() -> dict:
    cos, sin = rotary_table(8, 32)
    return {**make(1, 5, 2, 64, torch.float32, "cpu"), "cos": cos, "sin": sin, "num_heads": 2}


BAD = [
    ({"recompute": "most"}, ValueError, "recompute='most'; expected one of 'none', 'norm_gelu', 'all'"),
    ({"x": torch.zeros(5, 128)}, ValueError, r"x has shape \(5, 128\); expected \(batch, sequence, d\)"),
    ({"x": torch.zeros(1, 5, 128).int()}, TypeError, "x is torch.int32"),
    ({"x": torch.zeros(1, 5, 128).half()}, TypeError, "norm_weight is torch.float32 and x is torch.float16"),
    ({"x": torch.zeros(1, 9, 128)}, ValueError, "cos has 8 positions for a sequence of 9"),
    ({"num_heads": 3}, ValueError, "num_heads=3 does not divide x's last dim 128"),
    ({"in_weight": torch.zeros(384, 128)}, ValueError, "in_weight has 384 rows; expected 3d"),
    ({"out_weight": torch.zeros(128, 190)}, ValueError, r"out_weight has shape \(128, 190\); expected \(128, 192\)"),
    ({"out_weight": torch.zeros(192, 128).T}, ValueError, r"out_weight has strides \(1, 128\); expected it contig"),
    ({"in_bias": torch.zeros(448, device="meta")}, ValueError, "in_bias is on meta and x is on cpu"),
    ({"sin": torch.zeros(8, 15)}, ValueError, r"sin has shape \(8, 15\)"),
    ({"cos": torch.zeros(8, 16).half()}, TypeError, "cos is torch.float16; expected float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        parallel_block(**(good() | change))
