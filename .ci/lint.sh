# Formatting, lint, types, stubs, and that nothing names this machine.
. "$(dirname "$0")/common.sh" "$@"

activate
install_extras lint
failed=0
check() {
    echo "+ $*"
    "$@" || failed=1
}

check ruff check .
check ruff format --check .
check mypy
for stub in pytrain/_*.pyi; do
    check python -m mypy.stubtest --concise "pytrain.$(basename "$stub" .pyi)"
done
check python .ci/stub_arguments.py
mapfile -t sources < <(find native -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.hip' | sort)
check clang-format --dry-run -Werror "${sources[@]}"
for script in .ci/run .ci/*.sh; do
    check bash -n "$script"
done
echo "+ no file names the folder of this checkout"
if grep -rnIF --exclude-dir=.git --exclude-dir=build "$checkout_parent/" .; then failed=1; fi
exit "$failed"
