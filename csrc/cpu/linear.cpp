// The linear layer's ops where activations and parameters are of one type.
#include "linear.hpp"

namespace fused_dni::FUSED_DNI_ISA {

void add_linear(Kernels& kernels) {
  add_linear_ops<Plain<float>>(kernels, 0);
  add_linear_ops<Plain<double>>(kernels, 1);
}

}  // namespace fused_dni::FUSED_DNI_ISA
