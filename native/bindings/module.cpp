// pytrain._native: what Python sees of the C++ side. One bind_<topic>.cpp each.
#include "bindings/bind.h"

PYBIND11_MODULE(_native, module, pybind11::mod_gil_not_used()) {
    module.doc() = "Kernels, device, layout, stages and decoding of pytrain. Every call releases the GIL.";
    pytrain::bind_core(module);
    pytrain::bind_device(module);
    pytrain::bind_kernels(module);
    pytrain::bind_layout(module);
    pytrain::bind_stage(module);
    pytrain::bind_decode(module);
    pytrain::bind_information(module);
#ifdef PYTRAIN_HIP_SHIM
    pytrain::bind_hip_shim(module);
#endif
}
