# Figures to look at, none of them a condition: import time, wheel and file sizes.
. "$(dirname "$0")/common.sh" "$@"

activate
echo "import pytrain, seconds (goal: under 0.3):"
(cd "$work" && python "$work/source/.ci/import_time.py")
echo "lines of each source (soft limit: 500):"
find native pytrain bench tests -name '*.py' -o -name '*.pyx' -o -name '*.pyi' -o -name '*.cpp' -o -name '*.h' \
    -o -name '*.inl' -o -name '*.hip' | xargs wc -l | sort -rn | awk '{print $0 ($2 != "total" && $1 > 500 ? "   OVER" : "")}'
