"""What the kernels share: products, the grid barrier, activation functions, update rules.

Device functions only; each takes and returns what its docstring says and touches no other memory.
They are written for Triton 3.6 and newer, and so that the interpreter computes the same: it gets
bfloat16 arithmetic wrong, hence operands are widened there; ``libdevice.tanh`` is missing there,
hence tanh is made of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))

# Indices into a rule's hyper-parameters: fused_dni.ops.types.RuleTensors (a test compares).
LR: tl.constexpr = tl.constexpr(0)
BETA1: tl.constexpr = tl.constexpr(1)
BETA2: tl.constexpr = tl.constexpr(2)
EPS: tl.constexpr = tl.constexpr(3)
WEIGHT_DECAY: tl.constexpr = tl.constexpr(4)
STEP: tl.constexpr = tl.constexpr(5)
SKIPPED: tl.constexpr = tl.constexpr(6)

_TOP: tl.constexpr = tl.constexpr(-(2**31))  # the top bit of an int32
_GIVEN_UP: tl.constexpr = tl.constexpr(1)  # the lowest, which no arrival changes
_INV_SQRT2: tl.constexpr = tl.constexpr(0.7071067811865476)
_INV_SQRT2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
_GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


# ---------------------------------------------------------------------------------------------
# Products


@triton.jit
def dot(a, b, accumulated, PRECISION: tl.constexpr):
    """Return ``accumulated + a @ b`` in float32, of operands of one type; PRECISION ("ieee",
    "tf32") says how float32 operands are multiplied."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulated, input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------
# Waiting for all programs


@triton.jit
def grid_barrier(state, programs, bound=0):
    """Wait until all ``programs`` (of a cooperative launch, counted along axis 0) are here; returns
    whether they came.

    What a program wrote before is visible to every program behind. ``state`` points to one int32
    that is zero before its first use and needs no attention afterwards: every round adds exactly
    2^31 to it, so that its low bits count arrivals, by twos, return to zero, and its top bit is the
    generation that changes when all have come (as in CUDA's cooperative groups). A program that is
    still waiting for a generation has not arrived at the next one, which therefore cannot end
    before it has woken up: see tests/kernels/test_triton_barrier.py.

    A program that has looked ``bound`` times (0: that never happens) gives up: it sets the lowest
    bit and the count back to zero, if nobody arrived meanwhile. That generation cannot end any
    more, whoever is still to come: all programs pass a barrier, or none does. A program that did
    not pass must not arrive again. The bit stays, and so does what it says to later launches.
    """
    # The atomics below are one thread's: the block's barriers extend their order to all threads.
    tl.debug_barrier()
    arrival = tl.where(tl.program_id(0) == 0, _TOP - 2 * (programs - 1), 2)
    before = tl.atomic_add(state, arrival, sem="acq_rel", scope="gpu")
    now = before
    left = tl.full((), 0, tl.int32) + bound
    waits = (before & _GIVEN_UP) == 0
    while waits:
        # Adding nothing with an acquire is an acquiring load. Its result has to be used: one that
        # nobody looks at is optimised away.
        now = tl.atomic_add(state, 0, sem="acquire", scope="gpu")
        waits = (((now ^ before) & _TOP) == 0) & ((now & _GIVEN_UP) == 0)
        if waits & (left == 1):
            # Whether that succeeded is seen by the next look.
            tl.atomic_cas(state, now, (now & _TOP) | _GIVEN_UP, sem="relaxed", scope="gpu")
        left = tl.where(left > 1, left - 1, left)
    tl.debug_barrier()
    return ((now ^ before) & _TOP) != 0


# ---------------------------------------------------------------------------------------------
# Activation functions: formulas and names as in fused_dni.backends.reference.activation


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, accurate relative to itself: a series near zero, where the
    quotient of exponentials cancels."""
    square = tl.minimum(x * x, 0.1)
    series = 1.0 + square * (
        -0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * (
            0.0218694885 - 0.0088632355 * square)))
    )  # fmt: skip
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.3125, x * series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def sigmoid(x):
    """Return ``1 / (1 + exp(-x))``, without overflow."""
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def softplus(x):
    """Return ``log(1 + exp(x))``, without overflow and accurate relative to itself."""
    decay = tl.exp(-tl.abs(x))
    one = 1.0 + decay
    # log1p by Kahan's correction of what rounding took away from the sum.
    lost = tl.where(one == 1.0, 1.0, one - 1.0)
    log1p = tl.where(one == 1.0, decay, tl.log(one) * (decay / lost))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def activate(y, NAME: tl.constexpr):
    """Return ``phi(y)``, float32."""
    if NAME == "identity":
        h = y
    elif NAME == "relu":
        h = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        h = y * 0.5 * (1.0 + tl.erf(y * _INV_SQRT2))
    elif NAME == "gelu_tanh":
        h = y * 0.5 * (1.0 + tanh((y + y * y * y * _GELU_CUBIC) * _SQRT_2_OVER_PI))
    elif NAME == "silu":
        h = y * sigmoid(y)
    elif NAME == "tanh":
        h = tanh(y)
    elif NAME == "sigmoid":
        h = sigmoid(y)
    elif NAME == "softplus":
        h = softplus(y)
    else:
        tl.static_assert(NAME == "mish")
        h = y * tanh(softplus(y))
    return h


@triton.jit
def slope(y, h, NAME: tl.constexpr):
    """Return ``phi'``, float32; from h alone for identity, relu, tanh, sigmoid (y is not read
    then)."""
    if NAME == "identity":
        d = tl.full(h.shape, 1.0, tl.float32)
    elif NAME == "relu":
        d = tl.where(h > 0, 1.0, 0.0)
    elif NAME == "tanh":
        d = 1.0 - h * h
    elif NAME == "sigmoid":
        d = h * (1.0 - h)
    elif NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(y * _INV_SQRT2)) + y * _INV_SQRT2PI * tl.exp(-0.5 * y * y)
    elif NAME == "gelu_tanh":
        t = tanh((y + y * y * y * _GELU_CUBIC) * _SQRT_2_OVER_PI)
        inner = (1.0 + 3.0 * (y * y * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        d = 0.5 * (1.0 + t) + 0.5 * y * (1.0 - t * t) * inner
    elif NAME == "silu":
        s = sigmoid(y)
        d = s * (1.0 + y * (1.0 - s))
    elif NAME == "softplus":
        d = sigmoid(y)
    else:
        tl.static_assert(NAME == "mish")
        t = tanh(softplus(y))
        d = t + y * (1.0 - t * t) * sigmoid(y)
    return d


# ---------------------------------------------------------------------------------------------
# Update rules: formulas as in fused_dni.backends.reference.rules


@triton.jit
def rule_factors(hyper, step, KIND: tl.constexpr):
    """Return what a rule multiplies by in step number ``step`` (this one included), float32.

    Made in float64, where ``1 - beta`` and the corrections still have their digits::

        sgd     lr, momentum, weight decay
        adam    lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps,
                weight decay (adamw: 1 - lr * weight decay)
    """
    lr, beta1, decay = tl.load(hyper + LR), tl.load(hyper + BETA1), tl.load(hyper + WEIGHT_DECAY)
    if KIND == "sgd":
        factors = (lr.to(tl.float32), beta1.to(tl.float32), decay.to(tl.float32))
    else:
        beta2, eps = tl.load(hyper + BETA2), tl.load(hyper + EPS)
        corrected1 = 1.0 - tl.exp2(step * tl.log2(beta1))
        corrected2 = 1.0 - tl.exp2(step * tl.log2(beta2))
        if KIND == "adamw":
            decay = 1.0 - lr * decay
        factors = (
            (lr / corrected1).to(tl.float32),
            (1.0 - beta1).to(tl.float32),
            beta2.to(tl.float32),
            (1.0 - beta2).to(tl.float32),
            (1.0 / tl.sqrt(corrected2)).to(tl.float32),
            eps.to(tl.float32),
            decay.to(tl.float32),
        )
    return factors


@triton.jit
def apply_rule(
    p, g, m, v, factors, KIND: tl.constexpr, NESTEROV: tl.constexpr, MOMENTUM: tl.constexpr
):
    """Return new values (p, m, v) of a parameter with gradient g; ``factors`` of
    :func:`rule_factors`.

    m is not read without MOMENTUM, v not by SGD; they come back as they are then.
    """
    if KIND == "sgd":
        lr, momentum, decay = factors
        g += decay * p
        if MOMENTUM:
            m = momentum * m + g
            g = g + momentum * m if NESTEROV else m
        p -= lr * g
    else:
        lr, rest1, beta2, rest2, root, eps, decay = factors
        if KIND == "adam":
            g += decay * p
        else:
            p *= decay
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        p -= lr * (m / (tl.sqrt_rn(v) * root + eps))
    return p, m, v
