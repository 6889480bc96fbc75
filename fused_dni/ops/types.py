"""The one signature that every backend implements.

A backend is stateless: it gets tensors in, gives tensors out, and mutates only what an op's
docstring names. It knows nothing of autograd, modules, schedules or phases. Shapes are
two-dimensional here (callers fold leading dimensions into rows):

====  =========================================================
N     rows of the batch
I, O  input and output features of the layer
R     rank of a low-rank synthesizer
K     context features (classes, or width of a conditioning vector)
====  =========================================================

Throughout, the loss is taken to be a mean over rows; ``target_scale`` (kappa) is the number by
which it divides, so that the synthesizer regresses ``kappa * dL/dh``, whose size does not depend
on N (Jaderberg et al. 2016, arXiv 1608.05343, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)

ACTIVATIONS = (
    "identity",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "softplus",
    "mish",
)
# Those whose derivative is a function of their output h, so that a layer without normalisation need
# keep nothing else (see ``Saved``).
FROM_OUTPUT = ("identity", "relu", "tanh", "sigmoid")
NORMALIZATIONS = (None, "batch", "layer")
# Where a synthesizer's gradient arrives: at h, or at z = x W^T + b (see ``LinearConfig``).
INTERFACES = ("output", "preactivation")
# Kinds of ``SynthesizerTensors``: those that every backend has, and all.
AFFINE = ("dense", "lowrank", "diagonal")
SYNTHESIZERS = (*AFFINE, "cross_entropy")
RULES = ("sgd", "adam", "adamw")

# Indices into ``RuleTensors.hyper``.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, STEP, SKIPPED = range(7)
HYPER_SIZE = 7

# Indices into the ``statistics`` tensor that ``synthesizer_update_`` adds to.
S_DOT_G, S_DOT_S, G_DOT_G, SQUARED_ERROR, ROWS = range(5)
STATISTICS_SIZE = 5


#: Gradients of a synthesizer's parameters, in the order of ``SynthesizerTensors.parameters()``.
SlotGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def accumulator(parameter: Tensor) -> torch.dtype:
    """Return the dtype of everything but products and outputs: at least float32."""
    return torch.float32 if parameter.dtype in LOW_PRECISION else parameter.dtype


@dataclass(frozen=True)
class LinearConfig:
    """What of a layer is not a tensor: ``h = activation(normalization(x @ weight.T + bias))``.

    ``interface`` says which gradient a synthesizer predicts from h: ``"output"``, the one at h,
    which a step takes back through activation and normalisation; or ``"preactivation"``, the one
    at ``z = x @ weight.T + bias`` itself, so that a step needs no backward through either. Of the
    ops only ``Backend.linear_step_`` reads it.
    """

    normalization: str | None = None
    activation: str = "identity"
    eps: float = 1e-5
    momentum: float = 0.1
    interface: str = "output"


class LinearTensors(NamedTuple):
    """Parameters and buffers of a linear layer, all of one dtype and device, contiguous."""

    weight: Tensor  # [O, I]
    bias: Tensor | None = None  # [O]
    norm_weight: Tensor | None = None  # [O]
    norm_bias: Tensor | None = None  # [O]
    running_mean: Tensor | None = None  # [O], batch normalisation only
    running_var: Tensor | None = None  # [O], batch normalisation only


class SynthesizerTensors(NamedTuple):
    """Parameters of a synthesizer that backends know how to fuse.

    dense     ``M(h) = h @ weight.T + context + bias``            weight [O, O]
    lowrank   ``M(h) = (h @ down.T) @ weight.T + context + bias`` weight [O, R], down [R, O]
    diagonal  ``M(h) = weight * h + context + bias``              weight [O]

    ``context`` is ``context_weight[:, label]`` for class indices, ``c @ context_weight.T`` for a
    conditioning vector ``c``.

    cross_entropy  ``M(h) = p @ weight.T + bias`` with the gradient of a cross-entropy at its logits
    for p: ``softmax(h @ down.T + context_weight) - y``, y one-hot for class indices, or the
    probabilities that are given. R is K here: weight [O, K], down [K, O], context_weight [K].
    Not every backend has it (``Backend.synthesizers``).

    With a ``table``, that of a softmax's head, it is ``-context_weight * table[label]``: the table
    is read and never written, and what is learned is a number. Rows whose label is ``ignore_index``
    are not in the loss then: there ``M(h)`` is zero, and nothing is learned. The loss is a mean
    over the others, so that ``M(h)`` is N / (their number) times the sum above.
    """

    kind: str
    weight: Tensor
    down: Tensor | None = None
    context_weight: Tensor | None = None  # [O, K]; of a cross-entropy [K]; with a table []
    bias: Tensor | None = None  # [O]
    table: Tensor | None = None  # [K, O], contiguous, of the parameters' dtype or bfloat16
    ignore_index: int = -100

    @property
    def classes(self) -> int:
        """K, 0 without a context."""
        if self.table is not None:
            return self.table.shape[0]
        return 0 if self.context_weight is None else self.context_weight.shape[-1]

    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the four slots in the order that rules and gradients use."""
        return (self.weight, self.down, self.context_weight, self.bias)


class RuleTensors(NamedTuple):
    """An update rule and its state over a fixed list of parameter slots.

    ``hyper`` is float64 ``[HYPER_SIZE]``: lr, momentum or beta1, beta2, eps, weight decay, and two
    counters that the update itself advances: steps taken, and steps skipped because a gradient
    was not finite. A skipped step changes nothing but the second counter.

    ``first`` and ``second`` hold, a slot each, momentum (or Adam's first moment) and Adam's second
    moment; None where the rule keeps none or the slot is empty or frozen. ``trainable`` says which
    slots may be written. Slots of a linear layer: weight, bias, norm_weight, norm_bias; of a
    synthesizer: ``SynthesizerTensors.parameters()``.

    ``stochastic`` allows bfloat16 parameters, whose new values are rounded up or down at random so
    that they are right in the mean; their moments are float32.

    Formulas are those of ``torch.optim.SGD`` (dampening 0), ``Adam`` and ``AdamW``.
    """

    kind: str
    nesterov: bool
    hyper: Tensor
    first: tuple[Tensor | None, ...]
    second: tuple[Tensor | None, ...]
    trainable: tuple[bool, ...]
    stochastic: bool = False


class Saved(NamedTuple):
    """What a backward needs beside x, h and the parameters.

    ``normalized`` [N, O] is the input of scale-and-shift (batch, layer) or of the activation
    (no normalisation); None where the derivative can be taken from h alone (no normalisation with
    identity, relu, tanh or sigmoid). ``rstd`` is [O] (batch) or [N] (layer).
    """

    normalized: Tensor | None = None
    rstd: Tensor | None = None


class LinearGradients(NamedTuple):
    """Gradients of one use of a layer. ``delta`` [N, O] is the gradient at ``x @ weight.T``."""

    delta: Tensor
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


class CrossEntropy(NamedTuple):
    """A loss and, where it is wanted, its gradient at the logits."""

    loss: Tensor  # []
    delta: Tensor | None = None  # [N, O]


class Prediction(NamedTuple):
    """A synthesizer's output ``scaled = M(h)`` [N, O] (that is kappa times the synthetic gradient)
    and what its weight multiplied, both kept for its training: for a low-rank one
    ``reduced = h @ down.T`` [N, R], for one of a cross-entropy p [N, K]."""

    scaled: Tensor
    reduced: Tensor | None = None


class Step(NamedTuple):
    """Result of a fused decoupled step."""

    h: Tensor  # [N, O]
    prediction: Prediction | None = None
    dx: Tensor | None = None  # [N, I]
    # With the interface at the preactivation, beside the prediction: what takes the gradient that
    # will arrive at h back to z, for the synthesizer to learn from.
    saved: Saved | None = None


class LSTMLayer(NamedTuple):
    """Parameters of one LSTM layer, or their gradients; rows in the gate order i, f, g, o."""

    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, H]
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]


Layers = tuple[LSTMLayer, ...]


def flat(layers: Layers) -> list[Tensor]:
    """List the parameters that exist, layer by layer."""
    return [p for layer in layers for p in layer if p is not None]


def layers_of(parameters: Sequence[Tensor], bias: bool) -> Layers:
    """Undo :func:`flat`."""
    size = 4 if bias else 2
    return tuple(LSTMLayer(*parameters[i : i + size]) for i in range(0, len(parameters), size))


class LSTMTrace(NamedTuple):
    """What a window's forward leaves behind: its results, and what the backward needs.

    Steps past a row's length are zero in ``hidden``, and never read elsewhere. The tensors share no
    memory.
    """

    hidden: Tensor  # [L, T + 1, B, H]: the state h at the entrance, then after each step
    h: Tensor  # [L, B, H]: h after each row's last step
    c: Tensor  # [L, B, H]
    cells: Tensor | None = None  # [L, T + 1, B, H]: c, as ``hidden``
    # [L, T, B, 4H]: the gates behind their non-linearities. The order of the last dimension is the
    # backend's own, the same in all of its LSTM ops.
    gates: Tensor | None = None


class LSTMGradients(NamedTuple):
    """Gradients of one window. ``delta`` is exactly zero past a row's length."""

    delta: Tensor  # [L, T, B, 4H]: at the gates before their non-linearities, ordered as ``gates``
    h: Tensor  # [L, B, H]: at the entrance
    c: Tensor  # [L, B, H]
    x: Tensor | None = None  # [T, B, I]
    layers: tuple[LSTMLayer, ...] = ()


class LSTMRows(NamedTuple):
    """What one layer's weight gradients are products of, a row for each step of each sequence."""

    input: Tensor  # [N, I]
    hidden: Tensor  # [N, H]: h as it was before the step
    delta: Tensor  # [N, 4H], ordered as ``LSTMTrace.gates``


class LSTMBoundary(NamedTuple):
    """The ends of a window, for a backward that sees to them itself.

    The synthesizer has no context here and runs on *rows* [B, 2 L H], the state of each sequence
    as h_0, c_0, h_1, c_1, ...
    """

    synthesizer: SynthesizerTensors
    ended: Tensor | None  # bool [B]: rows whose sequence ends with the window
    target_scale: float
    strength: float  # factor on the synthetic gradient
    max_norm: float  # bound of its Frobenius norm before that factor; 0 for none
    max_target_norm: float  # bound of the norm of each row of target_scale * grad; 0 for none
    learns: bool
    entrance: bool  # whether the window continues a state, to be learned from


class LSTMRegression(NamedTuple):
    """What a synthesizer learns from in one window: N rows, those of the entrance that continue a
    sequence and those of the exit that end, with the gradient there (zero where they end)."""

    rows: Tensor  # [N, 2 L H]
    grad: Tensor  # [N, 2 L H]
    prediction: Prediction


class LSTMClosed(NamedTuple):
    """Result of :meth:`Backend.lstm_close`."""

    gradients: LSTMGradients
    regression: LSTMRegression | None = None  # or, instead:
    synthesizer: tuple[Tensor | None, ...] = ()


class CellTrace(NamedTuple):
    """What a cell's forward leaves behind."""

    h: Tensor  # [B, H]
    c: Tensor  # [B, H]
    gates: Tensor | None = None  # [B, 4H], as in :class:`LSTMTrace`


class CellGradients(NamedTuple):
    """Gradients of one step of a cell."""

    delta: Tensor  # [B, 4H]
    h: Tensor  # [B, H]: at the state before the step
    c: Tensor  # [B, H]
    x: Tensor | None = None  # [B, I]
    layer: LSTMLayer | None = None


#: Something that has to be as it was: what is asked ("item" of a dictionary, "items value" the
#: attribute of one, "attribute", "method" without arguments, "state" by a function, "empty",
#: "absent" from a dictionary, a tensor in the "memory" that it was in), of what, by which name and,
#: of an item, which attribute; the answer, the very object or an integer.
Check = tuple[str, Any, str | None, str | None, Any]


class QuickParts(NamedTuple):
    """What a call of a layer needs beside its input, if all checks hold.

    Attributes:
        module: whose call it is.
        surroundings: checks of what surrounds a call; always: a backward too; own: of the layer.
        least: rows that an input must have.
        counter: of batches, moved by each call; None for none.
        mark: the name of an attribute by which a result says that it wants no gradient: its
            version.
        group: the rule's hyper-parameters, of which ``lr`` may change.
        state: the rule's ``__dict__``.
    """

    module: Any
    surroundings: Sequence[Check]
    always: Sequence[Check]
    own: Sequence[Check]
    least: int
    counter: Tensor | None
    mark: str
    group: dict[str, Any]
    state: dict[str, Any]


class QuickSynthesizer(NamedTuple):
    """What a call with a synthesizer needs more.

    Attributes:
        untaught: checks of a step without a target; taught: of one with, None for never.
        labels: whether the synthesizer is told labels, int64 [N], else nothing.
        context: the context variable in which they are where the call is not given them.
        kappa: by what the loss divides; None for the number of rows.
        unit: the synthesizer's unit, whose size and lessons are read.
        statistics: float64 [STATISTICS_SIZE], added to in a lesson.
        lessons: how many a step with a target gives.
        rule: over the synthesizer's slots, None where there has been none yet; group, state: as of
            the layer's.
        earliest, interval: the unit may move in the first lesson; from the so-manieth on in every
            so-manieth, and where their number is a power of 2.
    """

    untaught: Sequence[Check]
    taught: Sequence[Check] | None
    labels: bool
    context: Any
    kappa: float | None
    unit: Any
    statistics: Tensor
    lessons: int
    rule: RuleTensors | None
    group: dict[str, Any]
    state: dict[str, Any]
    earliest: int
    interval: int


class QuickLoss(NamedTuple):
    """What a call of a layer with its cross-entropy needs more."""

    label_smoothing: float
    ignore_index: int


class BoundStep(Protocol):
    """What :meth:`Backend.bind_step` returns. One with a method ``quick`` can take a whole step in
    a call that asks all of :class:`QuickParts` itself; its backend then has ``quick_exact`` for
    steps by the true gradient, ``quick_loss`` for those of a layer with its cross-entropy, and
    ``quick_stack`` for layers one behind the other."""

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None,
        target_scale: float,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        """Take a step on x [N, I]."""
        ...


class Backend(Protocol):
    """The ops. Inputs are checked by the caller (shapes, dtypes, devices); a backend states in
    :meth:`why_not` what it cannot serve and may then rely on it."""

    name: str
    synthesizers: tuple[str, ...]  # the kinds of :class:`SynthesizerTensors` that it has

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """Return None if this backend serves these tensors (dtype, device), or the reason why not,
        as the end of a sentence that begins with the backend's name."""
        ...

    def available(self) -> str | None:
        """Return none if the backend can run on this machine at all, or the reason why not."""
        ...

    def linear_forward(
        self, x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, save: bool
    ) -> tuple[Tensor, Saved]:
        """Return h [N, O] and, with ``save``, what the backward needs.

        With ``training`` batch normalisation uses the batch's statistics and moves the running
        ones (mutated; unbiased variance, as PyTorch); otherwise it uses the running ones.
        """
        ...

    def linear_backward(
        self,
        grad_h: Tensor,
        x: Tensor,
        h: Tensor,
        saved: Saved,
        layer: LinearTensors,
        config: LinearConfig,
        training: bool,
        need_dx: bool,
        need_weight: bool,
    ) -> LinearGradients:
        """Take ``grad_h`` [N, O] back through activation and normalisation.

        Returns delta always; dx [N, I] and the weight's gradient [O, I] on demand; the three
        vectors' gradients wherever the parameter exists. In front of a batch normalisation in
        training the bias's gradient is exactly zero.
        """
        ...

    def linear_update_(
        self, x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
    ) -> None:
        """Apply ``rule`` to weight, bias, norm_weight and norm_bias.

        ``gradients.weight`` is not read: ``delta.T @ x`` is formed where it is applied. Mutates
        the trainable parameters, the rule's buffers and counters; nothing but the skip counter
        if a gradient is not finite.
        """
        ...

    def linear_step_(
        self,
        x: Tensor,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        max_norm: float,
        rule: RuleTensors,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        """Take a decoupled step: forward, synthetic gradient and update in one launch.

        The synthetic gradient is ``M(h) / target_scale``, scaled down to a Frobenius norm of
        ``max_norm`` if that is positive and exceeded. ``dx`` is taken with the weights as they
        were before the update. Mutates what :meth:`linear_forward` in training and
        :meth:`linear_update_` mutate; if the gradient is not finite, only the skip counter (the
        running statistics too stay as they were).

        With ``config.interface == "preactivation"`` the synthetic gradient is delta itself, the
        gradient at z: the weight moves by ``delta.T @ x``, the bias by delta's column sums (zero
        in front of a batch normalisation), and the normalisation's scale and shift, whose gradient
        is not known, not at all: ``rule.trainable`` is False for them. With ``need_prediction``
        the result then holds ``saved``, what :meth:`linear_forward` would have saved.

        Raises:
            IndexError: a class index outside ``[0, K)``; raised before anything is changed.
            ValueError: context missing or unexpected.
        """
        ...

    def bind_step(
        self,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        max_norm: float,
        rule: RuleTensors,
    ) -> BoundStep:
        """:meth:`linear_step_` with everything given that does not change from batch to batch.

        The result is good for as long as none of the tensors gets another address.
        """
        ...

    def linear_cross_entropy(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        label_smoothing: float,
        ignore_index: int,
        need_delta: bool,
    ) -> CrossEntropy:
        """Return the cross-entropy of the logits ``z = x @ weight.T + bias`` over O classes.

        It is that of PyTorch with ``reduction="mean"``, over the rows whose ``target`` (int64 [N])
        is not ``ignore_index``: of such a row, with s for ``label_smoothing`` and y for its target,
        ``log(sum(exp(z))) - (1 - s) * z[y] - s * mean(z)``. Without such rows it is NaN.

        The loss [] is of the weight's dtype. With ``need_delta`` there is its gradient at z, in the
        dtype that :meth:`linear_backward` has for delta: zero in rows that are ignored.

        Raises:
            IndexError: a target outside ``[0, O)`` that is not ``ignore_index``. On a GPU nothing
                waits for that: the loss is NaN then, and so is the row's gradient.
        """
        ...

    def synthesizer_predict(
        self, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
    ) -> Prediction: ...

    def synthesizer_gradients(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
    ) -> SlotGradients:
        """Gradients, slot by slot, of ``sum((M(h) - target_scale * grad_h) ** 2) / N``.

        Adds to ``statistics`` (float64 ``[STATISTICS_SIZE]``) the sums over all elements of
        ``s*g``, ``s*s``, ``g*g``, ``(s-g)**2`` with s = M(h) and g = target_scale * grad_h, and
        the N rows; leaves it untouched if one of the sums is not finite.
        """
        ...

    def synthesizer_update_(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
        rule: RuleTensors,
    ) -> None:
        """Do as :meth:`synthesizer_gradients`, applied by ``rule`` where they are made. A target
        that is not finite changes nothing but the rule's skip counter."""
        ...

    # -- LSTM: T steps, B sequences side by side, L layers, H hidden units ------------------------

    def lstm_forward(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        save: bool,
    ) -> LSTMTrace:
        """Run a window of an LSTM: x [T, B, I] from the state h, c [L, B, H].

        Layer l + 1 reads the hidden states of layer l, times ``dropout[l]`` [T, B, H] where
        ``dropout`` is not empty (it then has L - 1 masks, zero or 1 / (1 - p)). ``lengths`` [B]
        (int64, in [1, T]) are the rows' own numbers of steps: behind them a row's state stands
        still and its hidden states are zero. Without ``save``, cells and gates are None and
        ``hidden`` holds the last layer alone, [1, T + 1, B, H].
        """
        ...

    def lstm_backward(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
    ) -> LSTMGradients:
        """Go back through a window (``trace`` is of a forward with ``save``).

        ``grad_output`` [T, B, H] is the gradient at the last layer's hidden states, what lies past
        a row's length being ignored; ``grad_h`` and ``grad_c`` [L, B, H] those at the final state;
        None for zero. Returns delta and the gradients at the entrance always, dx and the weights'
        (a layer's two biases have the same) on demand.
        """
        ...

    def lstm_close(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
        boundary: LSTMBoundary,
        statistics: Tensor | None,
    ) -> LSTMClosed:
        """:meth:`lstm_backward` between the two ends of a window.

        It starts from what arrives at the final state plus ``strength`` times the synthetic
        gradient M(h_n, c_n) / target_scale, which is zero for the rows that ended. Where
        ``boundary.learns``, the result has a regression if there are rows to learn from: those
        whose state at the entrance is not exactly zero (if ``boundary.entrance``), and those that
        ended.
        Its gradients are scaled down, row by row, where ``max_target_norm`` is exceeded.
        With ``statistics`` it has, instead of that, the gradients that
        :meth:`synthesizer_gradients` makes of it, and ``statistics`` is added to (mutated). Where
        there is no row to learn from these may be zeros: to know it, a host has to wait for the
        device.
        """
        ...

    def lstm_update_(
        self, rows: tuple[LSTMRows, ...], layers: tuple[LSTMLayer, ...], rule: RuleTensors
    ) -> None:
        """Apply ``rule`` to all parameters, the weights' gradients being formed where they are
        applied: ``delta.T @ input`` and ``delta.T @ hidden``.

        ``rule`` has four slots a layer, in the order of :class:`LSTMLayer`. Mutates the trainable
        parameters, the rule's buffers and counters; nothing but the skip counter if a gradient of
        any layer is not finite.
        """
        ...

    def lstm_cell_forward(
        self, x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool
    ) -> CellTrace:
        """Run one step: x [B, I] from the state h, c [B, H]."""
        ...

    def lstm_cell_backward(
        self,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        layer: LSTMLayer,
        trace: CellTrace,
        need_dx: bool,
        need_weights: bool,
    ) -> CellGradients:
        """Go back through one step; h and c are the state before it. None for a zero gradient."""
        ...
