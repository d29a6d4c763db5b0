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

# Two jobs at a time, each a process that mostly runs on one core, the longest first: `job NAME command...`. Its output
# is shown when it fails.
job() {
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n || true; done
    local name=$1
    shift
    {
        "$@" >"$work/arm_$name.txt" 2>&1 || { touch "$work/arm_failed"; cat "$work/arm_$name.txt"; }
        echo "+ $name: $(tail -n 1 "$work/arm_$name.txt")"
    } &
}

# The tests of kernels, products and attention with one table on one CPU: `kernels CPU TABLE tests and options...`.
kernels() {
    local cpu=$1 table=$2 name=$1
    shift 2
    case $table in
        sve) table="sve and not sve_bf16" ;;
        *_bf16) name=${cpu}_bf16 ;;
    esac
    job "$name" "$machine/bin/python-$cpu" -m pytest -q -p no:cacheprovider --junitxml="$work/results/arm_$name.xml" \
        -k "$table and not threads_do_not_change and not more_than_one_region" "$@"
}
short=(tests/native/test_kernels.py tests/native/test_stored_rows.py tests/native/test_matmul.py::test_packing
    tests/native/test_matmul.py::test_every_transpose_and_size tests/native/test_attention.py::test_head_sizes
    tests/native/test_fp16_chains.py)
whole=(tests/native/test_kernels.py tests/native/test_stored_rows.py tests/native/test_matmul.py
    tests/native/test_attention.py tests/native/test_fp16_chains.py)
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

kernels a64fx sve "${whole[@]}"
job counts pytest_phase arm_counts tests/arm/test_counts.py --arm "$machine"
job package pytest_phase arm tests/arm --ignore=tests/arm/test_counts.py tests/test_symbols.py \
    tests/test_arm_instructions.py --arm "$machine"
for bits in 128 256 1024 2048; do kernels "sve$bits" sve "${short[@]}"; done
kernels neoverse-n1 "(neon or test_threads)" "${short[@]}" tests/native/test_threads.py
for bits in 128 256 2048; do bf16_products "sve$bits" sve_bf16; done
bf16_products neon-bf16 neon_bf16
wait
[ ! -e "$work/arm_failed" ]
