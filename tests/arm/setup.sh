#!/usr/bin/env bash
# A 64-bit Arm machine in a folder, emulated: Debian's Python, the aarch64 wheels of what pytrain needs, and pytrain
# itself, cross-built. Usage, from the root of a checkout, with a Python 3.11 first on the path:
#
#     bash tests/arm/setup.sh FOLDER
#
# Afterwards FOLDER/bin/python-CPU is that machine's Python for each CPU of the list below, FOLDER/bin/mpiexec starts its
# ranks, and FOLDER/native holds what was built. README.md says which packages this needs. debootstrap wants root.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -eq 1 ] || { echo "usage: bash tests/arm/setup.sh FOLDER"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
qemu=$(command -v qemu-aarch64) || { echo "qemu-aarch64 is not installed: apt-get install qemu-user"; exit 2; }
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || { echo "python3 is $version, but Debian 12's is 3.11, and the wheel is built for python3"; exit 2; }

# --- Debian's Python, unpacked and never installed: nothing has to run in it -------------------------------------
root=$folder/root
bootstrap() {
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3-minimal,libpython3.11-stdlib,libgomp1,libstdc++6 \
        bookworm "$root" >"$folder/debootstrap.log" || { tail -n 20 "$folder/debootstrap.log"; return 1; }
    for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
}

# --- the wheels of other people's packages ----------------------------------------------------------------------
platforms=(manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64 linux_aarch64)
site=$folder/lib/python3.11/site-packages
wheels() {
    local found
    mapfile -t found < <(python3 "$here/tests/arm/requirements.py")
    python3 -m pip install --quiet --target "$site" --no-compile --only-binary=:all: --implementation cp \
        --python-version 3.11 "${platforms[@]/#/--platform=}" "${found[@]}"
    # --target leaves out what a wheel puts beside Python, here the MPI library, which mpi4py looks for in its prefix.
    python3 -m pip download --quiet --no-deps --dest "$folder/mpi" --only-binary=:all: --python-version 3.11 \
        "${platforms[@]/#/--platform=}" mpich
    python3 - "$folder" <<'PYTHON'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
(wheel,) = (folder / "mpi").glob("mpich-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        before, data, path = name.partition(".data/data/")
        if data and path.startswith("lib/") and not path.endswith("/"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(archive.read(name))
PYTHON
}

# --- pytrain -----------------------------------------------------------------------------------------------------
# What builds it is of this machine: under the platform below pip would fetch that for Arm too, CMake among it, and the
# `cmake` of a pip package does not find itself in the environment that pip builds in.
builder=$folder/build
tools() {
    [ ! -e "$builder/ready" ] || return 0
    local wanted
    mapfile -t wanted < <(python3 "$here/tests/arm/requirements.py" --build)
    cmake --version >/dev/null 2>&1 || wanted+=(cmake)
    ninja --version >/dev/null 2>&1 || make --version >/dev/null 2>&1 || wanted+=(ninja)
    rm -rf "$builder"
    python3 -m venv "$builder"
    "$builder/bin/python" -m pip install --quiet "${wanted[@]}"
    touch "$builder/ready"
}

wheel() {
    tools
    export SKBUILD_CMAKE_ARGS="-DCMAKE_TOOLCHAIN_FILE=$here/cmake/aarch64-linux-gnu.cmake"
    export _PYTHON_HOST_PLATFORM=linux-aarch64 SKBUILD_INSTALL_STRIP=false
    rm -rf "$folder/wheel"
    PATH=$builder/bin:$PATH "$builder/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation \
        --wheel-dir "$folder/wheel" "$here"
    # Its Python files would hide changes of the checkout: the compiled modules alone are taken.
    rm -rf "$folder/native" && mkdir -p "$folder/native"
    python3 -m zipfile -e "$folder"/wheel/pytrain-*_aarch64.whl "$folder/unpacked"
    mkdir -p "$folder/native/pytrain"
    cp "$folder"/unpacked/pytrain/*.so "$folder/native/pytrain/"
    rm -rf "$folder/unpacked"
}

# --- one Python per CPU ------------------------------------------------------------------------------------------
# They are one virtual environment, which Python finds by its own path: qemu tells it the path of the script. So
# sys.executable is the script too, and whatever starts it starts another emulator, without the system's help.
python_on() {
    local name=$1 cpu=$2
    cat >"$folder/bin/python-$name" <<SCRIPT
#!/bin/sh
export PYTHONPATH="\${PYTHONPATH:-$here}:$folder/native" PYTHONDONTWRITEBYTECODE=1
export OMP_WAIT_POLICY=passive MPIR_CVAR_CH4_CMA_ENABLE=0
exec $qemu -cpu $cpu -0 $folder/bin/python-$name -L $root $root/usr/bin/python3.11 "\$@"
SCRIPT
    chmod +x "$folder/bin/python-$name"
}

pythons() {
    mkdir -p "$folder/bin"
    printf 'home = %s\n' "$root/usr/bin" >"$folder/pyvenv.cfg"
    for bits in 128 256 512 1024 2048; do python_on "sve$bits" "max,sve-default-vector-length=$((bits / 8))"; done
    python_on a64fx a64fx
    python_on neoverse-n1 neoverse-n1
    python_on neon-bf16 max,sve=off
    local mpiexec
    mpiexec=$(command -v mpiexec) || { echo "there is no mpiexec on the path: pip install mpich"; return 1; }
    printf '#!/bin/sh\nexec %s "$@"\n' "$mpiexec" >"$folder/bin/mpiexec"
    chmod +x "$folder/bin/mpiexec"
}

# The downloads wait for the network while the compilers work.
downloads() {
    [ -e "$root/usr/bin/python3.11" ] || bootstrap
    [ -e "$site/numpy" ] || wheels
}
downloads &
wheel
wait "$!"  # and so fail with it
pythons
"$folder/bin/python-a64fx" -c 'from pytrain._native import information; print(information())'
