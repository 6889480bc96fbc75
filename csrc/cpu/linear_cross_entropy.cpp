// Softmax cross-entropy behind a linear layer, and its gradient at the logits.
//
// Threads own classes in the product, and rows of the batch behind it:
//
//   zT = W xT                                          barrier
//   z + b -> softmax, the rows' losses, deltaT         barrier
//   the loss: the rows' sum in order, in double precision
//
// With s the smoothing, C the classes and M the rows in the loss, of a row n in it with target y:
//
//   loss_n = log(sum_c exp(z_c)) - (1 - s) z_y - s / C sum_c z_c
//   delta_nc = (softmax(z)_c - (1 - s) [c = y] - s / C) / M
//
// and of another both are zero. All of z is taken less its largest.
#include "linear.hpp"

namespace fused_dni::FUSED_DNI_ISA {
namespace {

template <class T>
struct CrossEntropy {
  const LinearCrossEntropy& a;
  const Layer<T>& layer;
  T* z = nullptr;            // [C][stride]: logits, then delta
  double* losses = nullptr;  // [N], zero of rows that are not in the loss

  void plan(Scratch& scratch) {
    const bool given = a.delta && a.delta_transposed;
    z = given ? static_cast<T*>(a.delta) : scratch.take<T>(layer.out * layer.stride);
    losses = scratch.take<double>(layer.rows);
  }

  bool counts(Index n) const { return n < layer.rows && a.target[n] != a.ignored; }

  // A vector of rows from n on.
  void run(Index n) const {
    constexpr int L = kLanes<T>;
    const Index classes = layer.out, stride = layer.stride;
    Vec<T> most = load(z + n) + layer.bias_of(0);
    for (Index c = 0; c < classes; ++c) {
      const Vec<T> v = load(z + c * stride + n) + layer.bias_of(c);
      store(z + c * stride + n, v);
      most = v > most ? v : most;
    }
    Vec<T> aimed{}, weight{};  // z_y, and what a row counts in the mean
    for (int i = 0; i < L; ++i) {
      if (!counts(n + i)) continue;
      aimed[i] = z[a.target[n + i] * stride + n + i] - most[i];
      weight[i] = T(1.0 / static_cast<double>(a.counted));
    }
    Vec<T> sum{}, total{};
    for (Index c = 0; c < classes; ++c) {
      const Vec<T> v = load(z + c * stride + n) - most;
      const Vec<T> e = Math<T>::exp(v);
      store(z + c * stride + n, e);
      sum += e;
      total += v;
    }
    const double share = a.smoothing / static_cast<double>(classes);
    for (int i = 0; i < L && n + i < layer.rows; ++i) {
      double loss = 0.0;
      if (counts(n + i)) {
        loss = __builtin_log(static_cast<double>(sum[i])) -
               (1.0 - a.smoothing) * static_cast<double>(aimed[i]);
        if (share > 0.0) loss -= share * static_cast<double>(total[i]);
      }
      losses[n + i] = loss;
    }
    if (a.delta == nullptr) return;
    const Vec<T> scale = T(1) / sum;
    for (Index c = 0; c < classes; ++c) {
      const Vec<T> d = load(z + c * stride + n) * scale - T(share);
      store(z + c * stride + n, in_the_mean<T>(d, weight));
    }
    for (int i = 0; i < L; ++i)
      if (counts(n + i)) z[a.target[n + i] * stride + n + i] -= T(1.0 - a.smoothing) * weight[i];
  }

  void give_loss() const {
    double total = 0.0;
    for (Index n = 0; n < layer.rows; ++n) total += losses[n];
    *static_cast<T*>(a.loss) = T(total / static_cast<double>(a.counted));
  }
};

template <class T>
class CrossEntropyOp : public Op {
 public:
  explicit CrossEntropyOp(const LinearCrossEntropy& from)
      : a(from), layer(a.layer), input(layer, a.x), loss{a, layer} {
    threads = team_size(a.layer.threads, layer.rows * layer.in * layer.out);
    open = a.delta && !a.delta_transposed;
    if (a.x_transposed) input.given = static_cast<const T*>(a.x);
  }

  void plan(Scratch& scratch) override {
    input.plan(scratch);
    loss.plan(scratch);
  }

  void run(const Team& team) override {
    if (!a.x_transposed) {
      input.transpose(team);
      team.sync();
    }
    const Range own = own_features<T>(layer.out, team.rank, team.size);
    input.run(own, layer.weight, loss.z);
    team.sync();
    const Range rows = part(layer.rows, kLanes<T>, team.rank, team.size);
    for (Index n = rows.begin; n < rows.end; n += kLanes<T>) loss.run(n);
    team.sync();
    if (a.delta && !a.delta_transposed)
      from_transposed(loss.z + own.begin * layer.stride, layer.stride, layer.rows, own.size(),
                      static_cast<T*>(a.delta) + own.begin, layer.out);
    if (team.rank == 0) loss.give_loss();
  }

 private:
  const LinearCrossEntropy& a;
  const Layer<T> layer;
  InputProduct<T> input;
  CrossEntropy<T> loss;
};

}  // namespace

void add_linear_cross_entropy(Kernels& kernels) {
  kernels.linear_cross_entropy[0] = make<CrossEntropyOp<float>>;
  kernels.linear_cross_entropy[1] = make<CrossEntropyOp<double>>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
