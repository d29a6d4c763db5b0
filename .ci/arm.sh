# 64-bit Arm, emulated: kernels at every SVE vector length and on the cores by name, training, and what LLVM's models say.
. "$(dirname "$0")/common.sh" "$@"

packages=(g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user debootstrap llvm-19)
if ! dpkg --status "${packages[@]}" >"$work/arm_packages.txt" 2>&1; then
    { apt-get -q update && apt-get -q install -y --no-install-recommends "${packages[@]}"; } \
        >"$work/apt_arm.log" 2>&1 </dev/null || { tail -n 5 "$work/apt_arm.log"; exit 1; }
fi
activate
pip install pytest hypothesis
machine=$work/arm
bash tests/arm/setup.sh "$machine"

# The tests of kernels, products and attention with one table on one CPU: `kernels CPU TABLE tests and options...`.
kernels() {
    local cpu=$1 table=$2 status=0
    shift 2
    "$machine/bin/python-$cpu" -m pytest -q -p no:cacheprovider --junitxml="$work/results/arm_$cpu.xml" \
        -k "$table and not threads_do_not_change and not more_than_one_region" "$@" >"$work/arm_$cpu.txt" 2>&1 || status=1
    echo "+ $cpu, $table: $(tail -n 1 "$work/arm_$cpu.txt")"
    [ "$status" -eq 0 ] || cat "$work/arm_$cpu.txt"
    return "$status"
}
short=(tests/native/test_kernels.py tests/native/test_matmul.py::test_packing
    tests/native/test_matmul.py::test_every_transpose_and_size tests/native/test_attention.py::test_head_sizes
    tests/native/test_fp16_chains.py)
whole=(tests/native/test_kernels.py tests/native/test_matmul.py tests/native/test_attention.py
    tests/native/test_fp16_chains.py)

# Two at a time: each is a process that mostly runs on one core.
(
    failed=0
    kernels sve128 sve "${short[@]}" || failed=1
    kernels sve1024 sve "${short[@]}" || failed=1
    kernels a64fx sve "${whole[@]}" || failed=1
    exit "$failed"
) &
first=$!
failed=0
kernels sve256 sve "${short[@]}" || failed=1
kernels sve2048 sve "${short[@]}" || failed=1
kernels neoverse-n1 "(neon or test_threads)" "${short[@]}" tests/native/test_threads.py || failed=1
wait "$first" || failed=1
pytest_phase arm tests/arm tests/test_symbols.py tests/test_arm_instructions.py --arm "$machine" || failed=1
exit "$failed"
