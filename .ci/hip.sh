# The HIP device without a GPU: kernels compiled for gfx90a and looked at, and the same files run on the CPU by the shim.
. "$(dirname "$0")/common.sh" "$@"

if ! command -v hipcc >/dev/null || ! command -v llvm-mca-15 >/dev/null; then
    { apt-get -q update && apt-get -q install -y --no-install-recommends hipcc llvm-15; } >"$work/apt_hip.log" 2>&1 \
        || { tail -n 5 "$work/apt_hip.log"; exit 1; }
fi
activate
install_extras build-system test

# Both at once: the assembly stays in build/, where the tests find it.
python -m bench.hip --json "$work/hip.json" >"$work/hip.txt" 2>&1 &
report=$!
SKBUILD_CMAKE_DEFINE="PYTRAIN_WERROR=ON;PYTRAIN_HIP=SHIM" pip install --no-deps --no-build-isolation \
    --target "$work/shim" -C build-dir="$work/build_shim" .
wait "$report" || { cat "$work/hip.txt"; exit 1; }
cat "$work/hip.txt"
PYTHONPATH=$work/shim pytest_phase hip tests/hip

# The module with the real run time: it builds, and says that there is no GPU.
if [ ! -e /dev/kfd ]; then
    SKBUILD_CMAKE_DEFINE="PYTRAIN_WERROR=ON;PYTRAIN_HIP=ON" pip install --no-deps --no-build-isolation \
        --target "$work/gpu" -C build-dir="$work/build_gpu" .
    PYTHONPATH=$work/gpu pytest_phase hip_absent tests/test_hip_absent.py
fi
