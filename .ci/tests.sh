# The README's second command: the tests, in the environment that the first one made.
. "$(dirname "$0")/common.sh" "$@"

if [ -e "$work/environment_demo" ]; then
    . "$(cat "$work/environment_demo")/bin/activate"
else
    python3 -m venv "$work/venv"
    . "$work/venv/bin/activate"
fi
PYTEST_ADDOPTS="--junitxml=$work/results/tests.xml" readme tests
