"""What every test run starts with: the options, the seeds, and a look at what is being tested.

The tests import `./pytrain` of this checkout and, through it, the compiled modules of the installed package.
Those may have been built from other sources: then every result would be about code that nobody reads, so the
run ends at once.
"""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HASHED_SUFFIXES = frozenset((".h", ".cpp", ".inl", ".pyx", ".pxd", ".hip"))
"""What CMakeLists.txt hashes."""


def source_hash(folder: Path) -> str:
    """Hash of the native sources in `folder` as CMakeLists.txt computes it: of sorted lines `path sha256`."""
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in HASHED_SUFFIXES and path.is_file()
    )
    lines = (f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def thread_setting() -> str:
    """`OMP_NUM_THREADS` for the header; a value that OpenMP would pass over in silence ends the run."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value is None:
        return "not set"
    if not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(",")):
        pytest.exit(f"OMP_NUM_THREADS is {value!r}, not a positive number: OpenMP would ignore it", returncode=4)
    return value


def native_description(folder: Path) -> str:
    """The compiled module for the header; ends the run where it was built from other sources than `folder`.

    Where it cannot be imported at all, the tests that need it fail by themselves with that reason, and the
    others run.
    """
    try:
        from pytrain import _native
    except ImportError as error:
        return f"not importable: {error}"
    if _native.source_hash != source_hash(folder):
        pytest.exit(
            f"{_native.__file__} was built from other sources than {folder}: "
            "run `pip install .` in this checkout first",
            returncode=4,
        )
    facts = _native.information()
    return f"{facts['isa']}, {facts['threads']} threads, built by {facts['compiler']}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="added to the seed of every test (default 0)")
    parser.addoption("--arm", metavar="FOLDER", help="the emulated machine of tests/arm (see its README.md)")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the environment once, before anything is collected, and say what it is (also under -q)."""
    cores = len(os.sched_getaffinity(0))
    lines = (
        f"pytrain native module: {native_description(ROOT / 'native')}",
        f"cores: {cores}, OMP_NUM_THREADS: {thread_setting()}, --seed {session.config.getoption('seed')}",
    )
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line("\n".join(lines))
    # Child processes of the tests run this checkout too, wherever they are started.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), inherited)))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of this test: its name's checksum plus `--seed`; printed, so that a failure shows it."""
    number = zlib.crc32(request.node.nodeid.encode()) + int(request.config.getoption("seed"))
    print(f"seed {number} (--seed {request.config.getoption('seed')})")
    return number


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    """Random numbers of this test."""
    return np.random.default_rng(seed)
