// Small kernels that the tests of the shim itself run.
#pragma once
#include <array>
#include <string>
#include <vector>

namespace pytrain::shim {

std::vector<float> reverse(std::vector<float> values, bool with_barrier);
void diverge(const std::string& kind);
std::vector<float> matrix_product(const std::vector<float>& a, const std::vector<float>& b, const std::string& format);

}  // namespace pytrain::shim
