"""The switch between back ends: what runs where, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from phi_fast.kernels import BackendUnavailable, backend, bias_gelu, in_use, use


def test_auto_is_a_fixed_choice_by_device():
    assert in_use("cuda") == {**dict.fromkeys(backend.OPS, "triton"), "weight_gradient": "reference"}
    assert set(in_use("cpu").values()) == {"cpp"}


def test_use_switches_all_or_one_and_takes_it_back():
    before = in_use("cpu")
    with use("reference"):
        assert set(in_use("cpu").values()) == {"reference"}
        with use("triton", op="attention"):
            assert in_use("cpu") == {
                **dict.fromkeys((*backend.OPS, *backend.PRODUCTS), "reference"),
                "attention": "triton",
            }
        assert in_use("cpu")["attention"] == "reference"
    assert in_use("cpu") == before


def test_triton_leaves_matrix_products_to_torch():
    with use("triton"):
        assert in_use("cpu") == {**dict.fromkeys(backend.OPS, "triton"), "weight_gradient": "reference"}
    assert in_use("cpu")["weight_gradient"] == "cpp"


def test_use_without_with_holds_until_the_next():
    before = in_use("cpu")
    use("reference", op="rotary")
    assert in_use("cpu")["rotary"] == "reference"
    use("auto", op="rotary")
    assert in_use("cpu") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cuda",), "backend 'cuda' is not one of auto, triton"),
        (("triton", "softmax"), "op 'softmax' is not one of rotary"),
        (("sdpa",), "offers only op='attention', not op=None"),
        (("triton", "weight_gradient"), "backend 'triton' has no op='weight_gradient': matrix products are torch's"),
        (("apex", "rotary"), "offers only op='layer_norm' or op='adam', not op='rotary'"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        use(*arguments)


def test_a_back_end_that_cannot_run_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use("triton", op="bias_gelu"), pytest.raises(BackendUnavailable, match="Set TRITON_INTERPRET=1"):
        bias_gelu(torch.zeros(1, 2))
    with use("cpp", op="bias_gelu"), pytest.raises(BackendUnavailable, match=r"these are on meta; use\('triton'"):
        backend.implementation("bias_gelu", torch.device("meta"))


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.5.5", False), ("3.8.1", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.10.0", True)],
)
def test_an_interpreter_that_numpy_breaks_is_refused_before_it_runs(triton, numpy, works, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton)
    monkeypatch.setattr(np, "__version__", numpy)
    with use("triton", op="bias_gelu"):
        if works:
            backend.implementation("bias_gelu", torch.device("cpu"))
        else:
            with pytest.raises(BackendUnavailable, match=r"does not work with numpy .*pip install 'numpy<2\.4'"):
                backend.implementation("bias_gelu", torch.device("cpu"))


def test_import_needs_neither_triton_nor_a_gpu():
    """Importing works when triton cannot be imported and every query to CUDA is an error."""
    script = """
import sys
sys.modules["triton"] = None
import torch
def refuse(*_, **__): raise AssertionError("asked for a GPU")
for name in ("is_available", "device_count", "get_device_capability", "current_device", "init"):
    setattr(torch.cuda, name, refuse)
import phi_fast, phi_fast.kernels, phi_fast.model
model = phi_fast.Phi(phi_fast.PhiConfig.preset("phi-tiny").replace(num_hidden_layers=1, vocab_size=64))
ids = torch.zeros(1, 4, dtype=torch.int64)
model(ids, labels=ids).loss.backward()
assert not [name for name in sys.modules if name.startswith("triton.")]
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_folder_is_empty_under_its_own_name():
    """In the repository's root transformers imports the folder as another package: no op is registered twice."""
    script = """
import sys
import phi_fast
import kernels
import transformers.integrations.hub_kernels
assert kernels.__file__.startswith(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("kernels.")]
"""
    root = Path(backend.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
