# `pip install -e .`: the checkout's Python with a native module beside it, from the checkout and from elsewhere.
. "$(dirname "$0")/common.sh" "$@"

python3 -m venv "$work/editable"
. "$work/editable/bin/activate"
pip install -e ".[test]"
for folder in "$work" "$work/source"; do
    (cd "$folder" && python -c "
import pytrain, pytrain._native, pytrain.bench.peak
assert pytrain.__file__ == '$work/source/pytrain/__init__.py', pytrain.__file__")
done
pytest_phase editable tests/test_packaging.py tests/test_cli.py
