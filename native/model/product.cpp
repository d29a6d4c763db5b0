#include "model/product.h"

#include "model/parameters.h"

namespace pytrain {

namespace {
// c (m,n) = op(a) * op(b); strides are those of whole matrices.
Matmul whole(std::int64_t m, std::int64_t n, std::int64_t k, Tensor a, Transpose transpose_a, Tensor b,
             Transpose transpose_b, Tensor c) {
    Matmul args{};
    args.m = m, args.n = n, args.k = k;
    args.a = a, args.lda = transpose_a == Transpose::yes ? m : k, args.transpose_a = transpose_a;
    args.b = b, args.ldb = transpose_b == Transpose::yes ? k : n, args.transpose_b = transpose_b;
    args.c = c, args.ldc = n;
    return args;
}

// Gradient of a weight stored (first, second): sum over rows of left (rows, first) times right (rows, second).
void weight_gradient(Device& device, const Parameters& parameters, std::int64_t weight, std::int64_t rows, Tensor left,
                     std::int64_t first, Tensor right, std::int64_t second, std::int64_t ld_left = kContiguous) {
    bool accumulate = true;
    const Tensor gradient = parameters.gradient(weight, &accumulate);
    Matmul args = whole(first, second, rows, left, Transpose::yes, right, Transpose::no, gradient);
    if (ld_left != kContiguous) args.lda = ld_left;
    args.accumulate = accumulate;
    device.matmul(args, device.compute_queue());
}

void bias_gradient(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows, Tensor dy,
                   std::int64_t lddy = kContiguous) {
    if (product.bias < 0) return;
    device.bias_backward(parameters.gradient(product.bias, product.out), dy, rows, product.out,
                         lddy == kContiguous ? product.out : lddy, device.compute_queue());
}
}  // namespace

void column_forward(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows, Tensor y,
                    Tensor x, Tensor activated) {
    Matmul args =
        whole(rows, product.out, product.in, x, Transpose::no, parameters.weight(product.weight), Transpose::yes, y);
    args.bias = parameters.weight(product.bias);
    if (activated) args.activation = Activation::gelu, args.activated = activated, args.ldactivated = product.out;
    device.matmul(args, device.compute_queue());
}

void column_backward_input(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows,
                           Tensor dx, Tensor dy, std::int64_t lddy) {
    Matmul args =
        whole(rows, product.in, product.out, dy, Transpose::no, parameters.weight(product.weight), Transpose::no, dx);
    if (lddy != kContiguous) args.lda = lddy;
    device.matmul(args, device.compute_queue());
}

void column_backward_weight(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows,
                            Tensor dy, Tensor x, std::int64_t lddy) {
    weight_gradient(device, parameters, product.weight, rows, dy, product.out, x, product.in, lddy);
    bias_gradient(device, parameters, product, rows, dy, lddy);
}

void row_forward(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows, Tensor y,
                 Tensor x, const RowEpilogue& epilogue) {
    Matmul args =
        whole(rows, product.out, product.in, x, Transpose::no, parameters.weight(product.weight), Transpose::no, y);
    if (epilogue.bias) args.bias = parameters.weight(product.bias);
    args.residual = epilogue.residual, args.ldresidual = product.out;
    device.matmul(args, device.compute_queue());
}

void row_backward_input(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows,
                        Tensor dx, Tensor dy) {
    device.matmul(
        whole(rows, product.in, product.out, dy, Transpose::no, parameters.weight(product.weight), Transpose::yes, dx),
        device.compute_queue());
}

void row_backward_weight(Device& device, const Parameters& parameters, const Product& product, std::int64_t rows,
                         Tensor dy, Tensor x, Range bias_rows) {
    weight_gradient(device, parameters, product.weight, rows, x, product.in, dy, product.out);
    bias_gradient(device, parameters, product, bias_rows.size(), dy.at(bias_rows.begin * product.out));
}

}  // namespace pytrain
