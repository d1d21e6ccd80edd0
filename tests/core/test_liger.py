"""Liger's own kernels, run by Triton's interpreter on a CPU: needs `pip install liger-kernel triton`, else skipped."""

import importlib.util

import pytest

MISSING = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
INTERPRETED = """
import numpy, sys, triton.language as tl, triton.runtime.interpreter as interpreter

# Two things that the interpreter cannot do: numbers as arguments, of which a kernel asks `.to(...)`, and libdevice.
convert = interpreter._implicit_cvt
def with_floats(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32), tl.float32)
    return convert(value)
interpreter._implicit_cvt = with_floats
import liger_kernel.ops.geglu, liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)
liger_kernel.ops.geglu.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0
import tiny, test_training_math as t

family, settings = sys.argv[1], eval(sys.argv[2])
for setting in settings:
    data, arguments = t.SETTINGS[setting]
    model = tiny.model(family, ln_scaling=True)
    got = t.trained(model, data, "out", use_liger_kernel=True, **arguments)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    bound = [getattr(norm, "_bound_forward", None) or norm.forward.__func__ for norm in norms]
    assert norms and all(one.__module__.startswith("liger_kernel") for one in bound), bound
    reference = t.with_hooked_norms(tiny.model(family), tiny.FAMILIES[family][2], t.SCALES)
    expected = t.trained(reference, data, "out", **arguments)
    print(abs(got[0] - expected[0]), t.distance(got[1], expected[1]) / t.size(expected[1]))
"""


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", ["padding", "packing", "completion_only_loss", "gradient checkpointing"]), ("gemma2", ["padding"])],
)
def test_a_step_with_use_liger_kernel(family, settings, run_python, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported: in a process of its own
    printed = run_python(INTERPRETED, family, settings, plugin=True).split("\n")
    found = [list(map(float, line.split())) for line in printed if line and line[0].isdigit()]
    assert len(found) == len(settings)
    for loss, gradients in found:
        assert loss < 1e-5
        assert gradients < 1e-4
