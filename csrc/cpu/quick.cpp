// A linear layer's training step, from the module's call to its result, with no Python code in
// between. What that code would have looked at is looked at here: where anything is not as it was
// when the step was bound, the answer is None, nothing was done, and the module goes its usual way.
//
// Everything is read through Python's objects and DLPack's table, so that no header of torch is
// needed.
#include "quick.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "dlpack.hpp"
#include "reading.hpp"
#include "region.hpp"

namespace fused_dni {
namespace {

using Object = py::object;

// A new reference; null where Python raised.
Object taken(PyObject* made) { return py::reinterpret_steal<Object>(made); }

Object attribute(const Object& of, const Object& name) {
  return taken(PyObject_GetAttr(of.ptr(), name.ptr()));
}
Object asked(const Object& of, const Object& name) {
  return taken(PyObject_CallMethodNoArgs(of.ptr(), name.ptr()));
}

// Names that are looked up in every step, made once and kept for as long as Python runs.
struct Names {
  Object lessons = py::str("lessons"), lr = py::str("lr"), narrow = py::str("narrow"),
         negative = py::str("is_neg"), new_empty = py::str("new_empty"),
         requires_grad = py::str("requires_grad"), size = py::str("size"), to = py::str("to"),
         version = py::str("_version"), view = py::str("view"), written = py::str("_written"),
         zero = py::str("_is_zerotensor");
};
const Names& names() {
  static const Names* made = new Names;
  return *made;
}

// The very object, or an integer of the same value. (Other objects' == may do anything.)
bool same(PyObject* found, PyObject* wanted) {
  if (found == wanted) return found != nullptr;
  if (found == nullptr || !PyLong_CheckExact(found) || !PyLong_CheckExact(wanted)) return false;
  return PyObject_RichCompareBool(found, wanted, Py_EQ) == 1;
}

// ---- What has to be as it was --------------------------------------------------------------------

enum CheckKind : int {
  kItem,        // of[name] is wanted
  kItemsValue,  // of[name].more is wanted
  kAttribute,   // of.name is wanted
  kMethod,      // of.name() is wanted
  kState,       // of() is wanted
  kEmpty,       // of has no items
  kAbsent,      // of has no item of that name
  kMemory,      // of is a tensor in the memory that it was in
};

// Where a tensor lies, and what lies there.
struct Place {
  void* at = nullptr;
  std::int64_t elements = 0;
  std::uint8_t code = 0, bits = 0;

  static std::optional<Place> of(PyObject* tensor) {
    dlpack::View seen;
    if (!dlpack::view(tensor, seen) || seen.device != dlpack::kCpu || seen.lanes != 1 ||
        !seen.contiguous())
      return std::nullopt;
    return Place{seen.address(), seen.elements(), seen.code, seen.bits};
  }
  bool operator==(const Place& other) const {
    return at == other.at && elements == other.elements && code == other.code && bits == other.bits;
  }
};

struct Check {
  int kind;
  std::array<Object, 4> objects;  // of, name, more, wanted: as many as it takes
  std::optional<Place> place;     // of kMemory

  Check(int what, std::array<Object, 4> given) : kind(what), objects(std::move(given)) {
    if (kind == kMemory) place = Place::of(objects[0].ptr());
  }

  bool holds() const {
    const auto& [of, name, more, wanted] = objects;
    switch (kind) {
      case kItem: return same(PyDict_GetItemWithError(of.ptr(), name.ptr()), wanted.ptr());
      case kItemsValue: {
        PyObject* value = PyDict_GetItemWithError(of.ptr(), name.ptr());
        return value && same(taken(PyObject_GetAttr(value, more.ptr())).ptr(), wanted.ptr());
      }
      case kAttribute: return same(attribute(of, name).ptr(), wanted.ptr());
      case kMethod: return same(asked(of, name).ptr(), wanted.ptr());
      case kState: return same(taken(PyObject_CallNoArgs(of.ptr())).ptr(), wanted.ptr());
      case kEmpty: return PyObject_Length(of.ptr()) == 0;
      case kAbsent: return PyDict_Contains(of.ptr(), name.ptr()) == 0;
      case kMemory: return place && Place::of(of.ptr()) == place;
    }
    return false;
  }
};

class Guard {
 public:
  Guard() = default;
  explicit Guard(const py::handle& rows) {
    for (const py::handle& each : rows) {
      const auto row = py::reinterpret_borrow<py::tuple>(each);
      checks_.emplace_back(row[0].cast<int>(),
                           std::array<Object, 4>{row[1], row[2], row[3], row[4]});
    }
  }

  bool holds() const { return broken() == checks_.size(); }
  // The first that does not hold; their number if all do.
  std::size_t broken() const {
    std::size_t i = 0;
    while (i < checks_.size() && checks_[i].holds()) ++i;
    if (i < checks_.size()) PyErr_Clear();  // whatever it was, the usual way says it better
    return i;
  }
  std::size_t size() const { return checks_.size(); }

  template <class Visit>
  void each(const Visit& visit) {
    for (Check& check : checks_)
      for (Object& object : check.objects) visit(object);
  }

 private:
  std::vector<Check> checks_;
};

// A guard as Python asks it: for calls whose checks alone are made here.
class Watch {
 public:
  explicit Watch(const py::handle& rows) : guard_(rows) {}

  bool holds() const { return guard_.holds(); }
  // The first that does not hold; None if all do.
  Object changed() const {
    const std::size_t at = guard_.broken();
    return at < guard_.size() ? Object(py::int_(at)) : Object(py::none());
  }

  template <class Visit>
  void each(const Visit& visit) {
    guard_.each(visit);
  }

 private:
  Guard guard_;
};

// A rule as it was when the step was bound. Of its hyper-parameters the rate may change, which is
// written where the usual way would look for it.
class LiveRule {
 public:
  LiveRule(const py::tuple& arguments, Object group, Object state)
      : rule_(read_rule(arguments)), group_(std::move(group)), state_(std::move(state)) {}

  const RuleArguments& arguments() const { return rule_; }
  bool read(double& rate) const {
    PyObject* lr = PyDict_GetItemWithError(group_.ptr(), names().lr.ptr());
    if (lr == nullptr || !PyFloat_CheckExact(lr)) return false;
    rate = PyFloat_AS_DOUBLE(lr);
    return rate >= 0.0 && std::isfinite(rate);
  }
  void write(double rate) const {
    if (*rule_.hyper == rate) return;
    *rule_.hyper = rate;
    if (PyDict_SetItem(state_.ptr(), names().written.ptr(), py::tuple().ptr()) < 0)
      throw py::error_already_set();
  }

  template <class Visit>
  void each(const Visit& visit) {
    visit(group_);
    visit(state_);
  }

 private:
  RuleArguments rule_;
  Object group_, state_;
};

// ---- Tensors ---------------------------------------------------------------------------------------

struct Memory {
  std::int64_t rows = 0;
  void* at = nullptr;
};

// A type of elements, as DLPack says it.
struct Element {
  std::uint8_t code, bits;
};
constexpr Element kInt64{dlpack::kInt, 64}, kFloat32{dlpack::kFloat, 32},
    kBfloat16{dlpack::kBfloat, 16};

// Whether t is a torch.Tensor in plain memory: [rows, columns] or, with columns 0, [rows].
bool plain(const Object& t, const Object& type, Element element, std::int64_t columns,
           Memory& memory) {
  dlpack::View seen;
  if (reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())) != type.ptr() || !dlpack::view(t.ptr(), seen) ||
      !seen.is(element.code, element.bits) || seen.dimensions != (columns ? 2 : 1) ||
      (columns && seen.shape[1] != columns) || !seen.contiguous() ||
      asked(t, names().negative).ptr() != Py_False ||
      asked(t, names().zero).ptr() != Py_False)  // of which DLPack tells an offset from nowhere
    return false;
  memory.rows = seen.shape[0];
  memory.at = seen.address();
  return true;
}

// The value of a torch.Tensor [] in plain memory.
bool scalar(const Object& t, const Object& type, Element element, double& value) {
  dlpack::View seen;
  if (reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())) != type.ptr() || !dlpack::view(t.ptr(), seen) ||
      !seen.is(element.code, element.bits) || seen.dimensions != 0 ||
      asked(t, names().negative).ptr() != Py_False || asked(t, names().zero).ptr() != Py_False)
    return false;
  value = element.bits == 64 ? *static_cast<const double*>(seen.address())
                             : static_cast<double>(*static_cast<const float*>(seen.address()));
  return true;
}

Object new_empty(const Object& like, std::int64_t rows, std::int64_t columns) {
  return like.attr(names().new_empty)(rows, columns);
}
// Of a tensor made here, or None.
void* address(const Object& t) {
  dlpack::View seen;
  return !t || t.is_none() || !dlpack::view(t.ptr(), seen) ? nullptr : seen.address();
}

// Where pieces lie in one tensor that holds them all.
class Layout {
 public:
  explicit Layout(Element element) : unit_(512 / element.bits) {}

  std::int64_t take(std::int64_t elements) {  // begins on a cache line's multiple
    const std::int64_t at = used_;
    used_ += (elements + unit_ - 1) / unit_ * unit_;
    return at;
  }
  std::int64_t size() const { return used_; }

 private:
  std::int64_t unit_, used_ = 0;
};
constexpr std::int64_t kNowhere = -1;

// ---- What all quick steps are ----------------------------------------------------------------------

// What one call of a layer is run with.
struct Batch {
  Memory x;
  int threads = 1;
  double rate = 0.0;
  bool requires_grad = false;  // of x
  bool asks = false;           // whether whoever made x wants a gradient for it
};

// Which of all the checks does not hold, counted through; None if all do.
Object changed_of(std::initializer_list<const Guard*> guards) {
  std::size_t before = 0;
  for (const Guard* guard : guards) {
    const std::size_t at = guard->broken();
    if (at < guard->size()) return py::int_(before + at);
    before += guard->size();
  }
  return py::none();
}

class Quick {
 public:
  explicit Quick(const py::dict& parts)
      : module_(parts["module"]),
        tensor_(parts["tensor"]),
        mark_(parts["mark"]),
        threads_(parts["threads"]),
        increment_(parts["increment"]),
        type_(parts["type"].cast<std::size_t>()),
        element_{dlpack::kFloat, static_cast<std::uint8_t>(type_ ? 64 : 32)},
        least_(parts["least"].cast<std::int64_t>()),
        layer_(read_layer(parts["layer"])),
        surroundings_(parts["surroundings"]),
        always_(parts["always"]),
        own_(parts["own"]),
        counter_(static_cast<std::int64_t*>(address(parts["counter"]))),
        rule_(parts["rule"], parts["group"], parts["state"]) {}

  const LayerArguments& layer() const { return layer_; }
  const Object& tensor() const { return tensor_; }
  Element element() const { return element_; }
  bool is(const Object& module) const { return module.is(module_); }
  Object changed() const { return changed_of({&surroundings_, &always_, &own_}); }
  bool surrounded() const { return surroundings_.holds() && always_.holds(); }
  bool uninspected() const { return always_.holds(); }
  bool unchanged() const { return own_.holds(); }

  // Whether the input is one that this serves.
  bool takes(const Object& input, Batch& batch) const {
    if (!plain(input, tensor_, element_, layer_.in, batch.x)) return cleared();
    batch.requires_grad = attribute(input, names().requires_grad).ptr() == Py_True;
    batch.asks = batch.requires_grad && !marked(input);
    return counts(batch) || cleared();
  }
  // The same where bfloat16 is multiplied: `read`, which is the input, or the rounded copy of one in
  // float32 that wants no gradient.
  bool takes(const Object& input, const Object& bfloat16, Object& read, Batch& batch) const {
    batch.requires_grad = attribute(input, names().requires_grad).ptr() == Py_True;
    batch.asks = batch.requires_grad && !marked(input);
    if (!plain(input, tensor_, kBfloat16, layer_.in, batch.x)) {
      if (!plain(input, tensor_, kFloat32, layer_.in, batch.x) || batch.requires_grad)
        return cleared();
      read = input.attr(names().to)(bfloat16);
    }
    return multiplies(read, true, batch);
  }
  // Whether x is what a forward multiplied.
  bool multiplies(const Object& x, bool narrow, Batch& batch) const {
    return (plain(x, tensor_, narrow ? kBfloat16 : element_, layer_.in, batch.x) &&
            counts(batch)) ||
           cleared();
  }
  // Whether so many rows are enough, and with how many threads and which rate.
  bool counts(Batch& batch) const {
    const Object threads = taken(PyObject_CallNoArgs(threads_.ptr()));
    batch.threads = threads ? static_cast<int>(PyLong_AsLong(threads.ptr())) : 0;
    return batch.threads > 0 && follows(batch);
  }
  // The same where the threads are known: of a layer behind another.
  bool follows(Batch& batch) const { return batch.x.rows >= least_ && rule_.read(batch.rate); }

  Object result(const Object& like, std::int64_t rows) const {
    return new_empty(like, rows, layer_.out);
  }
  LayerArguments over(const Batch& batch) const {
    LayerArguments layer = layer_;
    layer.rows = batch.x.rows;
    layer.threads = batch.threads;
    return layer;
  }
  void count_batch() const {
    if (counter_) ++*counter_;
  }
  void wrote(const Object& tensors) const { increment_(tensors); }
  void mark(const Object& h) const { py::setattr(h, mark_, h.attr(names().version)); }

  // For Python's collector: what is held leads back to the module that holds this.
  template <class Visit>
  void each(const Visit& visit) {
    for (Guard* guard : {&surroundings_, &always_, &own_}) guard->each(visit);
    rule_.each(visit);
    for (Object* object : {&module_, &tensor_, &mark_, &threads_, &increment_}) visit(*object);
  }

  static bool cleared() {
    PyErr_Clear();
    return false;
  }

 protected:
  Object module_, tensor_, mark_, threads_, increment_;
  std::size_t type_;  // 0 float, 1 double
  Element element_;
  std::int64_t least_;
  LayerArguments layer_;
  Guard surroundings_, always_, own_;  // always_: of a backward's surroundings too
  std::int64_t* counter_;              // of batches; null for none
  LiveRule rule_;

 private:
  // Whether whoever made it wants no gradient for it in this step.
  bool marked(const Object& t) const {
    const Object mark = attribute(t, mark_);
    if (!mark) return cleared();
    return same(mark.ptr(), attribute(t, names().version).ptr());
  }
};

// ---- A step whose gradient is predicted ------------------------------------------------------------

// What is told of a call, and kept alive.
struct Told {
  Object labels;  // None for none
  const std::int64_t* at = nullptr;
};

// The prediction that a lesson is about.
SynthesizerPredict predicting(const SynthesizerTrain& lesson, void* scaled, void* reduced) {
  SynthesizerPredict made{};
  made.synthesizer = lesson.synthesizer;
  made.rows = lesson.rows;
  made.features = lesson.features;
  made.threads = lesson.threads;
  made.h = lesson.h;
  made.scaled = scaled;
  made.reduced = reduced;
  made.transposed = lesson.transposed;
  return made;
}

// What a synthesizer is taught of one gradient: a lesson, and as many behind it, each from a
// prediction of its own, which takes the memory of the one before. To be added to one region.
class Course {
 public:
  Course(const SynthesizerTrain& first, void* scaled, void* reduced, std::int64_t lessons) {
    lessons_.push_back(first);
    lessons_.back().again = lessons > 1;
    for (std::int64_t i = 1; i < lessons; ++i) {
      predict(first, scaled, reduced);
      SynthesizerTrain& next = lessons_.emplace_back(first);
      next.scaled = scaled;
      next.reduced = reduced;
      next.statistics =
          nullptr;  // which tell of the first, whose prediction was the one that counted
      next.rule.ahead = i;
      next.again = i + 1 < lessons;
    }
  }
  // One whose first prediction is made here too.
  static Course from_the_start(const SynthesizerTrain& first, void* scaled, void* reduced,
                               std::int64_t lessons) {
    Course course(first, scaled, reduced, lessons);
    course.predict(first, scaled, reduced);
    course.lessons_.front().scaled = scaled;
    course.lessons_.front().reduced = reduced;
    return course;
  }

  void add(Ops& ops, std::size_t type) const {
    auto prediction = predictions_.begin();
    for (auto lesson = lessons_.begin(); lesson != lessons_.end(); ++lesson) {
      if (lesson != lessons_.begin() || predictions_.size() == lessons_.size())
        ops.add(kernels().synthesizer_predict[type](*prediction++));
      ops.add(kernels().synthesizer_train[type](*lesson));
    }
  }

 private:
  void predict(const SynthesizerTrain& lesson, void* scaled, void* reduced) {
    predictions_.push_back(predicting(lesson, scaled, reduced));
  }

  // Ops are made of references to these.
  std::deque<SynthesizerPredict> predictions_;
  std::deque<SynthesizerTrain> lessons_;
};

// The gradient at h that a layer is updated from, in the place of its prediction: `share` of what
// arrived, and of what is predicted the rest.
struct Mixture {
  std::int64_t rows, columns, stride;        // of the prediction as it lies
  std::int64_t arrived_row, arrived_column;  // from one element to the next of what arrived
  const void* arrived;
  void* scaled;  // the prediction, times `scale`
  double share, scale;
  int threads;
};

template <class T>
class Mix : public Op {
 public:
  explicit Mix(const Mixture& from) : a(from) {
    threads = a.rows * a.columns < 64 * 1024 ? 1 : a.threads;  // some microseconds
    open = true;
  }

  void plan(Scratch&) override {}

  // Rounded as the tensors' own operations are: this file is compiled to fuse none.
  void run(const Team& team) override {
    const T share = T(a.share), rest = T(1.0 - a.share), scale = T(a.scale);
    const std::int64_t end = a.rows * (team.rank + 1) / team.size;
    for (std::int64_t r = a.rows * team.rank / team.size; r < end; ++r) {
      T* to = static_cast<T*>(a.scaled) + r * a.stride;
      const T* from = static_cast<const T*>(a.arrived) + r * a.arrived_row;
      for (std::int64_t c = 0; c < a.columns; ++c)
        to[c] = share * from[c * a.arrived_column] + rest * (to[c] / scale);
    }
  }

 private:
  const Mixture& a;
};

// How a step is run: without a target, with one, or by nobody here.
enum class Way { kUntaught, kTaught, kUsual };

// What a step leaves; null where there is none.
struct Made {
  void *h = nullptr, *scaled = nullptr, *reduced = nullptr, *dx = nullptr;
  void* narrow = nullptr;  // h in bfloat16
};
// The same as tensors; None where there is none.
struct Handed {
  Object h, scaled, reduced, dx;

  Made made() const { return {address(h), address(scaled), address(reduced), address(dx)}; }
};

class QuickStep : public Quick {
 public:
  explicit QuickStep(const py::dict& parts)
      : Quick(parts),
        untaught_(parts["untaught"]),
        taught_(parts["taught"]),
        synthesizer_(read_synthesizer(parts["synthesizer"], 0)),
        labels_(parts["labels"].cast<bool>()),
        context_(parts["context"]),
        unit_(parts["unit"]),
        written_(parts["written"]),
        learned_(parts["learned"]),
        last_(parts["last"]),
        max_norm_(parts["max_norm"].cast<double>()),
        preactivation_(parts["preactivation"].cast<bool>()),
        given_kappa_(!parts["kappa"].is_none()),
        kappa_(given_kappa_ ? parts["kappa"].cast<double>() : 0.0),
        statistics_(static_cast<double*>(address(parts["statistics"]))),
        lessons_(parts["lessons"].cast<std::int64_t>()),
        earliest_(parts["earliest"].cast<std::int64_t>()),
        interval_(parts["interval"].cast<std::int64_t>()) {
    if (!parts["teacher"].is_none())
      teacher_.emplace(parts["teacher"], parts["teacher group"], parts["teacher state"]);
  }

  // Of a step without a target h. Of one with a target a tuple: h, what the lesson reads (M(h), and
  // of a low rank what is between; None for none), dx or None, the labels or None, the unit. Or None.
  Object call(const Object& module, const Object& input, const Object& context) const {
    Batch batch;
    Told told{context, nullptr};
    const Way way = is(module) && surrounded() ? this->way() : Way::kUsual;
    if (way == Way::kUsual || !takes(input, batch) || !tells(told, batch.x.rows) || !sized())
      return py::none();
    const bool target = way == Way::kTaught;
    if (!target && batch.requires_grad) return py::none();
    const Handed made = hands(input, batch.x.rows, target, batch.asks);
    const LinearStep step = stepping(batch, told, made.made());
    {
      py::gil_scoped_release release;
      Ops ops;
      add(step, ops);
      ops.run();
    }
    count_batch();
    wrote(written_);
    last_();
    return returned(made, target, told);
  }

  // The synthesizer's lessons; whether they were given.
  bool learn(const Object& h, const Object& scaled, const Object& reduced, const Object& labels,
             const Object& unit, const Object& arrived, std::int64_t lessons) const {
    Memory seen, gradient;
    Batch batch;
    Told told{labels, nullptr};
    if (preactivation_ || !uninspected() || !unchanged() ||
        !plain(h, tensor_, element_, layer_.out, seen) ||
        !plain(arrived, tensor_, element_, layer_.out, gradient) || seen.rows != gradient.rows)
      return cleared();
    batch.x.rows = gradient.rows;
    if (!stays(unit) || !counts(batch) || !tells(told, gradient.rows) || !teachable())
      return cleared();
    const Handed made{h, scaled, reduced, {}};
    Handed again;  // which the given prediction's memory is not for
    if (lessons > 1) {
      again.scaled = new_empty(h, gradient.rows, layer_.out);
      if (rank()) again.reduced = new_empty(h, gradient.rows, rank());
    }
    const Course course(teaching(batch, told, made.made(), gradient.at), address(again.scaled),
                        address(again.reduced), lessons);
    {
      py::gil_scoped_release release;
      Ops ops;
      add(course, ops);
      ops.run();
    }
    count_lesson();
    wrote(learned_);
    return true;
  }

  // ---- The same in parts, for stacks ---------------------------------------------------------------

  Way way() const {
    if (!unchanged()) return Way::kUsual;
    if (untaught_.holds()) return Way::kUntaught;
    return taught_.holds() && !preactivation_ ? Way::kTaught : Way::kUsual;
  }
  // The labels, given or of the context.
  bool tells(Told& told, std::int64_t rows) const {
    if (!labels_) return told.labels.is_none();
    if (told.labels.is_none()) {
      PyObject* value = nullptr;
      if (PyContextVar_Get(context_.ptr(), nullptr, &value) < 0) return cleared();
      told.labels = taken(value);
      if (!told.labels) return false;
    }
    Memory memory;
    if (!plain(told.labels, tensor_, kInt64, 0, memory) || memory.rows != rows) return cleared();
    told.at = static_cast<const std::int64_t*>(memory.at);
    for (std::int64_t n = 0; n < rows; ++n)
      if (told.at[n] < 0 || told.at[n] >= synthesizer_.classes) return false;
    return true;
  }
  bool sized() const {
    const Object unit = attribute(unit_, names().size);
    return (unit && PyFloat_CheckExact(unit.ptr())) || cleared();
  }
  // Whether the unit is that of a prediction.
  bool stays(const Object& unit) const {
    const Object now = attribute(unit_, names().size);
    return (now && PyObject_RichCompareBool(now.ptr(), unit.ptr(), Py_EQ) == 1) || cleared();
  }
  // Whether the rule of the lessons could be applied now.
  bool ruled() const {
    double rate = 0.0;
    return teacher_ && teacher_->read(rate);
  }
  // Whether the coming lesson is one in which the unit stays as it is.
  bool teachable() const {
    if (!ruled()) return false;
    if (given_kappa_) return true;
    const Object lessons = attribute(unit_, names().lessons);
    if (!lessons || !PyLong_CheckExact(lessons.ptr())) return cleared();
    const std::int64_t n = PyLong_AsLongLong(lessons.ptr()) + 1;
    if (n < earliest_) return n != 1;
    return (n & (n - 1)) != 0 && n % interval_ != 0;
  }
  // Tensors for what a step leaves.
  Handed hands(const Object& like, std::int64_t rows, bool target, bool need_dx) const {
    const auto wanted = [&](bool there, std::int64_t columns) {
      return there ? new_empty(like, rows, columns) : Object(py::none());
    };
    return {wanted(true, layer_.out), wanted(target, layer_.out),
            wanted(target && synthesizer_.down, synthesizer_.rank), wanted(need_dx, layer_.in)};
  }
  // What a step returns to Python.
  Object returned(const Handed& made, bool target, const Told& told) const {
    if (!target) {
      mark(made.h);
      return made.h;
    }
    return py::make_tuple(made.h, made.scaled, made.reduced, made.dx, told.labels, unit());
  }
  // The step, of which all is done but what run() does, which needs no interpreter.
  LinearStep stepping(const Batch& batch, const Told& told, const Made& made) const {
    LinearStep step{};
    step.layer = over(batch);
    step.synthesizer = told_by(told, batch.x.rows);
    step.rule = rule_.arguments();
    step.target_scale = scale(batch.x.rows);
    step.max_norm = max_norm_;
    step.preactivation = preactivation_;
    step.x = batch.x.at;
    step.h = made.h;
    step.scaled = made.scaled;
    step.reduced = made.reduced;
    step.grad_x = made.dx;
    rule_.write(batch.rate);
    return step;
  }
  void add(const LinearStep& step, Ops& ops, bool narrow = false) const {
    ops.add(kernels().linear_step[narrow ? 2 : type_](step));
  }
  SynthesizerTrain teaching(const Batch& batch, const Told& told, const Made& made,
                            const void* arrived) const {
    SynthesizerTrain lesson{};
    lesson.synthesizer = told_by(told, batch.x.rows);
    lesson.rows = batch.x.rows;
    lesson.features = layer_.out;
    lesson.threads = batch.threads;
    lesson.target_scale = scale(batch.x.rows);
    lesson.h = made.h;
    lesson.scaled = made.scaled;
    lesson.reduced = made.reduced;
    lesson.grad_h = arrived;
    lesson.statistics = statistics_;
    lesson.update = true;
    lesson.rule = teacher_->arguments();
    double rate = 0.0;
    teacher_->read(rate);
    teacher_->write(rate);
    return lesson;
  }
  void add(const Course& course, Ops& ops) const { course.add(ops, type_); }
  void add(const SynthesizerPredict& prediction, Ops& ops) const {
    ops.add(kernels().synthesizer_predict[type_](prediction));
  }
  void add(const Mixture& mixture, Ops& ops) const {
    ops.add(type_ ? static_cast<Op*>(new Mix<double>(mixture)) : new Mix<float>(mixture));
  }
  // To be called behind a lesson that was given.
  void count_lesson() const {
    if (given_kappa_) return;
    const Object lessons = unit_.attr(names().lessons);
    py::setattr(unit_, names().lessons, py::int_(PyLong_AsLongLong(lessons.ptr()) + 1));
  }
  const Object& written() const { return written_; }
  const Object& learned() const { return learned_; }
  const Object& last() const { return last_; }
  Object unit() const { return unit_.attr(names().size); }
  std::int64_t rank() const { return synthesizer_.down ? synthesizer_.rank : 0; }
  std::int64_t lessons() const { return lessons_; }  // of a step with a target
  bool labelled() const { return labels_; }

  template <class Visit>
  void each(const Visit& visit) {
    Quick::each(visit);
    untaught_.each(visit);
    taught_.each(visit);
    if (teacher_) teacher_->each(visit);
    for (Object* object : {&context_, &unit_, &written_, &learned_, &last_}) visit(*object);
  }

 private:
  double scale(std::int64_t rows) const {
    const double kappa = given_kappa_ ? kappa_ : static_cast<double>(rows);
    return kappa / PyFloat_AsDouble(attribute(unit_, names().size).ptr());
  }
  SynthesizerArguments told_by(const Told& told, std::int64_t rows) const {
    SynthesizerArguments synthesizer = synthesizer_;
    synthesizer.labels = told.at;
    synthesizer.counted = told.at ? rows : 0;
    return synthesizer;
  }

  Guard untaught_, taught_;
  SynthesizerArguments synthesizer_;
  std::optional<LiveRule> teacher_;  // none before its first lesson
  bool labels_;                      // whether the synthesizer is told labels
  Object context_, unit_, written_, learned_, last_;
  double max_norm_;
  bool preactivation_, given_kappa_;
  double kappa_;
  double* statistics_;
  std::int64_t lessons_, earliest_, interval_;
};

// ---- A step by the true gradient ---------------------------------------------------------------------

// What a forward leaves for the backward; null where that reads nothing.
struct Kept {
  void *h = nullptr, *normalized = nullptr, *rstd = nullptr;
  void* narrow = nullptr;  // h in bfloat16, where the next layer multiplies that

  void* multiplied() const { return narrow ? narrow : h; }
};
// What a backward makes: of x if it is wanted, at z, and of bias, scale and shift where there are any.
struct Gradients {
  void *x = nullptr, *delta = nullptr, *bias = nullptr, *scale = nullptr, *shift = nullptr;
};

class QuickExact : public Quick {
 public:
  explicit QuickExact(const py::dict& parts)
      : Quick(parts),
        moved_(parts["moved"]),
        written_(parts["written"]),
        keeps_(parts["keeps"].cast<bool>()) {}

  // h, normalized and rstd or None, whether x wants a gradient; or None.
  Object forward(const Object& module, const Object& input, const Object& context) const {
    Batch batch;
    if (!is(module) || !context.is_none() || !surrounded() || !unchanged() || !takes(input, batch))
      return py::none();
    const std::int64_t rows = batch.x.rows;
    const Object h = new_empty(input, rows, layer_.out);
    Object normalized = py::none(), rstd = py::none();
    if (keeps_) normalized = new_empty(input, rows, layer_.out);
    if (layer_.normalization) rstd = input.attr(names().new_empty)(statistics(rows));
    const LinearForward forward = going(batch, {address(h), address(normalized), address(rstd)});
    {
      py::gil_scoped_release release;
      Ops ops;
      add(forward, ops);
      ops.run();
    }
    count_batch();
    if (PyObject_Length(moved_.ptr()) > 0) wrote(moved_);
    return py::make_tuple(h, normalized, rstd, batch.asks);
  }

  // dx or None, delta, and the gradients of bias, scale and shift or None; or None.
  Object backward(const Object& arrived, const Object& x, const Object& h, const Object& normalized,
                  const Object& rstd, bool need_dx) const {
    Batch batch;
    Memory gradient;
    if (!uninspected() || !unchanged() || !arrives(arrived, batch, gradient)) {
      cleared();
      return py::none();
    }
    batch.x.at = address(x);
    const auto vector = [&](const void* there) {
      return there ? Object(x.attr(names().new_empty)(layer_.out)) : Object(py::none());
    };
    const Object delta = new_empty(x, gradient.rows, layer_.out), bias = vector(layer_.bias),
                 scale = vector(layer_.norm_weight), shift = vector(layer_.norm_bias);
    Object dx = py::none();
    if (need_dx) dx = new_empty(x, gradient.rows, layer_.in);
    const LinearBackward backward =
        returning(batch, gradient.at, {address(h), address(normalized), address(rstd)},
                  {address(dx), address(delta), address(bias), address(scale), address(shift)});
    {
      py::gil_scoped_release release;
      Ops ops;
      add(backward, ops);
      ops.run();
    }
    return py::make_tuple(dx, delta, bias, scale, shift);
  }

  // The update from x and the LinearGradients of fused_dni/ops/types.py; whether it was made.
  bool update(const Object& x, const py::tuple& made) const {
    Batch batch;
    Memory delta;
    if (!uninspected() || !unchanged() || !plain(x, tensor_, element_, layer_.in, batch.x) ||
        !plain(made[0], tensor_, element_, layer_.out, delta) || delta.rows != batch.x.rows ||
        !counts(batch))
      return cleared();
    const LinearUpdate update =
        updating(batch, {nullptr, delta.at, address(made[3]), address(made[4]), address(made[5])});
    {
      py::gil_scoped_release release;
      Ops ops;
      add(update, ops);
      ops.run();
    }
    wrote(written_);
    return true;
  }

  // ---- The same in parts, for stacks ---------------------------------------------------------------

  bool arrives(const Object& arrived, Batch& batch, Memory& gradient, bool narrow = false) const {
    if (!plain(arrived, tensor_, narrow ? kBfloat16 : element_, layer_.out, gradient)) return false;
    batch.x.rows = gradient.rows;
    return counts(batch);
  }
  LinearForward going(const Batch& batch, const Kept& kept) const {
    LinearForward a{};
    a.layer = over(batch);
    a.x = batch.x.at;
    a.h = kept.h;
    a.normalized = kept.normalized;
    a.rstd = kept.rstd;
    return a;
  }
  LinearBackward returning(const Batch& batch, const void* arrived, const Kept& kept,
                           const Gradients& made) const {
    LinearBackward a{};
    a.layer = over(batch);
    a.grad_h = arrived;
    a.x = batch.x.at;
    a.h = kept.h;
    a.normalized = kept.normalized;
    a.rstd = kept.rstd;
    a.delta = made.delta;
    a.grad_x = made.x;
    a.grad_bias = made.bias;
    a.grad_norm_weight = made.scale;
    a.grad_norm_bias = made.shift;
    return a;
  }
  LinearUpdate updating(const Batch& batch, const Gradients& made) const {
    LinearUpdate a{};
    a.layer = over(batch);
    a.layer.normalization = a.layer.activation = 0;  // what made delta does not matter
    a.layer.training = false;
    a.rule = rule_.arguments();
    a.x = batch.x.at;
    a.delta = made.delta;
    a.grad_bias = made.bias;
    a.grad_norm_weight = made.scale;
    a.grad_norm_bias = made.shift;
    rule_.write(batch.rate);
    return a;
  }
  void add(const LinearForward& forward, Ops& ops, bool narrow = false) const {
    ops.add(kernels().linear_forward[narrow ? 2 : type_](forward));
  }
  void add(const LinearBackward& backward, Ops& ops, bool narrow = false) const {
    ops.add(kernels().linear_backward[narrow ? 2 : type_](backward));
  }
  void add(const LinearUpdate& update, Ops& ops, bool narrow = false) const {
    ops.add(kernels().linear_update[narrow ? 2 : type_](update));
  }

  bool keeps() const { return keeps_; }
  // Elements of rstd; 0 for none.
  std::int64_t statistics(std::int64_t rows) const {
    return layer_.normalization == 0 ? 0 : layer_.normalization == 1 ? layer_.out : rows;
  }
  const Object& moved() const { return moved_; }
  const Object& written() const { return written_; }

  template <class Visit>
  void each(const Visit& visit) {
    Quick::each(visit);
    visit(moved_);
    visit(written_);
  }

 private:
  Object moved_, written_;
  bool keeps_;  // what the normalisation or the activation saw
};

// ---- The exact head ----------------------------------------------------------------------------------

// What a loss is taken of: the classes of the rows, and how many of these are in it.
struct Aim {
  const std::int64_t* at = nullptr;
  std::int64_t counted = 0;
};

// A linear layer and the cross-entropy of its outputs, by the true gradient.
class QuickLoss : public QuickExact {
 public:
  explicit QuickLoss(const py::dict& parts)
      : QuickExact(parts),
        smoothing_(parts["smoothing"].cast<double>()),
        ignored_(parts["ignored"].cast<std::int64_t>()) {}

  // The loss, its gradient at the logits, whether x wants a gradient; or None.
  Object forward(const Object& module, const Object& input, const Object& target) const {
    Batch batch;
    Aim aim;
    if (!is(module) || !surrounded() || !unchanged() || !takes(input, batch) ||
        !aims(target, batch.x.rows, aim))
      return py::none();
    const Object loss = new_loss(input), delta = new_empty(input, batch.x.rows, layer_.out);
    const LinearCrossEntropy forward = losing(batch, aim, address(loss), address(delta));
    {
      py::gil_scoped_release release;
      Ops ops;
      add(forward, ops);
      ops.run();
    }
    return py::make_tuple(loss, delta, batch.asks);
  }

  // dx or None, the gradients at the logits and of the bias, those of scale and shift that there are
  // not; or None. From the gradient at the loss, and its own at the logits.
  Object backward(const Object& arrived, const Object& x, const Object& delta, bool need_dx) const {
    Batch batch;
    double factor = 1.0;
    if (!uninspected() || !unchanged() || !arrives(arrived, factor) || !takes(x, batch)) {
      cleared();
      return py::none();
    }
    const std::int64_t rows = batch.x.rows;
    const Object scaled = new_empty(x, rows, layer_.out);
    Object dx = py::none(), bias = py::none();
    if (need_dx) dx = new_empty(x, rows, layer_.in);
    if (layer_.bias) bias = x.attr(names().new_empty)(layer_.out);
    const LinearBackward backward =
        returning(batch, factor, address(delta), {address(dx), address(scaled), address(bias)});
    {
      py::gil_scoped_release release;
      Ops ops;
      add(backward, ops);
      ops.run();
    }
    return py::make_tuple(dx, scaled, bias, py::none(), py::none());
  }

  // ---- The same in parts, for stacks ---------------------------------------------------------------

  bool aims(const Object& target, std::int64_t rows, Aim& aim) const {
    Memory memory;
    if (!plain(target, tensor_, kInt64, 0, memory) || memory.rows != rows) return cleared();
    aim.at = static_cast<const std::int64_t*>(memory.at);
    return check_targets(aim.at, rows, layer_.out, ignored_, aim.counted) == rows;
  }
  bool arrives(const Object& arrived, double& factor) const {
    return scalar(arrived, tensor_, element_, factor) || cleared();
  }
  Object new_loss(const Object& like) const { return like.attr(names().new_empty)(py::tuple()); }
  LinearCrossEntropy losing(const Batch& batch, const Aim& aim, void* loss, void* delta) const {
    LinearCrossEntropy a{};
    a.layer = over(batch);
    a.x = batch.x.at;
    a.target = aim.at;
    a.ignored = ignored_;
    a.counted = aim.counted;
    a.smoothing = smoothing_;
    a.loss = loss;
    a.delta = delta;
    return a;
  }
  // `delta` is what a forward left.
  LinearBackward returning(const Batch& batch, double factor, const void* delta,
                           const Gradients& made) const {
    Kept kept;
    kept.h = const_cast<void*>(delta);  // whose values do not matter: it is of the right size
    LinearBackward a = QuickExact::returning(batch, delta, kept, made);
    a.factor = factor;
    return a;
  }
  using QuickExact::add;
  void add(const LinearCrossEntropy& loss, Ops& ops) const {
    ops.add(kernels().linear_cross_entropy[type_](loss));
  }

 private:
  double smoothing_;
  std::int64_t ignored_;
};

// ---- Stacks ------------------------------------------------------------------------------------------

// Layers one behind the other, each of which reads what the one below made, and a head behind them
// if there is one. What only they read lies in one tensor.
template <class Step>
class Stack {
 public:
  // `autocast`: whether it is on, to which type, the one that is served, and float32.
  Stack(Object module, const py::handle& surroundings, const py::handle& own, py::list steps,
        Object head, const py::tuple& autocast)
      : autocast_(autocast[0]),
        autocast_type_(autocast[1]),
        bfloat16_(autocast[2]),
        float32_(autocast[3]),
        module_(std::move(module)),
        surroundings_(surroundings),
        own_(own),
        steps_(std::move(steps)),
        last_(std::move(head)),
        head_(last_.is_none() ? nullptr : last_.cast<const QuickLoss*>()) {
    for (const py::handle& each : steps_) layers_.push_back(each.cast<const Step*>());
  }

  Object changed() const { return changed_of({&surroundings_, &own_}); }

  template <class Visit>
  void each(const Visit& visit) {
    surroundings_.each(visit);
    own_.each(visit);
    visit(module_);
    visit(static_cast<Object&>(steps_));
    for (Object* object : {&last_, &autocast_, &autocast_type_, &bfloat16_, &float32_})
      visit(*object);
  }

 protected:
  using Offsets = std::vector<std::int64_t>;

  bool stands(const Object& module) const {
    return module.is(module_) && surroundings_.holds() && layers_[0]->uninspected() && own_.holds();
  }
  Element element() const { return layers_[0]->element(); }
  // Whether matrices of the batch stay transposed between kernels: not so few rows that a product
  // runs along features.
  static bool inside(std::int64_t rows) { return rows > kDotRows; }
  // Whether the first layer takes the input of this call, and what it multiplies: under autocast
  // `read` is in bfloat16.
  bool takes(const Object& input, Object& read, bool& narrow, Batch& batch) const {
    const std::optional<bool> found = narrows();
    read = input;
    narrow = found.value_or(false);
    if (!found) return false;
    if (!narrow) return layers_[0]->takes(input, batch);
    return layers_[0]->takes(input, bfloat16_, read, batch) && inside(batch.x.rows);
  }
  // What tensors of the parameters' type are made like.
  Object wide(const Object& input, bool narrow) const {
    return narrow ? input.attr(names().to)(float32_) : input;
  }
  // Elements of such a matrix for each feature.
  std::int64_t stride(std::int64_t rows) const {
    return inside(rows) ? transposed_stride(rows, element().bits / 8) : rows;
  }
  // Of what a forward leaves, at its begin: whether what comes behind multiplies bfloat16 too.
  static bool& is_narrow(char* begin) { return *reinterpret_cast<bool*>(begin); }
  static bool is_narrow(const Object& left) { return is_narrow(static_cast<char*>(address(left))); }
  // One tensor for all pieces of the layout, and where it begins.
  std::pair<Object, char*> room(const Object& like, const Layout& layout) const {
    const Object made = like.attr(names().new_empty)(layout.size());
    return {made, static_cast<char*>(address(made))};
  }
  // The piece at `offset` elements; null for kNowhere.
  void* at(char* room, std::int64_t offset) const {
    return offset == kNowhere ? nullptr : room + offset * (element().bits / 8);
  }
  static Object joined(const Object& a, const Object& b) { return py::list(a) + py::list(b); }
  // What `of` says of each layer, in one list.
  template <class Of>
  Object all(std::size_t count, const Of& of) const {
    py::list joined;
    for (std::size_t i = 0; i < count; ++i) joined += py::list(of(*layers_[i]));
    return std::move(joined);
  }
  // Whether the head takes its part in the step of this batch; true where there is none, and no
  // target for it.
  bool aims(const Object& target, Batch& batch, Aim& aim) const {
    if (!head_) return target.is_none();
    return (head_->unchanged() && head_->follows(batch) &&
            head_->aims(target, batch.x.rows, aim)) ||
           Quick::cleared();
  }
  // Pieces as tensors, a matrix row-major, or None.
  Object vector(const Object& room, std::int64_t offset, std::int64_t elements) const {
    if (offset == kNowhere) return py::none();
    return room.attr(names().narrow)(0, offset, elements);
  }
  Object matrix(const Object& room, std::int64_t offset, std::int64_t rows,
                std::int64_t columns) const {
    if (offset == kNowhere) return py::none();
    const Object flat = vector(room, offset, columns * stride(rows));
    if (!inside(rows)) return flat.attr(names().view)(rows, columns);
    return flat.attr(names().view)(columns, stride(rows))
        .attr(names().narrow)(1, 0, rows)
        .attr("t")()
        .attr("contiguous")();
  }
  // The most that `of` says of any of the layers [from, to).
  template <class Of>
  std::int64_t most(std::size_t from, std::size_t to, const Of& of) const {
    std::int64_t found = 0;
    for (std::size_t i = from; i < to; ++i) found = std::max(found, of(*layers_[i]));
    return found;
  }

 private:
  // Whether autocast is on, to the type that is served; none if it is to another.
  std::optional<bool> narrows() const {
    const Object on = taken(PyObject_CallNoArgs(autocast_.ptr()));
    if (on.ptr() == Py_False) return false;
    if (on.ptr() == Py_True && element().bits == 32 && kernels().linear_step[2] &&
        taken(PyObject_CallNoArgs(autocast_type_.ptr())).is(bfloat16_))
      return true;
    PyErr_Clear();
    return std::nullopt;
  }
  Object autocast_, autocast_type_;

 protected:
  Object bfloat16_, float32_;
  Object module_;
  Guard surroundings_, own_;
  py::list steps_;
  Object last_;
  const QuickLoss* head_;  // of last_; null for none
  std::vector<const Step*> layers_;
};

// In a step with a target each layer teaches the synthesizer below at once, by the gradient that it
// hands down; the head teaches the last one at the end of the backward.
class QuickStack : public Stack<QuickStep> {
 public:
  QuickStack(Object module, const py::handle& surroundings, const py::handle& own, py::list steps,
             Object head, const py::tuple& autocast)
      : Stack(std::move(module), surroundings, own, std::move(steps), std::move(head), autocast),
        written_(all(layers_.size(), [](const QuickStep& step) { return step.written(); })),
        taught_(joined(written_, all(layers_.size() - 1,
                                     [](const QuickStep& step) { return step.learned(); }))),
        finished_(head_ ? joined(layers_.back()->learned(), head_->written())
                        : Object(py::none())) {}

  // As QuickStep's: h and what the lesson reads of the last layer, dx of the first. With a head: the
  // loss, what finish() reads of the head and the last layer, how many rows, and of a step with a
  // target dx of the first layer or None, the labels or None, the unit; else None three times.
  Object call(const Object& module, const Object& input, const Object& context,
              const Object& aimed) const {
    std::vector<Batch> batches;
    std::vector<Told> told;
    Aim aim;
    Object read;  // what the first layer multiplies
    bool narrow = false;
    const Way way = ready(module, input, context, read, narrow, batches, told);
    if (way == Way::kUsual) return py::none();
    Batch behind = batches[0];  // the head's
    if (!aims(aimed, behind, aim)) return py::none();
    const bool target = way == Way::kTaught;
    const std::size_t count = layers_.size();
    const QuickStep& last = *layers_.back();
    const std::int64_t rows = batches[0].x.rows;
    const Object wide = this->wide(input, narrow);
    Handed handed{py::none(), py::none(), py::none(), py::none()};
    Object left, loss;  // of a head
    Made end;           // what the last layer leaves
    if (head_) {
      const Ending ending = end_of(rows, target, narrow);
      const auto [made, begin] = room(wide, ending.layout);
      left = made;
      is_narrow(begin) = narrow;
      end = kept(begin, ending);
      loss = head_->new_loss(wide);
    } else {
      handed = last.hands(wide, rows, target, false);
      if (narrow) handed.h = last.result(read, rows);
      end = handed.made();
    }
    if (batches[0].asks) handed.dx = new_empty(input, rows, layers_[0]->layer().in);
    const auto [held, pieces] = between(wide, rows, target, narrow);

    std::vector<LinearStep> steps;
    std::deque<Course> courses;
    Made below;
    for (std::size_t i = 0; i < count; ++i) {
      Made made = pieces[i % 3];
      if (i + 1 == count) made = end;
      if (!layers_[i]->rank()) made.reduced = nullptr;
      made.dx = i == 0 ? address(handed.dx) : target ? pieces[0].dx : nullptr;
      LinearStep step = layers_[i]->stepping(batches[i], told[i], made);
      const bool inner = i + 1 < count || head_;
      if (narrow) {  // row-major from layer to layer, transposed for what computes in float32
        step.transposed = inner && (target || i + 1 == count) ? made.h : nullptr;
        if (inner) step.h = made.narrow;
      } else if (inside(rows)) {
        step.x_transposed = step.grad_x_transposed = i > 0;
        if (inner) std::swap(step.h, step.transposed);
      }
      steps.push_back(step);
      if (i + 1 < count) batches[i + 1].x.at = narrow ? made.narrow : made.h;
      if (i > 0 && target) {
        SynthesizerTrain lesson =
            layers_[i - 1]->teaching(batches[i - 1], told[i - 1], below, made.dx);
        lesson.transposed = inside(rows);
        lesson.narrow = narrow;
        courses.emplace_back(lesson, below.scaled, below.reduced, layers_[i - 1]->lessons());
      }
      below = made;
    }
    LinearCrossEntropy forward{};
    if (head_) {
      behind.x.at = end.h;
      char* begin = static_cast<char*>(address(left));
      forward =
          head_->losing(behind, aim, address(loss), at(begin, end_of(rows, target, narrow).delta));
      forward.x_transposed = forward.delta_transposed = inside(rows);
    }
    {
      py::gil_scoped_release release;
      Ops ops;
      for (std::size_t i = 0; i < count; ++i) {
        layers_[i]->add(steps[i], ops, narrow);
        if (i > 0 && target) layers_[i - 1]->add(courses[i - 1], ops);
      }
      if (head_) head_->add(forward, ops);
      ops.run();
    }
    for (const QuickStep* layer : layers_) layer->count_batch();
    for (std::size_t i = 0; i < courses.size(); ++i) layers_[i]->count_lesson();
    last.wrote(target ? taught_ : written_);
    last.last()();
    if (!head_) return last.returned(handed, target, told.back());
    if (!target) return py::make_tuple(loss, left, rows, py::none(), py::none(), py::none());
    return py::make_tuple(loss, left, rows, handed.dx, told.back().labels, last.unit());
  }

  // At the end of a backward, of the gradient at the loss and of what `call` returned: the last
  // layer's lessons, if there is a unit, and the head's update; whether they were made.
  bool finish(const Object& arrived, const Object& left, std::int64_t rows, const Object& labels,
              const Object& unit, std::int64_t lessons) const {
    const bool target = !unit.is_none();
    const QuickStep& last = *layers_.back();
    Batch batch;
    Told told{labels, nullptr};
    double factor = 1.0;
    batch.x.rows = rows;
    if (!head_->uninspected() || !head_->unchanged() || !head_->arrives(arrived, factor) ||
        !head_->counts(batch))
      return Quick::cleared();
    Batch below = batch;
    if (target && (!last.unchanged() || !last.stays(unit) || !last.follows(below) ||
                   !last.tells(told, rows) || !last.teachable()))
      return Quick::cleared();
    const bool narrow = is_narrow(left);
    const Ending ending = end_of(rows, target, narrow);
    const Made end = kept(static_cast<char*>(address(left)), ending);
    Layout layout(element());
    const LayerArguments& of = head_->layer();
    const std::int64_t delta = layout.take(stride(rows) * of.out),
                       bias = of.bias ? layout.take(of.out) : kNowhere,
                       dx = target ? layout.take(stride(rows) * of.in) : kNowhere;
    const auto [held, begin] = room(left, layout);
    Gradients made;
    made.x = at(begin, dx);
    made.delta = at(begin, delta);
    made.bias = at(begin, bias);
    batch.x.at = end.h;
    const void* given = at(static_cast<char*>(address(left)), ending.delta);
    LinearBackward backward = head_->returning(batch, factor, given, made);
    backward.transposed = backward.grad_h_transposed = inside(rows);
    backward.grad_x_transposed = inside(rows) && !narrow;
    std::optional<Course> course;
    if (target) {
      SynthesizerTrain lesson = last.teaching(below, told, end, made.x);
      lesson.transposed = inside(rows);
      lesson.narrow = narrow;
      course.emplace(lesson, end.scaled, end.reduced, lessons);
    }
    LinearUpdate update = head_->updating(batch, made);
    update.delta_transposed = inside(rows);
    update.x_transposed = inside(rows) && !narrow;
    if (narrow) update.x = end.narrow;
    {
      py::gil_scoped_release release;
      Ops ops;
      head_->add(backward, ops, narrow);
      if (course) last.add(*course, ops);
      head_->add(update, ops, narrow);
      ops.run();
    }
    if (target) last.count_lesson();
    head_->wrote(target ? finished_ : head_->written());
    return true;
  }

  // For a way that is not the quick one, of what `call` returned: h of the last layer, what its
  // lesson reads (None where there is none), and the loss's gradient at the logits.
  py::tuple saved(const Object& left, std::int64_t rows, bool target) const {
    const Ending ending = end_of(rows, target, is_narrow(left));
    const std::int64_t out = layers_.back()->layer().out;
    return py::make_tuple(matrix(left, ending.h, rows, out), matrix(left, ending.scaled, rows, out),
                          matrix(left, ending.reduced, rows, layers_.back()->rank()),
                          matrix(left, ending.delta, rows, head_->layer().out));
  }

  template <class Visit>
  void each(const Visit& visit) {
    Stack::each(visit);
    for (Object* object : {&written_, &taught_, &finished_}) visit(*object);
  }

 private:
  // Where lies what the last layer and the head leave for the end of the backward.
  struct Ending {
    Layout layout;
    std::int64_t h, scaled, reduced, delta;
    std::int64_t narrow;  // h in bfloat16, if it was multiplied so
  };
  Ending end_of(std::int64_t rows, bool target, bool narrow) const {
    const QuickStep& last = *layers_.back();
    const std::int64_t features = stride(rows) * last.layer().out;
    Ending ending{Layout(element()), kNowhere, kNowhere, kNowhere, kNowhere, kNowhere};
    ending.layout.take(1);  // is_narrow
    ending.h = ending.layout.take(features);
    if (target) ending.scaled = ending.layout.take(features);
    if (target && last.rank()) ending.reduced = ending.layout.take(stride(rows) * last.rank());
    ending.delta = ending.layout.take(stride(rows) * head_->layer().out);
    if (narrow) ending.narrow = ending.layout.take(features / 2);
    return ending;
  }
  Made kept(char* begin, const Ending& ending) const {
    return {at(begin, ending.h), at(begin, ending.scaled), at(begin, ending.reduced), nullptr,
            at(begin, ending.narrow)};
  }
  // What layers leave to the next one alone. A layer's is read until the next one's update and lesson
  // to it are over, which overlap with the forward of the one after that: three places, which layers
  // use in turn. A gradient is read in the first phase of the lesson alone: one place.
  std::pair<Object, std::array<Made, 3>> between(const Object& like, std::int64_t rows, bool target,
                                                 bool narrow) const {
    const std::size_t count = layers_.size();
    std::array<Made, 3> pieces;
    if (count == 1) return {Object(), pieces};
    const auto out = [](const QuickStep& step) { return step.layer().out; };
    const auto rank = [](const QuickStep& step) { return step.rank(); };
    const auto in = [](const QuickStep& step) { return step.layer().in; };
    const std::int64_t features = stride(rows) * most(0, count - 1, out),
                       ranks = stride(rows) * most(0, count - 1, rank),
                       inputs = stride(rows) * most(1, count, in);
    Layout layout(element());
    std::int64_t h[3], scaled[3], reduced[3], halves[3];
    for (int i = 0; i < 3; ++i) {
      h[i] = layout.take(features);
      scaled[i] = target ? layout.take(features) : kNowhere;
      reduced[i] = target ? layout.take(ranks) : kNowhere;
      halves[i] = narrow ? layout.take(features / 2) : kNowhere;
    }
    const std::int64_t dx = target ? layout.take(inputs) : kNowhere;
    auto [made, begin] = room(like, layout);
    for (int i = 0; i < 3; ++i)
      pieces[i] = {at(begin, h[i]), at(begin, scaled[i]), at(begin, reduced[i]), at(begin, dx),
                   at(begin, halves[i])};
    return {std::move(made), pieces};
  }
  // All is looked at before anything is changed. `read`, `narrow`: see takes().
  Way ready(const Object& module, const Object& input, const Object& context, Object& read,
            bool& narrow, std::vector<Batch>& batches, std::vector<Told>& told) const {
    if (!stands(module)) return Way::kUsual;
    const Way way = layers_[0]->way();
    Batch batch;
    if (way == Way::kUsual || !takes(input, read, narrow, batch)) return Way::kUsual;
    if (way == Way::kUntaught && batch.requires_grad) return Way::kUsual;
    for (const QuickStep* layer : layers_) {
      told.push_back({context, nullptr});
      if ((layer != layers_[0] && layer->way() != way) || !layer->follows(batch) ||
          !layer->tells(told.back(), batch.x.rows) || !layer->sized() ||
          (way == Way::kTaught && layer != layers_.back() && !layer->teachable())) {
        Quick::cleared();
        return Way::kUsual;
      }
      batches.push_back(batch);
    }
    return way;
  }

  // What is written: by a step without a target, by one with, and at the end of its backward.
  Object written_, taught_, finished_;
};

// Layers by the true gradient. `teachers`: of layers with synthesizers the steps by these, which learn
// at the end of the backward; else none.
class QuickExactStack : public Stack<QuickExact> {
 public:
  QuickExactStack(Object module, const py::handle& surroundings, const py::handle& own,
                  py::list steps, Object head, const py::tuple& autocast, py::list teachers)
      : Stack(std::move(module), surroundings, own, std::move(steps), std::move(head), autocast),
        held_(std::move(teachers)),
        moved_(all(layers_.size(), [](const QuickExact& step) { return step.moved(); })),
        written_(all(layers_.size(), [](const QuickExact& step) { return step.written(); })) {
    for (const py::handle& each : held_) {
      teachers_.push_back(each.cast<const QuickStep*>());
      written_ = joined(written_, teachers_.back()->learned());
    }
    if (head_) written_ = joined(written_, head_->written());
  }

  // The last layer's h, or the head's loss, what else they leave for a backward, whether the input
  // wants a gradient, what was multiplied and the labels or None; or None.
  Object forward(const Object& module, const Object& input, const Object& context,
                 const Object& target) const {
    Batch batch;
    Aim aim;
    Object read, labels = py::none();
    bool narrow = false;
    if (!stands(module) || !takes(input, read, narrow, batch)) return py::none();
    if (teachers_.empty() ? !context.is_none() : narrow || !hears(context, batch.x.rows, labels)) {
      Quick::cleared();
      return py::none();
    }
    const bool asks = batch.asks;
    for (const QuickExact* layer : layers_)
      if (!layer->unchanged() || !layer->follows(batch)) {
        Quick::cleared();
        return py::none();
      }
    Batch behind = batch;
    if (!aims(target, behind, aim)) return py::none();
    const std::int64_t rows = batch.x.rows;
    const Laid laid = lay(rows, narrow);
    const Object wide = this->wide(input, narrow);
    const Object h = head_ ? head_->new_loss(wide) : layers_.back()->result(read, rows);
    const auto [left, begin] = room(wide, laid.layout);
    is_narrow(begin) = narrow;
    const std::vector<Kept> kept = this->kept(h, left, rows);
    std::vector<LinearForward> forwards;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      LinearForward forward = layers_[i]->going(batch, kept[i]);
      if (inside(rows)) {
        forward.x_transposed = i > 0 && !narrow;
        forward.transposed = kept[i].h;
        forward.h = i + 1 < layers_.size() || head_ ? kept[i].narrow : address(h);
      }
      forwards.push_back(forward);
      batch.x.at = kept[i].multiplied();
    }
    LinearCrossEntropy loss{};
    if (head_) {
      behind.x.at = kept.back().h;
      loss = head_->losing(behind, aim, address(h), at(begin, laid.delta));
      loss.x_transposed = loss.delta_transposed = inside(rows);
    }
    {
      py::gil_scoped_release release;
      Ops ops;
      for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i]->add(forwards[i], ops, narrow);
      if (head_) head_->add(loss, ops);
      ops.run();
    }
    for (const QuickExact* layer : layers_) layer->count_batch();
    if (PyObject_Length(moved_.ptr()) > 0) layers_[0]->wrote(moved_);
    return py::make_tuple(h, left, asks, read, labels);
  }

  // Of what `forward` returned: dx or None, and what the update reads beside x and that: what was
  // made of the layers, and the gradients between them, which are kept for lessons alone; or None.
  // With a `share` below 1 of the true gradient, the rest is the predictions'.
  Object backward(const Object& arrived, const Object& x, const Object& h, const Object& left,
                  const Object& labels, double share, bool need_dx) const {
    const std::size_t count = layers_.size();
    std::vector<Batch> batches(count);
    Memory gradient;
    Batch behind;
    double factor = 1.0;
    const bool narrow = is_narrow(left);
    if (!layers_[0]->uninspected() ||
        !arrives(arrived, x, narrow, batches.back(), gradient, factor)) {
      Quick::cleared();
      return py::none();
    }
    const std::int64_t rows = batches.back().x.rows;
    behind = batches.back();
    if (head_ && (!head_->unchanged() || !head_->follows(behind))) {
      Quick::cleared();
      return py::none();
    }
    for (Batch& batch : batches) {
      batch.x.rows = rows;
      batch.threads = batches.back().threads;
    }
    for (std::size_t i = 0; i < count; ++i)
      if (!layers_[i]->unchanged() || !layers_[i]->follows(batches[i])) {
        Quick::cleared();
        return py::none();
      }
    const std::vector<Kept> kept = this->kept(h, left, rows);
    const Derived derived = derive(rows);
    const auto [made, begin] = room(left, derived.layout);
    const Passed passed = pass(rows);
    const auto [passing, places] = room(left, passed.layout);
    std::vector<SynthesizerPredict> predictions;
    std::vector<Mixture> mixtures;
    Object predicted;  // the memory of predictions
    if (share < 1.0 && !mix(batches.back(), kept, passing, gradient, labels, share, predicted,
                            predictions, mixtures)) {
      Quick::cleared();
      return py::none();
    }
    Object dx = py::none();
    if (need_dx) dx = new_empty(x, rows, layers_[0]->layer().in);
    std::vector<LinearBackward> backwards;
    const void* above = gradient.at;
    LinearBackward of_head{};
    if (head_) {
      behind.x.at = kept.back().h;
      Gradients gradients = this->gradients(begin, derived, count);
      gradients.x = at(places, passed.at[count]);
      const void* given = at(static_cast<char*>(address(left)), lay(rows, narrow).delta);
      of_head = head_->returning(behind, factor, given, gradients);
      of_head.transposed = of_head.grad_h_transposed = inside(rows);
      of_head.grad_x_transposed = inside(rows) && !narrow;
      above = gradients.x;
    }
    for (std::size_t i = count; i-- > 0;) {
      batches[i].x.at = i > 0 ? kept[i - 1].h : address(x);
      Gradients gradients = this->gradients(begin, derived, i);
      gradients.x = i > 0 ? at(places, passed.at[i]) : address(dx);
      LinearBackward backward = layers_[i]->returning(batches[i], above, kept[i], gradients);
      if (inside(rows)) {
        backward.transposed = true;
        backward.grad_h_narrow = narrow;
        backward.grad_h_transposed = (i + 1 < count || head_) && !narrow;
        backward.grad_x_transposed = i > 0 && !narrow;
      }
      if (!mixtures.empty()) {
        backward.grad_h = mixtures[i].scaled;
        backward.grad_h_transposed = inside(rows);
      }
      backwards.push_back(backward);
      above = gradients.x;
    }
    {
      py::gil_scoped_release release;
      Ops ops;
      if (head_) head_->add(of_head, ops, narrow);
      for (std::size_t i = count; i-- > 0;) {
        if (!mixtures.empty()) {
          teachers_[i]->add(predictions[i], ops);
          teachers_[i]->add(mixtures[i], ops);
        }
        layers_[i]->add(backwards[count - 1 - i], ops, narrow);
      }
      ops.run();
    }
    return py::make_tuple(dx, made, teachers_.empty() ? Object(py::none()) : passing);
  }

  // All lessons, so many each, and all updates; whether they were made. `arrived` is what `backward`
  // was given, `passing` the last of what it returned.
  bool update(const Object& x, const Object& h, const Object& left, const Object& made,
              const Object& passing, const Object& arrived, const Object& labels,
              std::int64_t lessons) const {
    const std::size_t count = layers_.size();
    Batch batch;
    const bool narrow = is_narrow(left);
    if (!layers_[0]->uninspected() || !layers_[0]->multiplies(x, narrow, batch))
      return Quick::cleared();
    std::vector<Batch> batches(count, batch);
    for (std::size_t i = 0; i < count; ++i)
      if (!layers_[i]->unchanged() || !layers_[i]->follows(batches[i])) return Quick::cleared();
    if (head_ && (!head_->unchanged() || !head_->follows(batch))) return Quick::cleared();
    const std::vector<Kept> kept = this->kept(h, left, batch.x.rows);
    std::deque<Course> courses;
    Object predicted;  // the memory of predictions
    if (!teach(batch, kept, passing, arrived, labels, lessons, predicted, courses))
      return Quick::cleared();
    const Derived derived = derive(batch.x.rows);
    char* begin = static_cast<char*>(address(made));
    std::vector<LinearUpdate> updates;
    for (std::size_t i = 0; i < count; ++i) {
      if (i > 0) batches[i].x.at = kept[i - 1].multiplied();
      LinearUpdate update = layers_[i]->updating(batches[i], gradients(begin, derived, i));
      update.delta_transposed = inside(batch.x.rows);
      update.x_transposed = update.delta_transposed && i > 0 && !narrow;
      updates.push_back(update);
    }
    LinearUpdate of_head{};
    if (head_) {
      batch.x.at = kept.back().multiplied();
      of_head = head_->updating(batch, gradients(begin, derived, count));
      of_head.delta_transposed = inside(batch.x.rows);
      of_head.x_transposed = of_head.delta_transposed && !narrow;
    }
    {
      py::gil_scoped_release release;
      Ops ops;
      for (std::size_t i = 0; i < courses.size(); ++i) teachers_[i]->add(courses[i], ops);
      for (std::size_t i = 0; i < count; ++i) layers_[i]->add(updates[i], ops, narrow);
      if (head_) head_->add(of_head, ops, narrow);
      ops.run();
    }
    for (const QuickStep* teacher : teachers_) teacher->count_lesson();
    layers_[0]->wrote(written_);
    return true;
  }

  // ---- The same as tensors, for a way that is not the quick one ----

  // (h, normalized or None, rstd or None) of each layer, of what `forward` returned for x.
  py::list saved(const Object& x, const Object& h, const Object& left) const {
    const std::int64_t rows = rows_of(x);
    const bool narrow = is_narrow(left);
    const Laid laid = lay(rows, narrow);
    py::list found;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const QuickExact& layer = *layers_[i];
      const std::int64_t out = layer.layer().out;
      const bool inner = i + 1 < layers_.size() || head_;
      Object own = inner ? matrix(left, laid.h[i], rows, out) : h;
      if (inner && narrow) own = own.attr(names().to)(bfloat16_);
      found.append(py::make_tuple(own, matrix(left, laid.normalized[i], rows, out),
                                  vector(left, laid.rstd[i], layer.statistics(rows))));
    }
    return found;
  }
  // The head's loss's gradient at the logits, of what `forward` returned for x.
  Object delta(const Object& x, const Object& left) const {
    const std::int64_t rows = rows_of(x);
    return matrix(left, lay(rows, is_narrow(left)).delta, rows, head_->layer().out);
  }
  // What arrived at each layer's h, of what `backward` was given and returned for x.
  py::list arrivals(const Object& x, const Object& passing, const Object& arrived) const {
    const std::int64_t rows = rows_of(x);
    const Passed passed = pass(rows);
    py::list found;
    for (std::size_t i = 1; i <= layers_.size(); ++i)
      found.append(passed.at[i] == kNowhere
                       ? arrived
                       : matrix(passing, passed.at[i], rows, layers_[i - 1]->layer().out));
    return found;
  }
  // (delta, and the gradients of bias, scale and shift or None) of each layer and of the head, of
  // what `backward` made for x.
  py::list contributions(const Object& x, const Object& made) const {
    const std::int64_t rows = rows_of(x);
    const Derived derived = derive(rows);
    py::list found;
    for (std::size_t i = 0; i < derived.delta.size(); ++i) {
      const std::int64_t out = (i < layers_.size() ? *layers_[i] : *head_).layer().out;
      found.append(py::make_tuple(
          matrix(made, derived.delta[i], rows, out), vector(made, derived.bias[i], out),
          vector(made, derived.scale[i], out), vector(made, derived.shift[i], out)));
    }
    return found;
  }

  template <class Visit>
  void each(const Visit& visit) {
    Stack::each(visit);
    visit(static_cast<Object&>(held_));
    visit(moved_);
    visit(written_);
  }

 private:
  struct Laid {  // of what a forward leaves
    Layout layout;
    Offsets h, normalized, rstd, narrow;
    std::int64_t delta;  // of the head
  };
  struct Derived {  // of what a backward makes, of the layers and then of the head
    Layout layout;
    Offsets delta, bias, scale, shift;
  };

  struct Passed {  // of the gradients at inputs, of the layers and then of the head
    Layout layout;
    Offsets at;  // none at the first layer's, which are returned, nor where there is no head
  };

  // Read by the layer below alone, they take turns in two places; but for lessons each has its own.
  Passed pass(std::int64_t rows) const {
    Passed passed{Layout(element()), Offsets(layers_.size() + 1, kNowhere)};
    const std::size_t count = layers_.size() + (head_ ? 1 : 0);
    const auto in = [&](std::size_t i) {
      return (i < layers_.size() ? *layers_[i] : *head_).layer().in * stride(rows);
    };
    std::int64_t largest = 0;
    for (std::size_t i = 1; i < count; ++i) largest = std::max(largest, in(i));
    for (std::size_t i = 1; i < count; ++i)
      passed.at[i] = teachers_.empty() && i > 2
                         ? passed.at[i - 2]
                         : passed.layout.take(teachers_.empty() ? largest : in(i));
    return passed;
  }
  // Whether all that are told labels are told those of this call, or of the context.
  bool hears(const Object& context, std::int64_t rows, Object& labels) const {
    for (const QuickStep* teacher : teachers_) {
      Told told{context, nullptr};
      if (!teacher->tells(told, rows) || !teacher->ruled()) return false;
      if (teacher->labelled()) labels = told.labels;
    }
    return true;
  }
  // Memory of predictions, each of which is read before the next is made.
  struct Predictions {
    Object memory;
    void *scaled, *reduced;
  };
  Predictions predictions(const Object& like, std::int64_t rows) const {
    std::int64_t outputs = 0, ranks = 0;
    for (const QuickStep* teacher : teachers_) {
      outputs = std::max(outputs, teacher->layer().out);
      ranks = std::max(ranks, teacher->rank());
    }
    Layout layout(element());
    const std::int64_t scaled = layout.take(outputs * stride(rows)),
                       reduced = layout.take(ranks * stride(rows));
    const auto [made, begin] = room(like, layout);
    return {made, at(begin, scaled), at(begin, reduced)};
  }
  // What the synthesizer of layer i could be taught of a backward, whose gradient at the last h, where
  // there is no head, is `last`.
  SynthesizerTrain lesson(std::size_t i, const Batch& batch, const Told& told,
                          const std::vector<Kept>& kept, const Object& passing,
                          const Memory& last) const {
    const Passed passed = pass(batch.x.rows);
    const bool given = passed.at[i + 1] == kNowhere;
    Made from;
    from.h = kept[i].h;
    SynthesizerTrain lesson = teachers_[i]->teaching(
        batch, told, from,
        given ? last.at : at(static_cast<char*>(address(passing)), passed.at[i + 1]));
    lesson.transposed = inside(batch.x.rows);
    lesson.given = given;
    return lesson;
  }
  // What each is told, of the labels of the forward; whether that and its unit are as they must be.
  bool told(const Object& labels, std::int64_t rows, std::vector<Told>& found) const {
    for (const QuickStep* teacher : teachers_) {
      found.push_back({teacher->labelled() ? labels : Object(py::none()), nullptr});
      if (!teacher->sized() || !teacher->ruled() || !teacher->tells(found.back(), rows))
        return false;
    }
    return true;
  }
  // Of each layer its prediction, and how it is mixed with what arrives.
  bool mix(const Batch& batch, const std::vector<Kept>& kept, const Object& passing,
           const Memory& last, const Object& labels, double share, Object& predicted,
           std::vector<SynthesizerPredict>& predictions, std::vector<Mixture>& mixtures) const {
    const std::int64_t rows = batch.x.rows;
    std::vector<Told> told;
    if (teachers_.empty() || !this->told(labels, rows, told)) return false;
    const Predictions memory = this->predictions(passing, rows);
    predicted = memory.memory;
    for (std::size_t i = 0; i < teachers_.size(); ++i) {
      const SynthesizerTrain lesson = this->lesson(i, batch, told[i], kept, passing, last);
      predictions.push_back(
          predicting(lesson, memory.scaled, teachers_[i]->rank() ? memory.reduced : nullptr));
      const std::int64_t out = lesson.features;
      Mixture mixture{
          rows,         out, out, out, 1, lesson.grad_h, memory.scaled, share, lesson.target_scale,
          batch.threads};
      if (inside(rows)) {
        mixture.rows = out;
        mixture.columns = rows;
        mixture.stride = mixture.arrived_row = stride(rows);
        if (lesson.given) mixture.arrived_row = 1, mixture.arrived_column = out;
      }
      mixtures.push_back(mixture);
    }
    return true;
  }
  // What synthesizers are taught of a backward.
  bool teach(const Batch& batch, const std::vector<Kept>& kept, const Object& passing,
             const Object& arrived, const Object& labels, std::int64_t lessons, Object& predicted,
             std::deque<Course>& courses) const {
    if (teachers_.empty()) return true;
    const std::int64_t rows = batch.x.rows;
    Memory last;
    if (!head_ &&
        (!plain(arrived, layers_.back()->tensor(), element(), layers_.back()->layer().out, last) ||
         last.rows != rows))
      return false;
    std::vector<Told> told;
    if (!this->told(labels, rows, told)) return false;
    for (const QuickStep* teacher : teachers_)
      if (!teacher->teachable()) return false;
    const Predictions memory = predictions(passing, rows);
    predicted = memory.memory;
    for (std::size_t i = 0; i < teachers_.size(); ++i)
      courses.push_back(
          Course::from_the_start(lesson(i, batch, told[i], kept, passing, last), memory.scaled,
                                 teachers_[i]->rank() ? memory.reduced : nullptr, lessons));
    return true;
  }

  Laid lay(std::int64_t rows, bool narrow) const {
    Laid laid{Layout(element()), {}, {}, {}, {}, kNowhere};
    laid.layout.take(1);  // is_narrow
    const auto take = [&](bool there, std::int64_t elements) {
      return there ? laid.layout.take(elements) : kNowhere;
    };
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const QuickExact& layer = *layers_[i];
      const std::int64_t elements = stride(rows) * layer.layer().out;
      const bool inner = i + 1 < layers_.size() || head_;
      laid.h.push_back(take(inner || inside(rows), elements));
      laid.narrow.push_back(take(inner && narrow, elements / 2));
      laid.normalized.push_back(take(layer.keeps(), elements));
      laid.rstd.push_back(take(layer.statistics(rows) > 0, layer.statistics(rows)));
    }
    if (head_) laid.delta = laid.layout.take(stride(rows) * head_->layer().out);
    return laid;
  }
  Derived derive(std::int64_t rows) const {
    Derived derived{Layout(element()), {}, {}, {}, {}};
    for (std::size_t i = 0; i < layers_.size() + (head_ ? 1 : 0); ++i) {
      const LayerArguments& of = (i < layers_.size() ? *layers_[i] : *head_).layer();
      const auto vector = [&](const void* there) {
        return there ? derived.layout.take(of.out) : kNowhere;
      };
      derived.delta.push_back(derived.layout.take(stride(rows) * of.out));
      derived.bias.push_back(vector(of.bias));
      derived.scale.push_back(vector(of.norm_weight));
      derived.shift.push_back(vector(of.norm_bias));
    }
    return derived;
  }
  std::vector<Kept> kept(const Object& h, const Object& left, std::int64_t rows) const {
    char* begin = static_cast<char*>(address(left));
    const Laid laid = lay(rows, is_narrow(begin));
    std::vector<Kept> found;
    for (std::size_t i = 0; i < layers_.size(); ++i)
      found.push_back({at(begin, laid.h[i]), at(begin, laid.normalized[i]), at(begin, laid.rstd[i]),
                       at(begin, laid.narrow[i])});
    if (!inside(rows) && !head_) found.back().h = address(h);
    return found;
  }
  // What arrives at the last layer's h, or at the loss.
  bool arrives(const Object& arrived, const Object& x, bool narrow, Batch& batch, Memory& gradient,
               double& factor) const {
    if (!head_) return layers_.back()->arrives(arrived, batch, gradient, narrow);
    batch.x.rows = rows_of(x);
    return head_->arrives(arrived, factor) && head_->counts(batch);
  }
  Gradients gradients(char* begin, const Derived& derived, std::size_t i) const {
    return {nullptr, at(begin, derived.delta[i]), at(begin, derived.bias[i]),
            at(begin, derived.scale[i]), at(begin, derived.shift[i])};
  }
  static std::int64_t rows_of(const Object& t) {
    dlpack::View seen;
    return dlpack::view(t.ptr(), seen) ? seen.shape[0] : 0;
  }

  py::list held_;
  std::vector<const QuickStep*> teachers_;
  Object moved_, written_;
};

// ---- Python's collector ------------------------------------------------------------------------------

// The holder that pybind11 keeps in an instance; null before its constructor has run.
template <class T>
T* held(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  auto holder = instance->get_value_and_holder();
  return holder.holder_constructed() ? py::cast<T*>(py::handle(self)) : nullptr;
}

template <class T>
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  int stop = 0;
  if (T* step = held<T>(self))
    step->each([&](Object& object) {
      if (!stop && object) stop = visit(object.ptr(), arg);
    });
  return stop;
}

template <class T>
int clear(PyObject* self) {
  if (T* step = held<T>(self)) step->each([](Object& object) { object = Object(); });
  return 0;
}

template <class T>
py::class_<T> bind(py::module_& m, const char* name) {
  return py::class_<T>(m, name, py::custom_type_setup([](PyHeapTypeObject* heap) {
                         heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
                         heap->ht_type.tp_traverse = traverse<T>;
                         heap->ht_type.tp_clear = clear<T>;
                       }));
}

}  // namespace

void bind_quick(py::module_& m) {
  bind<Watch>(m, "Watch")
      .def(py::init<const py::handle&>())
      .def("__call__", &Watch::holds)
      .def("changed", &Watch::changed);
  bind<QuickStep>(m, "QuickStep")
      .def(py::init<const py::dict&>())
      .def("__call__", &QuickStep::call)
      .def("changed", &QuickStep::changed)
      .def("learn", &QuickStep::learn);
  bind<QuickExact>(m, "QuickExact")
      .def(py::init<const py::dict&>())
      .def("changed", &QuickExact::changed)
      .def("forward", &QuickExact::forward)
      .def("backward", &QuickExact::backward)
      .def("update", &QuickExact::update);
  bind<QuickLoss>(m, "QuickLoss")
      .def(py::init<const py::dict&>())
      .def("changed", &QuickLoss::changed)
      .def("forward", &QuickLoss::forward)
      .def("backward",
           static_cast<Object (QuickLoss::*)(const Object&, const Object&, const Object&, bool)
                           const>(&QuickLoss::backward))
      .def("update", &QuickLoss::update);
  bind<QuickStack>(m, "QuickStack")
      .def(py::init<Object, const py::handle&, const py::handle&, py::list, Object,
                    const py::tuple&>())
      .def("__call__", &QuickStack::call)
      .def("changed", &QuickStack::changed)
      .def("finish", &QuickStack::finish)
      .def("saved", &QuickStack::saved);
  bind<QuickExactStack>(m, "QuickExactStack")
      .def(py::init<Object, const py::handle&, const py::handle&, py::list, Object,
                    const py::tuple&, py::list>())
      .def("changed", &QuickExactStack::changed)
      .def("forward", &QuickExactStack::forward)
      .def("backward", &QuickExactStack::backward)
      .def("update", &QuickExactStack::update)
      .def("saved", &QuickExactStack::saved)
      .def("delta", &QuickExactStack::delta)
      .def("arrivals", &QuickExactStack::arrivals)
      .def("contributions", &QuickExactStack::contributions);
  const char* kinds[] = {"ITEM",  "ITEMS_VALUE", "ATTRIBUTE", "METHOD",
                         "STATE", "EMPTY",       "ABSENT",    "MEMORY"};
  for (int kind = 0; kind < 8; ++kind) m.attr(kinds[kind]) = kind;
}

}  // namespace fused_dni
