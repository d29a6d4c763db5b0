# The README's way onto a machine without a network, with an MPI that a module system brings: a wheelhouse is filled where
# there is a network, and everything, mpi4py from its source too, is installed from it where there is none.
. "$(dirname "$0")/common.sh" "$@"

export -n SKBUILD_CMAKE_DEFINE
# Stands in for `module load`: an MPI in a folder of its own, reached through PATH alone.
python3 -m venv "$work/module"
"$work/module/bin/pip" install mpich

python3 -m venv "$work/online"
. "$work/online/bin/activate"
readme wheelhouse
deactivate

python3 -m venv "$work/offline"
. "$work/offline/bin/activate"
# Before an MPI that the system may have, and after the environment's own pip and python.
export PATH=$work/offline/bin:$work/module/bin:$PATH
# No index, no cache and no setting of this machine; no network at all where the system lets us cut it.
unset "${!PIP_@}"
export PIP_CONFIG_FILE=/dev/null PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
without_network=()
if unshare --net true 2>/dev/null; then without_network=(unshare --net); else echo "cannot cut the network here"; fi
# mpi4py's half a million generated lines need not be fast here.
CFLAGS=-O0 readme offline "${without_network[@]}"

cd "$work"  # away from ./pytrain
pytrain info
ldd "$(python -c 'from mpi4py import MPI; print(MPI.__file__)')" | grep "$work/module/lib/libmpi"
mpiexec -n 2 python -c 'from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2'
