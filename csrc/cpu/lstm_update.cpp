// Weight gradients of an LSTM, applied where they are made.
#include "ops.hpp"

namespace fused_dni::FUSED_DNI_ISA {

void add_lstm_update(Kernels&) {}

}  // namespace fused_dni::FUSED_DNI_ISA
