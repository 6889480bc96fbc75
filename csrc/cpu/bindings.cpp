// Python bindings. Tensors come as addresses (0: not there) that fused_dni/backends/cpu.py has
// checked; arguments come as tuples in the order of ops.hpp's structs, because reading a tuple
// costs a tenth of what pybind11 takes to convert as many arguments.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "dispatch.hpp"
#include "ops.hpp"
#include "quick.hpp"
#include "reading.hpp"
#include "region.hpp"

namespace py = pybind11;

namespace fused_dni {
namespace {

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

// The same of an op that may stand in a region with others, alone in its own.
template <class Arguments, std::size_t kTypes>
void call(Op* (*const (&make)[kTypes])(const Arguments&), std::size_t type,
          const Arguments& arguments) {
  if (type >= kTypes || make[type] == nullptr)
    throw py::type_error("no kernel for elements of type " + std::to_string(type));
  py::gil_scoped_release release;
  Ops ops;
  ops.add(make[type](arguments));
  ops.run();
}

void linear_forward(std::size_t type, const py::tuple& layer, const py::tuple& tensors) {
  Reader read(tensors);
  LinearForward a{};
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
  LinearBackward a{};
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
  LinearUpdate a{};
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
  LinearStep a{};
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

void linear_cross_entropy(std::size_t type, const py::tuple& layer, const py::tuple& tensors) {
  Reader read(tensors);
  LinearCrossEntropy a{};
  a.layer = read_layer(layer);
  a.smoothing = read.real();
  a.ignored = read.integer();
  a.x = read.memory("input", a.layer.rows);
  a.target = read.memory<const std::int64_t>("target", a.layer.rows);
  a.loss = read.memory("the loss");
  a.delta = read.pointer();
  read.finish();
  const std::int64_t wrong =
      check_targets(a.target, a.layer.rows, a.layer.out, a.ignored, a.counted);
  if (wrong < a.layer.rows)
    throw py::index_error("target " + std::to_string(a.target[wrong]) + " (row " +
                          std::to_string(wrong) + ") is outside [0, " +
                          std::to_string(a.layer.out) + ")");
  call(kernels().linear_cross_entropy, type, a);
}

void synthesizer_predict(std::size_t type, const py::tuple& synthesizer, const py::tuple& tensors) {
  Reader read(tensors);
  SynthesizerPredict a{};
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
      "met",
      [] {
        const Met seen = met();
        return std::tuple(seen.regions, seen.barriers, seen.taken, seen.alone);
      },
      "Parallel regions that kernels have begun so far, barriers that their threads have met at, "
      "shares that another thread took over, and regions of several that the caller ran alone.");
  m.def(
      "bf16", [] { return kernels().linear_step[2] != nullptr; },
      "Whether the linear layer's kernels multiply bfloat16 operands.");
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("linear_update", &linear_update);
  m.def("linear_step", &linear_step);
  m.def("linear_cross_entropy", &linear_cross_entropy);
  bind_quick(m);
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
