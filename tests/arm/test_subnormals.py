"""Subnormals on Arm: flushed on the threads of a native call, and neither before nor after it."""

from __future__ import annotations

import json

import pytest

from tests.arm.machine import Machine

PROGRAM = """
import ctypes, json, threading
import numpy as np
from pytrain._native import CpuDevice, kernels

FLUSH = 1 << 24  # FPCR.FZ
library = ctypes.CDLL("libm.so.6")

def flushing():
    environment = (ctypes.c_uint32 * 2)()  # FPCR and FPSR
    assert library.fegetenv(environment) == 0
    return bool(environment[0] & FLUSH)

def another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(flushing()))
    thread.start()
    thread.join()
    return found[0]

tiny = np.full(100_000, 1e-40, np.float32)
def kept():
    return bool((tiny + tiny > tiny).all())

facts = {"before": [flushing(), another_thread(), not kept()]}
for threads in (1, 3):
    device, total = CpuDevice(kernels.chosen(), threads), tiny.copy()
    device.add(total, tiny)
    facts[f"inside, {threads}"] = int(np.count_nonzero(total))
    product = np.full((64, 64), 7, np.float32)
    device.matmul(product, np.full((64, 1), 1e-20, np.float32), np.full((1, 64), 1e-20, np.float32))
    facts[f"product, {threads}"] = int(np.count_nonzero(product))
    facts[f"after, {threads}"] = [flushing(), another_thread(), not kept()]
print(json.dumps(facts))
"""


@pytest.mark.parametrize("cpu", ["a64fx", "neoverse-n1"])
def test_they_are_flushed_inside_native_calls_alone(arm: Machine, cpu: str) -> None:
    facts = json.loads(arm.run(cpu, "-c", PROGRAM, settings={"OMP_NUM_THREADS": "3"}).splitlines()[-1])
    for when, found in facts.items():
        if when.startswith(("inside", "product")):
            assert found == 0, f"{when} threads: a subnormal was kept"
        else:
            assert found == [False] * 3, f"{when}: the process flushes (main thread, a new thread, sums of NumPy)"
