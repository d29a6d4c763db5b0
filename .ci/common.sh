# Sourced by every phase: strict mode, the two arguments that .ci/run gives, and what more than one phase needs.
set -euo pipefail

work=$1             # temporary folder of this run: source, results, environment
checkout_parent=$2  # the folder that the checkout lies in
cd "$work/source"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=off PIP_QUIET=2
# Every build in CI takes warnings for errors; the commands stay those of the README.
export SKBUILD_CMAKE_DEFINE=PYTRAIN_WERROR=ON

# Enters the environment that the README's commands made, or, where only some phases run, makes one like it.
activate() {
    if [ -e "$work/environment_tests" ]; then
        . "$(cat "$work/environment_tests")/bin/activate"
    else
        python3 -m venv "$work/venv"
        . "$work/venv/bin/activate"
        pip install ".[test,mpi]"
        echo "$work/venv" >"$work/environment_tests"
    fi
    python -c 'import pytrain._native'  # says why, if it cannot be
}

# Runs the block of the README that is marked `<!-- ci:NAME -->` in strict mode, and remembers the environment that it ends
# in (`$work/environment_NAME`): `readme NAME [command to run it under]`.
readme() {
    local name=$1
    shift
    {
        printf 'set -euo pipefail\ntrap '\''echo "$VIRTUAL_ENV" >%q/environment_%s'\'' EXIT\nset -x\n' "$work" "$name"
        python3 .ci/readme.py README.md "$name"
    } >"$work/readme_$name.sh"
    "$@" bash "$work/readme_$name.sh"
}

# Installs the requirements of these extras of pyproject.toml, without building pytrain again.
install_extras() {
    python .ci/extras.py "$@" >"$work/extras.txt"
    pip install -r "$work/extras.txt"
}

# Runs pytest and keeps its results for the summary: `pytest_phase NAME arguments...`.
pytest_phase() {
    local name=$1
    shift
    python -m pytest -q --junitxml="$work/results/$name.xml" "$@"
}
