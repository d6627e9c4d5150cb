"""Every entry of `phi_fast._C.cpu` refuses what its kernel cannot read. `make sanitize` runs this too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cpp_entries import Entry, entries
from torch import Tensor

from phi_fast._C import cpu
from phi_fast.kernels.cpp._tensors import Described, described

REFUSALS = (ValueError, TypeError, IndexError)
CONTROLS = {
    "isa",
    "supported_isas",
    "omitted_isas",
    "force_isa",
    "keep_freed_memory",
    "parallel_backend",
    "has_weight_gradient",
    "has_linear_cross_entropy",
}
"""Entries that take no tensor."""
ENTRIES = [entry for dtype in (torch.float32, torch.bfloat16) for entry in entries(dtype)]
NAMES = [f"{number}-{entry.name}" for number, entry in enumerate(ENTRIES)]
INT64, INT32 = 3, 4


def changed_descriptions(entry: Entry, name: str, good: Described) -> Iterator[tuple[str, Any]]:
    """Descriptions of a tensor that do not fit the call's other tensors, or are not descriptions."""
    address, dtype, sizes, strides = good[0], good[1], tuple(good[2]), tuple(good[3])
    others = [-1, 5, 2**31 - 1, INT32 if dtype == INT64 else INT64]
    if entry.same_dtype:
        others += [code for code in (0, 1, 2) if code != dtype]
    for code in others:
        yield f"dtype {code}", (address, code, sizes, strides)
    yield "no address", (0, dtype, sizes, strides)
    yield "an address alone", address
    yield "None", None
    yield "a stride too many", (address, dtype, sizes, (1, *strides))
    yield "a dim too many", (address, dtype, (2, *sizes), (1, *strides))
    for dim, size in enumerate(sizes):
        for other in (size + 1, size - 1, 0, -1, 2**62, 2**63 - 1):
            beyond = other < 0 or other > 2**61
            if beyond or ((name, dim) not in entry.free and (other or not entry.any_shape)):
                yield f"size {other} of dim {dim}", (address, dtype, (*sizes[:dim], other, *sizes[dim + 1 :]), strides)
        yield f"stride -1 of dim {dim}", (address, dtype, sizes, (*strides[:dim], -1, *strides[dim + 1 :]))
    if sizes:
        yield "last stride 2", (address, dtype, sizes, (*strides[:-1], 2))
    if sizes and (name, 0) not in entry.free and name != "scale":  # a scale without dims is valid for all rows
        yield "a dim too few", (address, dtype, sizes[1:], strides[1:])


def wrong_values(entry: Entry, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Invalid values for argument `name` instead of `value`."""
    optional = {"residual", "shifted", "shift", "residual_grad", "activation", "bias", "class_weight", "dbias"}
    optional |= {"master", "positions", "documents", "dhidden", "dweight"} - (
        {"positions"} if entry.arguments.get("offset") is None else set()
    )
    if isinstance(value, Tensor):
        for how, description in changed_descriptions(entry, name, described(entry.name, value)):
            if description is not None or name not in optional:
                yield f"{name}: {how}", description
    elif isinstance(value, list):
        # In a list of which any shape is allowed, the first tensor determines what the rest must be.
        for i, element in list(enumerate(value))[entry.any_shape :]:
            parts = element if isinstance(element, tuple) else (element,)
            for j, part in enumerate(parts):
                for how, other in changed_descriptions(entry, name, described(entry.name, part)):
                    whole = (*parts[:j], other, *parts[j + 1 :])
                    if other is None and j == 4:  # an optimizer without masters
                        continue
                    replaced = [*value[:i], whole if isinstance(element, tuple) else other, *value[i + 1 :]]
                    yield f"{name}[{i}][{j}]: {how}", replaced
    elif name == "threads":
        yield from ((f"threads {count}", count) for count in (0, -1, 2**31 - 1, 2**31))


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_what_does_not_fit_is_refused(entry: Entry) -> None:
    wrong = dict(entry.wrong)
    for name, value in entry.arguments.items():
        wrong |= {what: {name: other} for what, other in wrong_values(entry, name, value)}
    assert len(wrong) > 10
    taken = []
    for what, different in wrong.items():
        try:
            entry.call(**different)
            taken.append(what)
        except REFUSALS as error:
            assert str(error)
    assert not taken


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_what_fits_is_taken(entry: Entry) -> None:
    if entry.needs():
        entry.call()
    else:
        with pytest.raises(RuntimeError, match="not with the instruction set"):
            entry.call()


def test_every_entry_is_in_the_table() -> None:
    there = {name for name in dir(cpu) if not name.startswith("_")}
    assert there - CONTROLS == {entry.name for entry in ENTRIES}


def test_labels_beyond_the_vocabulary_give_nan_from_inside_it() -> None:
    (entry,) = (e for e in entries() if e.name == "cross_entropy" and e.arguments["scale"].dim())
    columns = entry.arguments["logits"].shape[1]
    losses = torch.zeros(5)
    labels = torch.tensor([columns, -1, 2**62, -(2**63), 0])
    entry.call(labels=labels, losses=losses)
    assert losses.isnan().tolist() == [True, True, True, True, False]
