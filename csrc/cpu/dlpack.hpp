// What a torch.Tensor is, asked of PyTorch in one C call: the exchange table that DLPack 1.3 defines
// for Python types (dlpack.h, DLPackExchangeAPI), of which this is what is read here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused_dni::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct View {  // DLTensor
  void* data;
  std::int32_t device, device_index;
  std::int32_t dimensions;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;

  void* address() const { return static_cast<char*>(data) + byte_offset; }
  std::int64_t elements() const {
    std::int64_t count = 1;
    for (std::int32_t d = 0; d < dimensions; ++d) count *= shape[d];
    return count;
  }
  bool contiguous() const {
    std::int64_t step = 1;
    for (std::int32_t d = dimensions; d-- > 0; step *= shape[d])
      if (shape[d] != 1 && strides[d] != step) return false;
    return true;
  }
  bool is(std::uint8_t type, std::uint8_t size) const {
    return device == kCpu && code == type && bits == size && lanes == 1;
  }
};

struct Exchange {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  const Exchange* older;
  void* make;
  void* share;
  void* wrap;
  int (*view)(void* object, View* to);
  void* stream;
};

// PyTorch's table; throws ImportError where it has none that is known here.
inline const Exchange& exchange() {
  static const Exchange* const found = [] {
    namespace py = pybind11;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    const auto* table = capsule.is_none() ? nullptr
                                          : static_cast<const Exchange*>(PyCapsule_GetPointer(
                                                capsule.ptr(), "dlpack_exchange_api"));
    PyErr_Clear();
    while (table && table->major != kMajorVersion) table = table->older;
    if (table == nullptr)
      throw py::import_error("this PyTorch has no table of DLPack 1 for C (2.11 has)");
    return table;
  }();
  return *found;
}

// Looks at a tensor, which must outlive the view; false, and no Python error, if it is no memory.
inline bool view(PyObject* tensor, View& to) {
  if (exchange().view(tensor, &to) == 0 && to.data != nullptr) return true;
  PyErr_Clear();
  return false;
}

}  // namespace fused_dni::dlpack
