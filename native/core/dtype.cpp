#include "core/dtype.h"

namespace pytrain {

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::fp32:
            return "fp32";
        case DType::bf16:
            return "bf16";
        case DType::fp16:
            return "fp16";
    }
    return "unknown";
}

}  // namespace pytrain
