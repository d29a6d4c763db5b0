// The HIP device, in builds that have it.
#include "bindings/bind.h"

#ifdef PYTRAIN_HIP
#include "hip/hip_device.h"
#endif

namespace pytrain {

std::unique_ptr<Device> make_hip_device(int index, [[maybe_unused]] bool rocblas) {
#ifdef PYTRAIN_HIP
    return std::make_unique<hip::HipDevice>(index, rocblas);
#else
    throw Error(message("GPU ", index, " cannot be used: this build has no HIP (see native/hip/README.md)"));
#endif
}

std::string rocblas_version() {
#ifdef PYTRAIN_HIP
    return hip::VendorProducts::version();
#else
    throw Error("this build has no HIP, and no rocBLAS (see native/hip/README.md)");
#endif
}

}  // namespace pytrain
