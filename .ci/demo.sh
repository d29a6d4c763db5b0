# The README's first command on a fresh machine: an empty environment, and the demo in one process without any MPI, whether
# or not this machine has one.
. "$(dirname "$0")/common.sh" "$@"

python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
mkdir -p "$work/no_mpi/mpi4py"
echo 'raise RuntimeError("cannot load MPI library")' >"$work/no_mpi/mpi4py/__init__.py"
PYTHONPATH=$work/no_mpi readme demo
