// Python bindings. Tensors come as addresses (0: not there) that fused_dni/backends/cpu.py has
// checked; arguments come as tuples in the order of ops.hpp's structs, because reading a tuple
// costs a tenth of what pybind11 takes to convert as many arguments.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "dispatch.hpp"
#include "ops.hpp"

namespace py = pybind11;

namespace fused_dni {
namespace {

// Reads the items of a tuple one after another; all of them must be read.
class Reader {
 public:
  explicit Reader(const py::tuple& items) : items_(items.ptr()), size_(PyTuple_GET_SIZE(items_)) {}

  std::int64_t integer() { return checked(PyLong_AsLongLong(next())); }
  double real() { return checked(PyFloat_AsDouble(next())); }
  bool flag() { return checked(PyObject_IsTrue(next())) != 0; }
  template <class T = void>
  T* pointer() {
    return static_cast<T*>(checked(PyLong_AsVoidPtr(next())));
  }
  // That of a tensor with elements: one that is no memory (fake, say) has address 0.
  template <class T = void>
  T* memory(const char* name, std::int64_t elements = 1) {
    T* found = pointer<T>();
    if (found == nullptr && elements != 0)
      throw py::value_error(std::string(name) + " is a tensor without memory");
    return found;
  }
  void finish() const {
    if (at_ != size_) throw py::type_error("too many items in an argument tuple");
  }

 private:
  PyObject* next() {
    if (at_ == size_) throw py::type_error("too few items in an argument tuple");
    return PyTuple_GET_ITEM(items_, at_++);
  }
  template <class T>
  static T checked(T value) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  PyObject* items_;
  Py_ssize_t size_, at_ = 0;
};

LayerArguments read_layer(const py::tuple& items) {
  Reader read(items);
  LayerArguments a;
  a.rows = read.integer();
  a.in = read.integer();
  a.out = read.integer();
  a.threads = static_cast<int>(read.integer());
  a.normalization = static_cast<int>(read.integer());
  a.activation = static_cast<int>(read.integer());
  a.eps = read.real();
  a.momentum = read.real();
  a.training = read.flag();
  a.weight = read.memory("weight");
  a.bias = read.pointer();
  a.norm_weight = read.pointer();
  a.norm_bias = read.pointer();
  a.running_mean = read.pointer();
  a.running_var = read.pointer();
  read.finish();
  return a;
}

// Class indices are addresses too: they are looked at here, before anything is changed.
SynthesizerArguments read_synthesizer(const py::tuple& items, std::int64_t rows) {
  Reader read(items);
  SynthesizerArguments a;
  a.kind = static_cast<int>(read.integer());
  a.rank = read.integer();
  a.classes = read.integer();
  a.weight = read.memory("the synthesizer's weight");
  a.down = read.pointer();
  a.context_weight = read.pointer();
  a.bias = read.pointer();
  a.table = read.pointer<const void>();
  a.narrow = read.flag();
  a.ignored = read.integer();
  a.labels = read.pointer<const std::int64_t>();
  a.vectors = read.pointer<const void>();
  read.finish();
  a.counted = 0;
  for (std::int64_t n = 0; a.labels && n < rows; ++n) {
    if (a.table && a.labels[n] == a.ignored) continue;
    ++a.counted;
    if (a.labels[n] < 0 || a.labels[n] >= a.classes)
      throw py::index_error("class index " + std::to_string(a.labels[n]) + " (row " +
                            std::to_string(n) + ") is outside [0, " + std::to_string(a.classes) +
                            ")");
  }
  return a;
}

RuleArguments read_rule(const py::tuple& items) {
  Reader read(items);
  RuleArguments a;
  a.kind = static_cast<int>(read.integer());
  a.nesterov = read.flag();
  a.hyper = read.memory<double>("the rule's state");
  for (void*& moment : a.first) moment = read.pointer();
  for (void*& moment : a.second) moment = read.pointer();
  for (bool& trainable : a.trainable) trainable = read.flag();
  read.finish();
  return a;
}

// The addresses of a tuple, all of them.
std::vector<const void*> read_pointers(const py::tuple& items) {
  Reader read(items);
  std::vector<const void*> pointers(items.size());
  for (const void*& pointer : pointers) pointer = read.pointer<const void>();
  return pointers;
}

LSTMSizes read_sizes(Reader& read) {
  LSTMSizes a;
  a.steps = read.integer();
  a.batch = read.integer();
  a.in = read.integer();
  a.hidden = read.integer();
  a.threads = static_cast<int>(read.integer());
  return a;
}

std::vector<LSTMLayerArguments> read_lstm_layers(const py::tuple& items) {
  Reader read(items);
  std::vector<LSTMLayerArguments> layers(items.size() / 4);
  for (LSTMLayerArguments& a : layers) {
    a.weight_ih = read.pointer();
    a.weight_hh = read.pointer();
    a.bias_ih = read.pointer();
    a.bias_hh = read.pointer();
  }
  read.finish();
  return layers;
}

LSTMLayerArguments read_lstm_layer(const py::tuple& items) {
  const std::vector<LSTMLayerArguments> layers = read_lstm_layers(items);
  if (layers.size() != 1) throw py::type_error("one layer's addresses are wanted");
  return layers[0];
}

// One rule over the slots of several layers.
std::vector<RuleArguments> read_rules(const py::tuple& items, std::size_t layers) {
  Reader read(items);
  RuleArguments rule{};
  rule.kind = static_cast<int>(read.integer());
  rule.nesterov = read.flag();
  rule.hyper = read.memory<double>("the rule's state");
  std::vector<RuleArguments> rules(layers, rule);
  for (RuleArguments& a : rules)
    for (void*& moment : a.first) moment = read.pointer();
  for (RuleArguments& a : rules)
    for (void*& moment : a.second) moment = read.pointer();
  for (RuleArguments& a : rules)
    for (bool& trainable : a.trainable) trainable = read.flag();
  read.finish();
  return rules;
}

// `type` is an index into the tables of ops.hpp's Kernels.
template <class Arguments, std::size_t kTypes>
void call(void (*const (&function)[kTypes])(const Arguments&), std::size_t type,
          const Arguments& arguments) {
  if (type >= kTypes || function[type] == nullptr)
    throw py::type_error("no kernel for elements of type " + std::to_string(type));
  py::gil_scoped_release release;
  function[type](arguments);
}

void linear_forward(std::size_t type, const py::tuple& layer, const py::tuple& tensors) {
  Reader read(tensors);
  LinearForward a;
  a.layer = read_layer(layer);
  a.x = read.memory("input", a.layer.rows);
  a.h = read.pointer();
  a.normalized = read.pointer();
  a.rstd = read.pointer();
  read.finish();
  call(kernels().linear_forward, type, a);
}

void linear_backward(std::size_t type, const py::tuple& layer, const py::tuple& tensors) {
  Reader read(tensors);
  LinearBackward a;
  a.layer = read_layer(layer);
  a.grad_h = read.memory("the gradient", a.layer.rows);
  a.x = read.memory("input", a.layer.rows);
  a.h = read.pointer();
  a.normalized = read.pointer();
  a.rstd = read.pointer();
  a.delta = read.pointer();
  a.grad_x = read.pointer();
  a.grad_weight = read.pointer();
  a.grad_bias = read.pointer();
  a.grad_norm_weight = read.pointer();
  a.grad_norm_bias = read.pointer();
  read.finish();
  call(kernels().linear_backward, type, a);
}

void linear_update(std::size_t type, const py::tuple& layer, const py::tuple& rule,
                   const py::tuple& tensors) {
  Reader read(tensors);
  LinearUpdate a;
  a.layer = read_layer(layer);
  a.rule = read_rule(rule);
  a.x = read.pointer();
  a.delta = read.pointer();
  a.grad_bias = read.pointer();
  a.grad_norm_weight = read.pointer();
  a.grad_norm_bias = read.pointer();
  read.finish();
  call(kernels().linear_update, type, a);
}

void linear_step(std::size_t type, const py::tuple& layer, const py::tuple& synthesizer,
                 const py::tuple& rule, const py::tuple& tensors) {
  Reader read(tensors);
  LinearStep a;
  a.layer = read_layer(layer);
  a.synthesizer = read_synthesizer(synthesizer, a.layer.rows);
  a.rule = read_rule(rule);
  a.target_scale = read.real();
  a.max_norm = read.real();
  a.preactivation = read.flag();
  a.x = read.memory("input", a.layer.rows);
  a.h = read.pointer();
  a.scaled = read.pointer();
  a.reduced = read.pointer();
  a.grad_x = read.pointer();
  a.normalized = read.pointer();
  a.rstd = read.pointer();
  read.finish();
  call(kernels().linear_step, type, a);
}

void synthesizer_predict(std::size_t type, const py::tuple& synthesizer, const py::tuple& tensors) {
  Reader read(tensors);
  SynthesizerPredict a;
  a.rows = read.integer();
  a.features = read.integer();
  a.threads = static_cast<int>(read.integer());
  a.h = read.pointer();
  a.scaled = read.pointer();
  a.reduced = read.pointer();
  read.finish();
  a.synthesizer = read_synthesizer(synthesizer, a.rows);
  call(kernels().synthesizer_predict, type, a);
}

// With a rule, an update; with an empty tuple, four addresses of gradients end `tensors`.
void synthesizer_train(std::size_t type, const py::tuple& synthesizer, const py::tuple& rule,
                       const py::tuple& tensors) {
  Reader read(tensors);
  SynthesizerTrain a{};
  a.rows = read.integer();
  a.features = read.integer();
  a.threads = static_cast<int>(read.integer());
  a.target_scale = read.real();
  a.h = read.pointer();
  a.scaled = read.pointer();
  a.reduced = read.pointer();
  a.grad_h = read.pointer();
  a.statistics = read.pointer<double>();
  a.update = !rule.empty();
  if (a.update)
    a.rule = read_rule(rule);
  else
    for (void*& gradient : a.gradients) gradient = read.pointer();
  read.finish();
  a.synthesizer = read_synthesizer(synthesizer, a.rows);
  call(kernels().synthesizer_train, type, a);
}

void lstm_forward(std::size_t type, const py::tuple& layers, const py::tuple& dropout,
                  const py::tuple& tensors) {
  Reader read(tensors);
  const std::vector<LSTMLayerArguments> all = read_lstm_layers(layers);
  const std::vector<const void*> masks = read_pointers(dropout);
  LSTMForward a;
  a.sizes = read_sizes(read);
  a.depth = static_cast<std::int64_t>(all.size());
  a.layers = all.data();
  a.dropout = masks.empty() ? nullptr : masks.data();
  a.lengths = read.pointer<const std::int64_t>();
  a.x = read.memory("input");
  a.h = read.pointer();
  a.c = read.pointer();
  a.hidden = read.pointer();
  a.last_h = read.pointer();
  a.last_c = read.pointer();
  a.cells = read.pointer();
  a.gates = read.pointer();
  read.finish();
  call(kernels().lstm_forward, type, a);
}

// What belongs to an LSTMBackward and has to outlive it.
struct LSTMBackwardArguments {
  std::vector<LSTMLayerArguments> layers, gradients;
  std::vector<const void*> masks;
  LSTMBackward value;

  // `made` is empty where no gradients of the parameters are wanted.
  LSTMBackwardArguments(const py::tuple& parameters, const py::tuple& made,
                        const py::tuple& dropout, const py::tuple& tensors)
      : layers(read_lstm_layers(parameters)),
        gradients(read_lstm_layers(made)),
        masks(read_pointers(dropout)) {
    Reader read(tensors);
    LSTMBackward& a = value;
    a.sizes = read_sizes(read);
    a.depth = static_cast<std::int64_t>(layers.size());
    a.layers = layers.data();
    a.gradients = gradients.empty() ? nullptr : gradients.data();
    a.dropout = masks.empty() ? nullptr : masks.data();
    a.lengths = read.pointer<const std::int64_t>();
    a.grad_output = read.pointer();
    a.grad_last_h = read.pointer();
    a.grad_last_c = read.pointer();
    a.x = read.pointer();
    a.hidden = read.pointer();
    a.cells = read.pointer();
    a.gates = read.pointer();
    a.delta = read.pointer();
    a.grad_h = read.pointer();
    a.grad_c = read.pointer();
    a.grad_x = read.pointer();
    read.finish();
  }
};

void lstm_backward(std::size_t type, const py::tuple& layers, const py::tuple& gradients,
                   const py::tuple& dropout, const py::tuple& tensors) {
  const LSTMBackwardArguments a(layers, gradients, dropout, tensors);
  call(kernels().lstm_backward, type, a.value);
}

// `tensors` as of lstm_backward; `ends` is LSTMBoundary but for the synthesizer.
std::int64_t lstm_close(std::size_t type, const py::tuple& layers, const py::tuple& gradients,
                        const py::tuple& dropout, const py::tuple& tensors,
                        const py::tuple& synthesizer, const py::tuple& ends) {
  const LSTMBackwardArguments a(layers, gradients, dropout, tensors);
  LSTMBoundary b;
  b.synthesizer = read_synthesizer(synthesizer, 0);
  Reader read(ends);
  b.target_scale = read.real();
  b.strength = read.real();
  b.max_norm = read.real();
  b.max_target_norm = read.real();
  b.entrance = read.flag();
  b.ended = read.pointer<const bool>();
  b.last_h = read.pointer();
  b.last_c = read.pointer();
  b.rows = read.pointer();
  b.grad = read.pointer();
  b.scaled = read.pointer();
  b.reduced = read.pointer();
  b.statistics = read.pointer<double>();
  for (void*& gradient : b.gradients) gradient = read.pointer();
  read.finish();
  if (type > 1) throw py::type_error("no kernel for elements of type " + std::to_string(type));
  py::gil_scoped_release release;
  return lstm_close(type, a.value, b);
}

void lstm_update(std::size_t type, const py::tuple& layers, const py::tuple& rule,
                 const py::tuple& tensors) {
  Reader read(tensors);
  const std::vector<LSTMLayerArguments> all = read_lstm_layers(layers);
  const std::vector<RuleArguments> rules = read_rules(rule, all.size());
  std::vector<LSTMRowsArguments> rows(all.size());
  LSTMUpdate a;
  a.depth = static_cast<std::int64_t>(all.size());
  a.hidden = read.integer();
  a.threads = static_cast<int>(read.integer());
  for (LSTMRowsArguments& layer : rows) {
    layer.rows = read.integer();
    layer.in = read.integer();
    layer.input = read.pointer();
    layer.hidden = read.pointer();
    layer.delta = read.pointer();
  }
  read.finish();
  a.layers = all.data();
  a.rows = rows.data();
  a.rules = rules.data();
  call(kernels().lstm_update, type, a);
}

void lstm_cell_forward(std::size_t type, const py::tuple& layer, const py::tuple& tensors) {
  Reader read(tensors);
  LSTMCellForward a;
  a.sizes = read_sizes(read);
  a.layer = read_lstm_layer(layer);
  a.x = read.pointer();
  a.h = read.pointer();
  a.c = read.pointer();
  a.next_h = read.pointer();
  a.next_c = read.pointer();
  a.gates = read.pointer();
  read.finish();
  call(kernels().lstm_cell_forward, type, a);
}

void lstm_cell_backward(std::size_t type, const py::tuple& layer, const py::tuple& gradients,
                        const py::tuple& tensors) {
  Reader read(tensors);
  LSTMCellBackward a;
  a.sizes = read_sizes(read);
  a.layer = read_lstm_layer(layer);
  a.gradients = read_lstm_layer(gradients);
  a.grad_next_h = read.pointer();
  a.grad_next_c = read.pointer();
  a.x = read.pointer();
  a.h = read.pointer();
  a.c = read.pointer();
  a.next_c = read.pointer();
  a.gates = read.pointer();
  a.delta = read.pointer();
  a.grad_h = read.pointer();
  a.grad_c = read.pointer();
  a.grad_x = read.pointer();
  read.finish();
  call(kernels().lstm_cell_backward, type, a);
}

}  // namespace
}  // namespace fused_dni

PYBIND11_MODULE(_cpu, m) {
  using namespace fused_dni;
  m.doc() = "Kernels for CPUs; fused_dni/backends/cpu.py is their face.";
  m.attr("compiler") = __VERSION__;
  m.def("isa", &isa, "The instruction set in use: 'portable', 'avx2' or 'avx512'.");
  m.def("isas", &isas, "The instruction sets that can be used here, narrowest first.");
  m.def("wider", &wider, "A wider one that this machine can run and this build has not; or ''.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (set_isa(name)) return;
        std::string known;
        for (const std::string& each : isas()) known += (known.empty() ? "" : ", ") + each;
        throw py::value_error("instruction set '" + name +
                              "' cannot run here; available: " + known);
      },
      py::arg("name"), "Use another instruction set, for tests and comparisons.");
  m.def(
      "max_threads", [] { return omp_get_max_threads(); },
      "Threads of the OpenMP pool, which is PyTorch's if PyTorch was imported first.");
  m.def(
      "bf16", [] { return kernels().linear_step[2] != nullptr; },
      "Whether the linear layer's kernels multiply bfloat16 operands.");
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("linear_update", &linear_update);
  m.def("linear_step", &linear_step);
  m.def("synthesizer_predict", &synthesizer_predict);
  m.def("synthesizer_train", &synthesizer_train);
  m.def("lstm_forward", &lstm_forward);
  m.def("lstm_backward", &lstm_backward);
  m.def("lstm_close", static_cast<std::int64_t (*)(
                          std::size_t, const py::tuple&, const py::tuple&, const py::tuple&,
                          const py::tuple&, const py::tuple&, const py::tuple&)>(&lstm_close));
  m.def("lstm_update", &lstm_update);
  m.def("lstm_cell_forward", &lstm_cell_forward);
  m.def("lstm_cell_backward", &lstm_cell_backward);
}
