"""Where the HIP device's data lies, and how it leaves: DLPack, pinned memory, copies on the communication queue."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pytrain import _native
from pytrain.checkpoint.parts import Part, Snapshot
from pytrain.collectives.copies import Copies
from pytrain.collectives.counters import Counters
from pytrain.collectives.device_memory import NOTHING, WHOLE, DeviceMemory, outside
from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Limits, Tools, Wire
from tests import runs
from tests.parallel.mailbox import Mailbox, MailboxTransport

ROCM, ROCM_HOST = 10, 11


@pytest.mark.parametrize(("dtype", "typestr"), [("fp32", "<f4"), ("bf16", "<u2"), ("fp16", "<u2")])
def test_mpi4py_takes_the_address(device: _native.Device, dtype: str, typestr: str) -> None:
    """By DLPack, which it prefers, and by the CUDA array interface; bfloat16 as uint16."""
    mpi = pytest.importorskip("mpi4py.MPI")
    buffer = _native.Buffer(device, 5, dtype, "gradients")
    assert buffer.__dlpack_device__() == (ROCM, 0)
    taken = mpi.buffer(buffer)
    assert (taken.address, taken.nbytes) == (buffer.address, buffer.array.nbytes)
    interface = buffer.__cuda_array_interface__
    assert (interface["data"], interface["shape"]) == ((buffer.address, False), (5,))
    assert interface["typestr"] == typestr


@pytest.mark.parametrize(("version", "name"), [(None, "dltensor"), ((1, 1), "dltensor_versioned")])
def test_a_capsule_keeps_its_buffer(device: _native.Device, version: tuple[int, int] | None, name: str) -> None:
    buffer = _native.Buffer(device, 7, "fp32", "weights")
    capsule = buffer.__dlpack__(stream=None, max_version=version)
    assert f'"{name}"' in repr(capsule)
    del buffer
    assert device.bytes_in_use("weights") == 28
    del capsule
    assert device.bytes_in_use("weights") == 0


def test_a_buffer_is_not_copied_to_be_lent(device: _native.Device) -> None:
    buffer = _native.Buffer(device, 7, "fp32", "weights")
    buffer.__dlpack__(dl_device=(ROCM, 0), copy=False)
    for wish in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="lent where it lies"):
            buffer.__dlpack__(**wish)


def test_what_mpi_may_be_handed(device: _native.Device) -> None:
    """A range in the middle of a buffer is the device's; pinned memory, a snapshot and NumPy's are not."""
    buffer = _native.Buffer(device, 100, "fp32", "weights")
    assert device.is_device_memory(buffer.array[40:60])
    pinned, snapshot = _native.PinnedBuffer(device, 64), _native.Buffer(device, 8, "bf16", "snapshot")
    for array in (pinned.array, snapshot.array, np.zeros(4, np.float32)):
        assert not device.is_device_memory(array)
    assert snapshot.__dlpack_device__() == (ROCM_HOST, 0)
    assert not hasattr(snapshot, "__cuda_array_interface__")
    assert not pinned.array.any()
    assert device.bytes_in_use("staging") == 64


def test_a_copy_is_done_when_it_was_waited_for(device: _native.Device, random: np.random.Generator) -> None:
    buffer, pinned = _native.Buffer(device, 50, "fp32", "gradients"), _native.PinnedBuffer(device, 200)
    buffer.array[:] = random.standard_normal(50)
    device.start_copy(pinned.array, buffer.array)
    assert not pinned.array.any()  # nobody has waited for it
    device.finish_copies()
    assert pinned.array.tobytes() == buffer.array.tobytes()
    with pytest.raises(_native.Error, match="holds 200 bytes"):
        device.start_copy(pinned.array, buffer.array[1:])


def test_steps_through_the_host(device: _native.Device, random: np.random.Generator) -> None:
    """The operation sees what is asked for, in host memory, and only what comes back is changed."""
    memory = DeviceMemory(device, "staged", Limits())
    buffer = _native.Buffer(device, 30, "fp32", "gradients")
    buffer.array[:] = random.standard_normal(30)
    before = buffer.array.copy()
    seen: list[Any] = []

    def steps(host: Any) -> Any:
        assert not device.is_device_memory(host)
        seen.append(host.copy())
        yield ["posted"]
        host[:] = np.arange(30)
        return "result"

    own = slice(10, 20)
    cpu = _native.CpuDevice(threads=1)
    wire = Wire(
        MailboxTransport(Mailbox(), 0), range(2), 0, 0, Tools(cpu, Staging(cpu), Limits()), Counters(), "test"
    )
    running = memory.through_host(wire, buffer.array, steps, (own,), outside(own, 30), "dp")
    assert isinstance(next(running), Copies)  # which nobody has waited for
    assert seen == []
    assert next(running) == ["posted"]
    back = next(running)
    assert isinstance(back, Copies)
    assert np.array_equal(buffer.array, before)
    back.wait()
    with pytest.raises(StopIteration, match="result"):
        next(running)
    assert np.array_equal(seen[0][own], before[own])
    wanted = np.arange(30, dtype=np.float32)
    wanted[own] = before[own]
    assert np.array_equal(buffer.array, wanted)
    held = device.bytes_in_use("staging")
    list(memory.through_host(wire, buffer.array, lambda host: iter(()), WHOLE, NOTHING, "dp"))  # type: ignore[arg-type,return-value]
    assert device.bytes_in_use("staging") == held  # the buffer was kept


def test_a_snapshot_is_filled_by_the_communication_queue(device: _native.Device, random: np.random.Generator) -> None:
    """Training may change the originals once `settle` has returned, and not before."""
    buffer = _native.Buffer(device, 40, "fp32", "weights")
    buffer.array[:] = random.standard_normal(40)
    before = buffer.array.copy()
    room = _native.Buffer(device, 80, "bf16", "snapshot")
    snapshot = Snapshot(room.array.view(np.uint8), device.start_copy, device.finish_copies)
    raw = buffer.array.view(np.uint8)
    assert snapshot.take("a", Part("x", 0, raw[:80]))
    assert snapshot.take("b", Part("y", 0, raw[80:]))
    assert not room.array.any()
    snapshot.settle()
    buffer.array[:] = 0
    assert snapshot.parts["a"][0].data.tobytes() + snapshot.parts["b"][0].data.tobytes() == before.tobytes()


def test_an_asynchronous_checkpoint_holds_what_the_device_did(tmp_path: Path) -> None:
    """Each tensor of step 1, which a thread wrote from the snapshot while step 2 ran, as a run on the CPU has it."""
    corpora = runs.make_corpora(tmp_path / "corpora")
    saved: dict[str, dict[str, Any]] = {}
    for name in ("cpu", "hip"):
        folder = tmp_path / name
        runs.quiet_train(runs.configuration(corpora, folder, run__steps=2, run__device=name, checkpoint__every=1))
        files = sorted((folder / "checkpoints" / "step-000001").glob("*.safetensors"))
        saved[name] = {key: value for path in files for key, value in load_file(path).items()}
    assert len(saved["cpu"]) > 20
    assert saved["hip"].keys() == saved["cpu"].keys()
    for key, wanted in saved["cpu"].items():
        assert np.linalg.norm(saved["hip"][key] - wanted) <= 1e-4 * np.linalg.norm(wanted), key
