# Formatting, lint, types, stubs, and that nothing names this machine.
. "$(dirname "$0")/common.sh" "$@"

activate
install_extras lint huggingface  # what the types of the sources refer to
failed=0
check() {
    echo "+ $*"
    "$@" || failed=1
}

# The files that `clang-format -i` would change, with the number of places.
format_native() {
    find native -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.hip' | sort \
        | xargs clang-format --dry-run -Werror 2>"$work/format.txt" && return
    sed -n 's/^\([^:]*\):[0-9]*:[0-9]*: error: .*/\1/p' "$work/format.txt" | uniq -c
    return 1
}

check ruff check .
check ruff format --check .
check mypy
for stub in pytrain/_*.pyi; do
    check python -m mypy.stubtest --concise "pytrain.$(basename "$stub" .pyi)"
done
check python .ci/stub_arguments.py
check format_native
for script in .ci/run .ci/*.sh; do
    check bash -n "$script"
done
echo "+ no file names the folder of this checkout"
if grep -rnIF --exclude-dir=.git --exclude-dir=build "$checkout_parent/" .; then failed=1; fi
exit "$failed"
