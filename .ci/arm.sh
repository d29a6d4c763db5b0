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
    local cpu=$1 table=$2 name=$1 status=0
    shift 2
    case $table in
        sve) table="sve and not sve_bf16" ;;
        *_bf16) name=${cpu}_bf16 ;;
    esac
    "$machine/bin/python-$cpu" -m pytest -q -p no:cacheprovider --junitxml="$work/results/arm_$name.xml" \
        -k "$table and not threads_do_not_change and not more_than_one_region" "$@" >"$work/arm_$name.txt" 2>&1 || status=1
    echo "+ $cpu, $table: $(tail -n 1 "$work/arm_$name.txt")"
    [ "$status" -eq 0 ] || cat "$work/arm_$name.txt"
    return "$status"
}
short=(tests/native/test_kernels.py tests/native/test_matmul.py::test_packing
    tests/native/test_matmul.py::test_every_transpose_and_size tests/native/test_attention.py::test_head_sizes
    tests/native/test_fp16_chains.py)
whole=(tests/native/test_kernels.py tests/native/test_matmul.py tests/native/test_attention.py
    tests/native/test_fp16_chains.py)
# A table that adds products of bf16 has its rows and fp32 products from the plain one: `bf16_products CPU TABLE`.
bf16_products() {
    local products=tests/native/test_bf16_products.py
    local sizes=$products::test_every_transpose_and_size
    kernels "$1" "$2" "$products::test_packing_of_pairs" "${sizes}[fp32-True-False-True-$2]" \
        "${sizes}[bf16-False-True-False-$2]" "$products::test_extremes" "$products::test_both_peaks_count_what_they_did" \
        "tests/native/test_attention.py::test_storage_types[bf16-$2]" \
        "tests/native/test_attention.py::test_gradients_of_later_queries_alone[bf16-$2]" \
        "tests/native/test_attention_ways.py::test_both_ways_with_an_offset[bf16-$2]"
}

# Two at a time: each is a process that mostly runs on one core.
(
    failed=0
    kernels sve128 sve "${short[@]}" || failed=1
    kernels sve1024 sve "${short[@]}" || failed=1
    kernels a64fx sve "${whole[@]}" || failed=1
    bf16_products sve128 sve_bf16 || failed=1
    exit "$failed"
) &
first=$!
failed=0
kernels sve256 sve "${short[@]}" || failed=1
kernels sve2048 sve "${short[@]}" || failed=1
kernels neoverse-n1 "(neon or test_threads)" "${short[@]}" tests/native/test_threads.py || failed=1
bf16_products sve256 sve_bf16 || failed=1
bf16_products sve2048 sve_bf16 || failed=1
bf16_products neon-bf16 neon_bf16 || failed=1
wait "$first" || failed=1
pytest_phase arm tests/arm tests/test_symbols.py tests/test_arm_instructions.py --arm "$machine" || failed=1
exit "$failed"
