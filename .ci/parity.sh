# Parity with other implementations: every test file in which the README's command skipped something, once more with the
# `parity` extra installed.
. "$(dirname "$0")/common.sh" "$@"

activate
install_extras test parity
if [ -e "$work/results/tests.xml" ]; then
    cp "$work/results/tests.xml" "$work/skipped.xml"
else
    python -m pytest -q --junitxml="$work/skipped.xml" || true
fi
mapfile -t files < <(python .ci/results.py skipped-files "$work/skipped.xml")
[ ${#files[@]} -gt 0 ] || { echo "no test was skipped: nothing is left for this phase"; exit 1; }
pytest_phase parity "${files[@]}"
