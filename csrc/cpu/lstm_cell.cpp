// One step of an LSTM.
#include "ops.hpp"

namespace fused_dni::FUSED_DNI_ISA {

void add_lstm_cell(Kernels&) {}

}  // namespace fused_dni::FUSED_DNI_ISA
