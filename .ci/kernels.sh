# The tests of kernels, model and training once more under every other instruction set that this machine can run.
. "$(dirname "$0")/common.sh" "$@"

activate
pip install pytest hypothesis
facts() { python -c "from pytrain import _native; facts = _native.information(); print($1)"; }
failed=0
default=$(facts 'facts["isa"]')
for isa in $(facts '*facts["isas_available"]'); do
    if [ "$isa" != "$default" ]; then
        echo "+ PYTRAIN_ISA=$isa"
        PYTRAIN_ISA=$isa pytest_phase "isa_$isa" \
            tests/native tests/test_stage.py tests/test_engine.py tests/test_optimizer.py || failed=1
    fi
done
exit "$failed"
