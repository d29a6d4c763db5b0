"""`pytrain info`: one block about this installation and this machine, to paste into a bug report."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from pytrain.errors import UserError
from pytrain.native import native

LIBRARIES = (
    "numpy",
    "ml_dtypes",
    "sentencepiece",
    "safetensors",
    "tokenizers",
    "zstandard",
    "rich",
    "click",
    "pydantic",
    "mpi4py",
)
A64FX_GROUPS, A64FX_CORES = 4, 12
NOT_INSTALLED = "not installed"
UNKNOWN = "unknown"


def report(more: Mapping[str, str] | None = None) -> str:
    """The block: one `name: value` per line, and `more` of them at the end."""
    facts = {
        "pytrain": f"{version()}, commit {commit()}",
        "Python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or UNKNOWN,
        "CPU": cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} in the affinity mask, {os.cpu_count()} on the machine",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "caches": caches(),
        "core groups": core_groups(),
        "vectors": vectors(),
        **choices(),
        "memory": memory(),
        "PYTRAIN_ISA": os.environ.get("PYTRAIN_ISA", "not set"),
        **native_facts(),
        "libraries": ", ".join(f"{name} {number}" for name, number in library_versions().items()),
        "MPI": mpi_library(),
        **(more or {}),
    }
    width = max(map(len, facts)) + 1
    return "\n".join(f"{name + ':':{width}} {value}" for name, value in facts.items())


def version() -> str:
    """Version of the installed package."""
    try:
        return metadata.version("pytrain")
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def commit() -> str:
    """Commit of the source tree that this package is imported from; marked where the tree has changes."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return f"{UNKNOWN} (not run from a source tree)"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{UNKNOWN} (git: {error.strerror})"
    return found.stdout.strip() or f"{UNKNOWN} (git: {found.stderr.strip()})"


def library_versions() -> dict[str, str]:
    """Version of each library that a run may touch, without importing any."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = NOT_INSTALLED
    return versions


def native_facts() -> dict[str, str]:
    """What the native module says of itself (instruction sets above all), or why it cannot be imported."""
    try:
        facts = native().information()
    except UserError as error:
        return {"native module": f"not loaded: {error}"}
    return {f"native {name}": _words(value) for name, value in facts.items()}


def _words(value: object) -> str:
    """A value of the native module's report as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({entry})" for name, entry in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def cpu_model() -> str:
    """Name of the processor; on Arm, where the kernel knows none, implementer and part."""
    values: dict[str, str] = {}
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            values.setdefault(name.strip(), value.strip())
    if "model name" in values:
        return values["model name"]
    parts = [f"{name} {values[name]}" for name in ("CPU implementer", "CPU part", "CPU variant") if name in values]
    return ", ".join(parts) or platform.processor() or UNKNOWN


def caches() -> str:
    """Caches of the first core, as the kernel lists them."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(folder / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found) or UNKNOWN


def core_groups() -> str:
    """Cores of the affinity mask by NUMA node (on an A64FX: core memory group), and how to run on several of them.

    Memory of another group is slower: one process per group, with the threads of its cores, keeps a process's own
    near it.
    """
    groups = _cores_by_group()
    if not groups:
        return UNKNOWN
    found = ", ".join(f"{name} with {count} cores" for name, count in groups.items())
    if len(groups) == 1:
        return found
    least = min(groups.values())
    return f"{found}; best with one process per group: mpiexec -n {len(groups)}, OMP_NUM_THREADS={least}"


def _cores_by_group() -> dict[str, int]:
    """How many cores of the affinity mask each NUMA node has; nodes without one are left out."""
    mine = os.sched_getaffinity(0)
    groups = {}
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        if cores := mine & _numbers(_text(folder / "cpulist").strip()):
            groups[folder.name] = len(cores)
    return groups


def choices() -> dict[str, str]:
    """What to run here: processes of a node and their threads, how fp16 sums, and where ranks belong.

    An A64FX is known by its identification register. Its node has four core memory groups of twelve cores even where
    the affinity mask shows fewer.
    """
    try:
        module = native()
        a64fx = bool(module.kernels.features()["a64fx"])
    except UserError:
        return {}
    groups = list(_cores_by_group().values()) or [len(os.sched_getaffinity(0))]
    if a64fx and sum(groups) != A64FX_GROUPS * A64FX_CORES:
        seen = f"this process sees {sum(groups)} core{'s' * (sum(groups) > 1)}"
        each = f"{A64FX_GROUPS} of {A64FX_CORES} threads, one per core memory group of an A64FX ({seen})"
        ranks = A64FX_GROUPS
    else:
        ranks = len(groups)
        each = f"{ranks} of {min(groups)} threads" + (", one per core group" if ranks > 1 else "")
    return {
        "ranks per node": each,
        "fp16 sums": _fp16_sums(module, a64fx),
        "rank map": _rank_map(ranks, a64fx),
    }


def _fp16_sums(module: ModuleType, a64fx: bool) -> str:
    """The default of `precision.fp16_sums`, and whether this CPU has the other value."""
    default = 'fp32 (precision.fp16_sums = "fp32")'
    try:
        module.CpuDevice(fp16_chains=True)
    except module.Error:
        return f'{default}; "chains" needs SVE'
    twice = ", twice as fast here and less exact" if a64fx else ", less exact"
    return f'{default}; "chains" is there{twice}'


def _rank_map(ranks: int, a64fx: bool) -> str:
    """Which ranks should be neighbours."""
    inside = f"parallel.tp up to {ranks} stays on a node" if ranks > 1 else "parallel.tp crosses nodes"
    torus = "; on a torus the launcher's map of ranks: native/cpu/sve/jobs/" if a64fx else ""
    return f'parallel.rank_order = "dp-pp-tp": neighbours are tensor-parallel, {inside}{torus}'


def vectors() -> str:
    """Length of this processor's SVE vectors, and what it adds to the instruction set."""
    try:
        features = native().kernels.features()
    except UserError:
        return UNKNOWN
    if not features["vector_bits"]:
        return "of fixed length (no SVE)"
    known = " (A64FX)" if features["a64fx"] else ""
    bf16 = "with" if features["sve_bf16"] else "without"
    lines = f"cache lines of {features['cache_line']} bytes"
    return f"SVE of {features['vector_bits']} bits{known}, {bf16} bf16 products; {lines}"


def memory() -> str:
    """Memory of the machine, what is available of it, and the limit of the control group if there is one."""
    values = {}
    for line in _text(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        values[name] = value.split()[0] if value.split() else ""
    if "MemTotal" not in values:
        return UNKNOWN
    total, available = (int(values.get(name, 0)) * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    limited = f", limited to {int(limit) / 1e9:.1f} GB" if limit.isdecimal() else ""
    return f"{total:.1f} GB, {available:.1f} GB available{limited}"


def mpi_library() -> str:
    """First line of what the MPI library calls itself, or "none" if none can be loaded; it is not started."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"none ({str(error).splitlines()[0]})"
    first_line = MPI.Get_library_version().strip().strip("\0").splitlines()[0]
    return " ".join(first_line.split())


def _numbers(text: str) -> set[int]:
    """The numbers of a list like "0-3,8", as the kernel writes sets of cores."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    """Contents of a file of the kernel's; empty where it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
