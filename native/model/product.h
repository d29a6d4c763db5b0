// Products with a weight. y = x * weight^T where the weight is column-parallel [out, in] (adjacent tensors as one
// matrix), y = x * weight where it is row-parallel [in, out]. FLOPs: 2 rows in out each; the FMA units bind.
#pragma once
#include <cstdint>

#include "device.h"
#include "model/layout.h"

namespace pytrain {

class Parameters;

struct Product {
    std::int64_t in, out;       // of this rank's part
    std::int64_t weight, bias;  // indices into Layout::tensors(); bias -1 for none
};

// What a row-parallel product may add as it is written: the residual stream (rows, out) and its bias.
struct RowEpilogue {
    Tensor residual;
    bool bias;
};

// y (rows, out) from x (rows, in); `activated` (rows, out), where given, is GELU of y.
void column_forward(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor y, Tensor x,
                    Tensor activated);
// lddy: row stride of dy; kContiguous for product.out.
constexpr std::int64_t kContiguous = 0;
void column_backward_input(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor dx, Tensor dy,
                           std::int64_t lddy = kContiguous);
void column_backward_weight(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor dy, Tensor x,
                            std::int64_t lddy = kContiguous);
void row_forward(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor y, Tensor x, const RowEpilogue&);
void row_backward_input(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor dx, Tensor dy);
// The bias is replicated: its gradient is that of `bias_rows`, all of them unless other ranks take the rest.
void row_backward_weight(Device&, const Parameters&, const Product&, std::int64_t rows, Tensor dy, Tensor x,
                         Range bias_rows);

}  // namespace pytrain
