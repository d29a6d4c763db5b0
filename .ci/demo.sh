# The README's first command on a fresh machine: an empty environment, no MPI in it, and the demo.
. "$(dirname "$0")/common.sh" "$@"

python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
readme demo
