# Sourced by .ci/run: a compiler cache of this run alone, where the system has one, since several phases build the same
# sources. It starts empty: nothing that an earlier run compiled can stand in for a source that no longer compiles.
if ! command -v ccache >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get -q update && apt-get -q install -y --no-install-recommends ccache; } >"$1/apt.log" 2>&1 </dev/null \
        || tail -n 3 "$1/apt.log"
fi
if command -v ccache >/dev/null; then
    export CCACHE_DIR=$1/ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_C_COMPILER_LAUNCHER=ccache
else
    echo "no ccache: every phase compiles everything"
fi
