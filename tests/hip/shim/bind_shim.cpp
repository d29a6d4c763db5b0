// _native.hip_shim: how tests drive the shim and ask what it saw.
#include "bindings/bind.h"
#include "rocblas/rocblas.h"
#include "shim/selftest.h"
#include "shim/streams.h"

namespace py = pybind11;

namespace pytrain {

void bind_hip_shim(py::module_& module) {
    py::module_ shim = module.def_submodule("hip_shim", "Kernels of the HIP device on the CPU; see tests/hip/shim.");
    shim.attr("lanes") = shim::kLanes;
    shim.def(
        "set_order",
        [](const std::string& order, std::uint64_t seed) {
            check(order == "ascending" || order == "descending" || order == "shuffled", "order '", order,
                  "' is not one of ascending, descending, shuffled");
            shim::set_order(order == "ascending"    ? shim::Order::ascending
                            : order == "descending" ? shim::Order::descending
                                                    : shim::Order::shuffled,
                            seed);
        },
        py::arg("order"), py::arg("seed") = 0, "In which order fibers run from now on.");
    shim.def(
        "leave_out_barrier",
        [](const std::string& kernel, const std::string& file, int line) {
            shim::set_fault({shim::Fault::Kind::barrier, kernel, file, line});
        },
        py::arg("kernel"), py::arg("file"), py::arg("line"),
        "From now on this barrier is not there in kernels whose symbol has `kernel` in it.");
    shim.def(
        "exchange_rows", [](const std::string& kernel) { shim::set_fault({shim::Fault::Kind::rows, kernel, "", 0}); },
        py::arg("kernel"),
        "From now on matrix instructions exchange rows 4 and 5 in kernels whose symbol has `kernel` in it.");
    shim.def("no_fault", [] { shim::set_fault({}); }, "As it should be.");
    shim.def(
        "barriers_reached",
        [] {
            std::vector<std::tuple<std::string, std::string, int>> sites;
            for (const shim::BarrierSite& site : shim::barriers_reached())
                sites.emplace_back(site.kernel, site.file, site.line);
            return sites;
        },
        "(symbol, file, line) of every barrier that a kernel reached so far.");
    shim.def("set_devices", &shim::set_devices, py::arg("count"), "How many GPUs there seem to be.");
    shim.def("rocblas_products", &shim::rocblas_products, "How many products the stand-in for rocBLAS was asked for.");
    shim.def("launched_kernels", &shim::launched_kernels, "Mangled names of all kernels launched so far.");
    shim.def("counts", [] {
        const shim::Counts counts = shim::counts();
        py::dict result;
        result["launches"] = counts.launches;
        result["blocks"] = counts.blocks;
        result["barriers"] = counts.barriers;
        result["divergent_barriers"] = counts.divergent_barriers;
        result["products"] = counts.products;
        return result;
    });
    shim.def("reverse", &shim::reverse, py::arg("values"), py::arg("with_barrier"),
             "256 values in reverse through LDS, with the barrier that this needs or without it.");
    shim.def("diverge", &shim::diverge, py::arg("kind"),
             "Launches a kernel whose threads do not all reach a 'barrier' or a 'shuffle'; 'lds' takes more LDS than "
             "there is. Throws what the device says.");
    shim.def("matrix_product", &shim::matrix_product, py::arg("a"), py::arg("b"), py::arg("format"),
             "(32, 32) = a (32, 16) b (16, 32) by one wave: bf16, fp16 or fp32.");
}

}  // namespace pytrain
