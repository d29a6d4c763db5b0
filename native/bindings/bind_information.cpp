#include "bindings/bind.h"
#include "build_information.h"
#include "cpu/features.h"
#include "cpu/select.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace pytrain {

namespace {
std::string blocking_of(const cpu::Kernels& kernels) {
    const std::string blocking = message("tile ", kernels.tile_rows, "x", kernels.tile_columns, ", block ",
                                         kernels.block_rows, "x", kernels.block_depth, "x", kernels.block_columns);
    if (!kernels.chain_fp16) return blocking;
    return message(blocking, ", fp16 in chains of ", kernels.fp16_chain, " and blocks of ",
                   kernels.fp16_chains.block_depth);
}

py::dict information(bool fp16_chains, bool rocblas) {
    const cpu::Kernels kernels = fp16_chains ? cpu::with_fp16_chains(cpu::chosen_kernels()) : cpu::chosen_kernels();
    py::list available;
    for (const cpu::Isa& isa : cpu::list_isas(cpu::detect_features()))
        if (isa.available()) available.append(isa.name);
    py::dict facts;
    facts["version"] = PYTRAIN_VERSION;
    facts["compiler"] = PYTRAIN_COMPILER;
    facts["isa"] = kernels.name;
    facts["isas_available"] = available;
    facts["isas_built"] = PYTRAIN_BUILT_ISAS;
    facts["isas_dropped"] = PYTRAIN_DROPPED_ISAS;
    facts["threads"] = cpu::default_threads();
    std::string blocking = blocking_of(kernels);
    if (rocblas) blocking += ", products of the GPU by rocBLAS " + rocblas_version();
    facts["blocking"] = blocking;
    return facts;
}
}  // namespace

void bind_information(py::module_& module) {
    module.attr("source_hash") = PYTRAIN_SOURCE_HASH;
    module.attr("__version__") = PYTRAIN_VERSION;
    module.def("information", &information, py::arg("fp16_chains") = false, py::arg("rocblas") = false,
               "Compiler, instruction sets (chosen, available, built, dropped), threads and blocking, as JSON values;\n"
               "fp16_chains, rocblas: the blocking of a device with them.");
}

}  // namespace pytrain
