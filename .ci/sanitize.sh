# The tests of the native code on a build with the address and undefined-behaviour sanitizers.
. "$(dirname "$0")/common.sh" "$@"

activate
install_extras build-system test
# -O1: vector intrinsics stay bearable under the address sanitizer, and its reports keep their lines.
CXXFLAGS="-O1 -g1" SKBUILD_CMAKE_DEFINE=PYTRAIN_SANITIZE=ON pip install --no-deps --no-build-isolation \
    --target "$work/sanitized" -C cmake.build-type=Sanitize -C build-dir="$work/build_sanitized" .

# The interpreter itself is not instrumented: the run-time library has to be there before it. Leaks are not looked for, since
# the interpreter leaks on purpose; memory comes from malloc, so that the sanitizer sees each array's bounds.
libraries="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)"
export PYTHONPATH=$work/sanitized PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD=$libraries python -c "
from pytrain import _native
assert _native.__file__.startswith('$work/sanitized'), _native.__file__"
# --capture=sys: a report goes to standard error itself, and pytest must not swallow it when the process ends.
LD_PRELOAD=$libraries pytest_phase sanitize --capture=sys -p no:faulthandler tests/native
