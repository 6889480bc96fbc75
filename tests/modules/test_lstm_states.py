"""Which states are a module's own: what it handed out, whatever users do to the tensors.

Where that cannot be known the gradient flows as with ``nn.LSTM``, and nothing is taught."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from lstm_twins import BACKENDS, cell, close, double, grads, local_gradients, lstm, plain_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dni as fd

pytestmark = [pytest.mark.slow(30), pytest.mark.usefixtures("one_thread")]
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
RATE = 0.1
ENDED = torch.tensor([False, True, False])


def taught(module):
    """Rows that the synthesizer was taught."""
    return int(fd.diagnostics(module)[""]["targets"])


def silent(module):
    """The module with a synthesizer that predicts nothing: what it injects is zero."""
    nn.init.zeros_(module.synthesizer.weight), nn.init.zeros_(module.synthesizer.bias)
    return module


# ---------------------------------------------------------------------------------------------
# The module's own

SAME = {
    "as returned": lambda t: t,
    "detached": torch.Tensor.detach,
    "data": lambda t: t.data,
    "cloned": torch.Tensor.clone,
    "detached clone": lambda t: t.detach().clone(),
    "copied": lambda t: t.data.clone(),
    "repackaged": lambda t: t.detach().requires_grad_(False),
    "contiguous": lambda t: t.contiguous(),
    "view": lambda t: t.view_as(t),
    "transposed twice": lambda t: t.transpose(0, 1).transpose(0, 1),
    "all rows": lambda t: t[:, :],
    "masked by ones": lambda t: t * torch.ones(t.shape[1], 1, dtype=t.dtype),
    "all rows by number": lambda t: t[:, torch.arange(t.shape[1])],
    "cpu": lambda t: t.cpu(),
}


@backends
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
@pytest.mark.parametrize("how", SAME)
def test_its_own_state_is_cut_and_learned_from(backend, rule, how):
    """Whichever way it comes back; rows that ended start anew and are no lesson there."""
    module, plain = (m := lstm(INPUTS, HIDDEN, 2, backend=backend, update=rule)), plain_of(m)
    x = double(2, STEPS, BATCH, INPUTS)
    first = x[0].clone().requires_grad_()
    _, state = module(first, end_of_sequence=ENDED)
    state = tuple(SAME[how](t) for t in state)
    output, _ = module(x[1], state)
    start = tuple(t.detach() * ~ENDED[:, None] for t in state)
    close(output, plain(x[1], start)[0])
    output.sum().backward()
    assert first.grad is None
    assert module.statistics[-1] == 2


@backends
@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 1), slice(0, 3, 2), slice(2, 3)])
@pytest.mark.parametrize("detached", [True, False])
def test_rows_of_its_memory_are_known(backend, rows, detached):
    """A slice of the state is some of its rows, whether they ended and their context."""
    module = lstm(INPUTS, HIDDEN, 2, backend=backend, context_features=3)
    labels = torch.tensor([0, 2, 1])
    _, state = module(double(STEPS, BATCH, INPUTS), end_of_sequence=ENDED, context=labels)
    given = tuple((t.detach() if detached else t)[:, rows] for t in state)
    count = given[0].shape[1]
    x = double(STEPS, count, INPUTS)
    output, _ = module(x, given, context=labels[:count])
    start = tuple(t.detach() * ~ENDED[rows, None] for t in given)
    close(output, plain_of(module)(x, start)[0])
    module.zero_grad()
    output.sum().backward()
    going = int((~ENDED[rows]).sum())
    assert module.statistics[-1] == going
    seen = module.synthesizer.context_weight.grad
    expected = set() if not going else set(labels[rows][~ENDED[rows]].tolist())
    found = set() if seen is None else set(seen.any(0).nonzero().flatten().tolist())
    assert found == expected


@backends
def test_several_streams_in_turn(backend):
    """States are known for as long as they live, not the last one alone."""
    module = lstm(INPUTS, HIDDEN, backend=backend)
    states = [None] * 100
    for round in range(3):
        for k in range(len(states)):
            output, state = module(double(STEPS, 1, INPUTS), states[k])
            output.sum().backward()
            states[k] = tuple(t.detach() for t in state)
        assert module.statistics[-1] == 100 * round


@pytest.mark.filterwarnings("ignore:.*the synthesizer was never taught")
def test_what_was_returned_is_not_kept():
    """Neither states nor graphs, beyond the last state; nor a module by its states."""
    module = lstm(INPUTS, HIDDEN)
    alive = []
    for _ in range(200):
        output, state = module(double(STEPS, BATCH, INPUTS))
        output.sum().backward()
        alive.append(weakref.ref(state[0].untyped_storage()))
    del output
    assert len(module._returned._records) <= 64
    reference, kept = weakref.ref(module), tuple(t.detach() for t in state)
    del module, state
    gc.collect()
    assert reference() is None and kept[0].shape[0] == 1


class Stream(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.lstm, self.hidden = lstm(INPUTS, HIDDEN, 2, backend=backend), None

    def forward(self, x, ended=None):
        output, state = self.lstm(x, self.hidden, end_of_sequence=ended)
        self.hidden = tuple(t.detach() for t in state)
        return output


@backends
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_state_beside_the_module(backend, how):
    """A module that keeps its hidden state, copied whole."""

    model = Stream(backend)
    x = double(2, STEPS, BATCH, INPUTS)
    model(x[0], ENDED).sum().backward()
    model.zero_grad()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for m in (model, twin):
        m(x[1]).square().sum().backward()
        assert m.lstm.statistics[-1] == 1 + 2
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 0)


@backends
@pytest.mark.parametrize("kind", ["window", "cell"])
def test_a_state_that_is_told(backend, kind):
    """From a file, or in a buffer of one's own: what was told of it counts."""
    module = (cell if kind == "cell" else lstm)(INPUTS, HIDDEN, backend=backend)
    shape = (BATCH, HIDDEN) if kind == "cell" else (1, BATCH, HIDDEN)
    state = double(*shape), double(*shape)
    x = double(BATCH, INPUTS) if kind == "cell" else double(STEPS, BATCH, INPUTS)
    assert module.remember(state, end_of_sequence=ENDED) is state
    made = module(x, state)
    close(made[0], plain_of(module)(x, tuple(t * ~ENDED[:, None] for t in state))[0])
    if kind == "cell":
        module.boundary(made)
    made[0].sum().backward()
    assert taught(module) == 2
    with pytest.raises(RuntimeError, match="h and c in state must be as the module returns them"):
        module.remember(tuple(t[..., :2] for t in state))


# ---------------------------------------------------------------------------------------------
# What is not known to be its own


class Net(nn.Module):
    """Everything between two windows that has parameters of its own."""

    def __init__(self, core):
        super().__init__()
        self.core = core
        dtype = torch.float64
        self.start = nn.Parameter(double(1, 1, HIDDEN))
        self.bridge = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.skip = nn.Linear(INPUTS, HIDDEN, dtype=dtype)
        self.gate = nn.Parameter(double(HIDDEN))


DONE = torch.tensor([True, False, False]).view(1, 3, 1)
BETWEEN = {
    "learned start": lambda n, h, c, x: (torch.where(DONE, n.start, h), c * ~DONE),
    "learned start, nobody done": lambda n, h, c, x: (torch.where(DONE & ~DONE, n.start, h), c),
    "learned start by lerp": lambda n, h, c, x: (DONE * n.start + ~DONE * h, c),
    "bridge": lambda n, h, c, x: (n.bridge(h), c),
    "bridge on c": lambda n, h, c, x: (h, n.bridge(c)),
    "bridge of a detached state": lambda n, h, c, x: (n.bridge(h.detach()), c.detach()),
    "residual": lambda n, h, c, x: (h + n.skip(x[0]), c),
    "residual in place": lambda n, h, c, x: (h.clone().add_(n.skip(x[0])), c),
    "gate": lambda n, h, c, x: (h * torch.sigmoid(n.gate), c),
    "deep": lambda n, h, c, x: (n.bridge(n.bridge(n.bridge(h))).tanh(), c),
    "checkpointed bridge": lambda n, h, c, x: (checkpoint(n.bridge, h, use_reentrant=False), c),
    "rows written": lambda n, h, c, x: (
        h.index_copy(1, torch.tensor([0]), n.start.expand_as(h[:, :1])), c),
    "concatenated": lambda n, h, c, x: (torch.cat((n.start, h[:, 1:]), 1), c),
    "mask": lambda n, h, c, x: (h * ~DONE, c * ~DONE),
    "reordered": lambda n, h, c, x: (h[:, [2, 0, 1]], c[:, [2, 0, 1]]),
    "repeated": lambda n, h, c, x: (h[:, [0, 0, 1]], c[:, [0, 0, 1]]),
    "halved": lambda n, h, c, x: (h * 0.5, c),
    "h alone": lambda n, h, c, x: (h, torch.zeros_like(c)),
    "swapped": lambda n, h, c, x: (c, h),
    "identity bridge": lambda n, h, c, x: (h @ n.bridge.weight * 0 + h, c),
}  # fmt: skip


def one_backward(net, between, x):
    """Two windows, one backward: the gradients of everything."""
    h, c = net.core(x[0])[1]
    state = BETWEEN[between](net, h, c, x[1])
    net.core(x[1], state)[0].square().mean().backward()
    return {n: p.grad for n, p in net.named_parameters() if not n.startswith("core.synth")}


@backends
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("predicts", [True, False])
def test_its_gradient_is_that_of_nn_lstm(backend, between, predicts):
    """To whatever stands between two windows, and on to the first one, which then needs no
    prediction; only the second one's end has one."""
    core = lstm(INPUTS, HIDDEN, backend=backend)
    if not predicts:
        silent(core)
    ours = Net(core)
    theirs = copy.deepcopy(ours)
    theirs.core = plain_of(core)
    x = double(2, STEPS, BATCH, INPUTS)
    found, expected = (one_backward(net, between, x) for net in (ours, theirs))
    for name, g in expected.items():
        if g is None or not (predicts and name.startswith("core.")):
            if g is None:
                assert found[name] is None or not found[name].any(), name
            elif not predicts:
                close(found[name], g)
        if g is not None and not name.startswith("core.") and g.any():
            assert found[name] is not None and found[name].any(), name
    assert taught(core) == 0 and all(g is None for g in grads(core.synthesizer))


@backends
@pytest.mark.parametrize("between", [b for b in BETWEEN if "detached" not in b])
def test_a_prediction_is_not_added_to_what_it_predicts(backend, between):
    """The first window's gradient is the true one of the second, whose end has a prediction."""
    core = lstm(INPUTS, HIDDEN, backend=backend)
    ours, x = Net(core), double(2, STEPS, BATCH, INPUTS)
    theirs = copy.deepcopy(ours)
    theirs.core = plain_of(core)
    h, c = theirs.core(x[0])[1]
    output, end = theirs.core(x[1], BETWEEN[between](theirs, h, c, x[1]))
    rows = torch.cat((end[0][0], end[1][0]), 1)
    synthetic = core.synthesizer(rows.detach(), None).detach() / (STEPS * BATCH)
    (output.square().mean() + (rows * synthetic).sum()).backward()
    one_backward(ours, between, x)
    close(local_gradients(core), local_gradients(theirs.core))
    close(ours.start.grad, theirs.start.grad)


ALONE = ["mask", "reordered", "repeated", "halved", "h alone", "swapped"]


@backends
@pytest.mark.parametrize("between", ALONE)
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
def test_a_backward_a_window(backend, between, rule):
    """Truncated training, nothing detached: where nobody else asks for a gradient, it ends at a
    window whose backward has been run."""
    core = silent(lstm(INPUTS, HIDDEN, backend=backend, update=rule))
    ours = Net(core)
    plain = plain_of(core)
    optimizer = torch.optim.SGD(
        (plain if rule else nn.ModuleList([plain, core])).parameters(), RATE
    )
    embed = nn.Linear(INPUTS, INPUTS, dtype=torch.float64)
    for net in (core, plain):
        state = None
        torch.manual_seed(4)
        for _ in range(4):
            window = embed(double(STEPS, BATCH, INPUTS)).tanh()
            if state is not None:
                h, c = state if net is core else (t.detach() for t in state)
                state = BETWEEN[between](ours, h, c, window)
            output, state = net(window, state)
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    own = plain.state_dict()
    close({n: core.state_dict()[n] for n in own}, dict(own))
    assert taught(core) == 0


@backends
@pytest.mark.parametrize("between", ["learned start", "bridge", "residual", "gate", "deep"])
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
def test_a_backward_a_window_with_what_asks_for_a_gradient(backend, between, rule):
    """As with ``nn.LSTM`` it is an error that says to detach; then it works as there."""
    core = silent(lstm(INPUTS, HIDDEN, backend=backend, update=rule))
    net = Net(core)
    x = double(2, STEPS, BATCH, INPUTS)
    output, (h, c) = core(x[0])
    output.sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    output, _ = core(x[1], BETWEEN[between](net, h, c, x[1]))
    with pytest.raises(RuntimeError, match="other tensors that ask for a gradient: detach it"):
        output.sum().backward()
    close([p.detach() for p in net.parameters()], before, 0)
    net.zero_grad()
    plain = copy.deepcopy(net)
    plain.core = plain_of(core)
    for model in (net, plain):
        given = BETWEEN[between](model, h.detach(), c.detach(), x[1])
        model.core(x[1], given)[0].square().sum().backward()
        model.core.zero_grad()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            close(dict(net.named_parameters())[name].grad, p.grad)


STRANGE = {
    "random": lambda h, c: (torch.randn_like(h), torch.randn_like(c)),
    "zeros": lambda h, c: (torch.zeros_like(h), torch.zeros_like(c)),
    "ones": lambda h, c: (torch.ones_like(h), torch.ones_like(c)),
    "rows of zeros": lambda h, c: (torch.randn_like(h) * ~DONE, torch.randn_like(c) * ~DONE),
    "own, other c": lambda h, c: (h.detach(), torch.randn_like(c)),
    "masked": lambda h, c: (h.detach() * ~DONE, c.detach() * ~DONE),
    "reordered": lambda h, c: (h.detach()[:, [1, 2, 0]], c.detach()[:, [1, 2, 0]]),
    "crossed rows": lambda h, c: (h.detach(), c.detach()[:, [1, 2, 0]]),
    "in place": lambda h, c: (h.detach().mul_(0.5), c.detach()),
    "noise": lambda h, c: (h.detach() + 1e-9, c.detach()),
}


@backends
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("kind", ["window", "cell"])
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
def test_nothing_is_learned_at_a_state_from_elsewhere(backend, strange, kind, rule):
    """And training is plain ``nn.LSTM`` where no state is continued."""
    ours = silent((cell if kind == "cell" else lstm)(INPUTS, HIDDEN, backend=backend, update=rule))
    plain = plain_of(ours)
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    shape = (BATCH, HIDDEN) if kind == "cell" else (1, BATCH, HIDDEN)
    x = double(BATCH, INPUTS) if kind == "cell" else double(STEPS, BATCH, INPUTS)
    before = tuple(torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64) for _ in "hc")
    for _ in range(4):
        start = STRANGE[strange](*before)
        start = tuple(t.reshape(shape) for t in start)
        for net in (ours, plain):
            net.zero_grad()
            made = net(x, start)
            if kind == "cell" and net is ours:
                before = net.boundary(made)
            elif net is ours:
                before = made[1]
            made[0].square().mean().backward()
        if rule is not None:
            optimizer.step()
        else:
            close(local_gradients(ours), local_gradients(plain))
        before = tuple(t.reshape(1, BATCH, HIDDEN) for t in before)
    if rule is not None:
        own = plain.state_dict()
        close({n: ours.state_dict()[n] for n in own}, dict(own))
    assert taught(ours) == 0


def test_another_modules_state_is_not_its_own():
    """Not even that of a copy, or of one whose parameters are the same."""
    one = silent(lstm(INPUTS, HIDDEN))
    other = fd.FusedDNILSTM.from_lstm(one.to_lstm())
    for maker in (other, copy.deepcopy(one)):
        _, state = maker(double(STEPS, BATCH, INPUTS))
        one(double(STEPS, BATCH, INPUTS), state)[0].sum().backward()
        assert taught(one) == 0
        assert any(p.grad is not None for p in maker.parameters())


@backends
def test_equal_rows_are_told_apart(backend):
    """Two rows that read the same: one ended, the other did not, and a copy comes back."""
    module = lstm(INPUTS, HIDDEN, backend=backend)
    x = double(STEPS, 1, INPUTS).expand(-1, 2, -1)
    ended = torch.tensor([True, False])
    for treat in SAME.values():
        _, state = module(x, end_of_sequence=ended)
        given = tuple(treat(t) for t in state)
        start = tuple(t.detach() * ~ended[:, None] for t in state)
        close(module(x, given)[0], plain_of(module)(x, start)[0])


@backends
def test_rows_that_ended_and_cannot_be_followed(backend):
    """What was done to the state is done: one is warned where such a row goes on."""
    for pick, warns in (([2, 0, 1], True), ([0, 2], False)):
        module = lstm(INPUTS, HIDDEN, backend=backend)
        x = double(STEPS, BATCH, INPUTS)
        _, state = module(x, end_of_sequence=ENDED)
        given = tuple(t.detach()[:, pick] for t in state)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            output, _ = module.eval()(x[:, : len(pick)], given)
        close(output, plain_of(module)(x[:, : len(pick)], given)[0])
        assert len(seen) == warns
        if warns:
            assert "a row whose sequence ended goes on" in str(seen[0].message)
            assert seen[0].filename == __file__


@backends
def test_changed_in_place(backend):
    """It is no longer what was returned: nobody's gradient is lost, and nothing is taught."""
    module = silent(lstm(INPUTS, HIDDEN, backend=backend))
    skip = nn.Linear(INPUTS, HIDDEN, dtype=torch.float64)
    plain, x = plain_of(module), double(2, STEPS, BATCH, INPUTS)
    found = []
    for net in (module, plain):
        skip.zero_grad()
        h, c = (t.detach() for t in net(x[0])[1])
        h += skip(x[1, 0])
        net(x[1], (h, c))[0].square().mean().backward()
        found.append([skip.weight.grad.clone(), local_gradients(net)])
    close(*found)
    assert taught(module) == 0


# ---------------------------------------------------------------------------------------------
# Hooks, checkpoints, replicas


def hooked(cell_, how):
    if how == "backward":
        cell_.register_full_backward_hook(lambda m, i, o: None)
    elif how == "backward pre":
        cell_.register_full_backward_pre_hook(lambda m, o: None)
    elif how == "forward":
        cell_.register_forward_hook(lambda m, i, o: tuple(t.view_as(t) for t in o))
    elif how == "both":
        cell_.register_full_backward_hook(lambda m, i, o: None)
        cell_.register_forward_hook(lambda m, i, o: None)
    return cell_


@backends
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
@pytest.mark.parametrize("how", ["backward", "backward pre", "forward", "both"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_a_cell(backend, how, rule):
    """Boundaries, steps and lessons are those without a hook."""
    bare = cell(INPUTS, HIDDEN, backend=backend, update=rule)
    hook = hooked(copy.deepcopy(bare), how)
    x = double(3, STEPS, BATCH, INPUTS)
    for module in (bare, hook):
        state = None
        for window in x:
            for step in window:
                state = module(step, state)
            following = module.boundary(state, ENDED)
            state[0].square().mean().backward()
            state = following
    close({n: p.grad for n, p in hook.named_parameters()},
          {n: p.grad for n, p in bare.named_parameters()})  # fmt: skip
    close(dict(hook.state_dict()), dict(bare.state_dict()))
    close(hook.statistics, bare.statistics)
    assert taught(hook) > 0


@backends
@pytest.mark.parametrize("how", ["backward", "backward pre"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_a_window(backend, how):
    bare = lstm(INPUTS, HIDDEN, 2, backend=backend)
    hook = hooked(copy.deepcopy(bare), how)
    x = double(3, STEPS, BATCH, INPUTS)
    for module in (bare, hook):
        state = None
        for window in x:
            output, state = module(window, state, end_of_sequence=ENDED)
            output.square().mean().backward()
    close([p.grad for p in hook.parameters()], [p.grad for p in bare.parameters()])


@backends
def test_a_mask_inside_a_cells_window(backend):
    """Its gradient is autograd's own, and the boundary's lesson what arrives there."""
    module = cell(INPUTS, HIDDEN, backend=backend)
    start = nn.Parameter(double(HIDDEN))
    keep = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    x = double(2, STEPS, BATCH, INPUTS)
    state = None
    for step in x[0]:
        state = module(step, state)
    following = module.boundary(state)
    state[0].sum().backward()
    h, c = following
    h = torch.where(keep.bool(), h, start)
    for step in x[1]:
        h, c = module(step, (h * keep, c * keep))
    module.boundary((h, c))
    h.square().sum().backward()
    assert start.grad is not None
    assert taught(module) == BATCH


@backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_stream(backend, reentrant):
    """Recomputed windows decide as the first time."""
    module = lstm(INPUTS, HIDDEN, backend=backend)
    twin, x = copy.deepcopy(module), double(3, STEPS, BATCH, INPUTS)
    for net in (module, twin):
        state = None
        for window in x:
            given = window.clone().requires_grad_()
            if net is module:
                output, state = checkpoint(net, given, state, use_reentrant=reentrant)
            else:
                output, state = net(given, state)
            output.square().mean().backward()
            state = tuple(t.detach() for t in state)
    close([p.grad for p in module.parameters()], [p.grad for p in twin.parameters()])


def test_data_parallel():
    """On one device it is the module itself; a replica's states are known to it."""
    module = lstm(INPUTS, HIDDEN)
    parallel, state = nn.DataParallel(module), None
    for window in double(3, STEPS, BATCH, INPUTS):
        output, state = parallel(window, state)
        output.square().mean().backward()
    assert taught(module) == 2 * BATCH
    replica = module._replicate_for_data_parallel()
    replica._parameters = module._parameters
    replica._modules = module._modules
    replica(double(STEPS, BATCH, INPUTS), tuple(t.detach() for t in state))[0].sum().backward()
    assert taught(module) == 3 * BATCH


@pytest.mark.parametrize("kind", ["parameter", "expanded", "network", "buffer and parameter"])
@backends
def test_a_learned_initial_state_gets_its_gradient(backend, kind):
    """In every window that starts from it, among others that continue."""
    module = silent(lstm(INPUTS, HIDDEN, backend=backend))
    plain = plain_of(module)
    start = nn.Parameter(double(1, BATCH if kind == "parameter" else 1, HIDDEN))
    network = nn.Linear(INPUTS, HIDDEN, dtype=torch.float64)
    x = double(4, STEPS, BATCH, INPUTS)
    found = []
    for net in (module, plain):
        start.grad = None
        network.zero_grad()
        state = None
        for k, window in enumerate(x):
            if k % 2 == 0:
                learned = {
                    "parameter": lambda: (start, start * 2),
                    "expanded": lambda: (start.expand(1, BATCH, HIDDEN),) * 2,
                    "network": lambda: (network(x[0, :1]), network(x[1, :1])),
                    "buffer and parameter": lambda: (
                        torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64),
                        start.expand(1, BATCH, HIDDEN),
                    ),
                }
                state = learned[kind]()
            else:
                state = tuple(t.detach() for t in state)
            output, state = net(window, state)
            output.square().mean().backward()
        found.append([start.grad, network.weight.grad])
    close(*found)
    assert taught(module) == 2 * BATCH


# ---------------------------------------------------------------------------------------------
# Traced code


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "what",
    ["random", "detached", "copied", "masked", pytest.param("reordered", marks=pytest.mark.repeat)],
)
def test_traced(fresh, what):
    """Which state is the module's own is seen when compiled code runs, as in eager."""
    module = lstm(INPUTS, HIDDEN)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ways = {
        "random": lambda s: tuple(torch.ones_like(t) for t in s),
        "detached": lambda s: tuple(t.detach() for t in s),
        "copied": lambda s: tuple(t.detach().clone() for t in s),
        "masked": lambda s: tuple(t.detach() * ~DONE for t in s),
        "reordered": lambda s: tuple(t.detach()[:, [2, 0, 1]] for t in s),
    }
    for run in (compiled, twin):
        torch.manual_seed(3)
        state = None
        for _ in range(3):
            output, state = run(double(STEPS, BATCH, INPUTS), state)
            output.square().mean().backward()
            state = ways[what](state)
    expected = taught(twin)
    assert expected == (2 * BATCH if what in ("detached", "copied") else 0)
    assert taught(module) == expected
    none = torch.zeros((), dtype=torch.float64)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        close(none if p.grad is None or not p.grad.any() else p.grad,
              none if q.grad is None else q.grad)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_traced_and_changed_in_place(fresh):
    """No silent loss of a gradient: it is refused where it cannot be seen."""
    module = lstm(INPUTS, HIDDEN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = double(STEPS, BATCH, INPUTS)
    output, (h, c) = compiled(x)
    output.sum().backward()
    with torch.no_grad():
        h += 1.0
    compiled(x, (h.detach(), c.detach()))[0].sum().backward()
    assert taught(module) == 0
    with pytest.raises(RuntimeError, match="hx was changed in place since it was returned"):
        compiled(x, (h, c))


# ---------------------------------------------------------------------------------------------
# Warnings


class Forgetful:
    """Sequences of windows, each from a zero state; the last window is the end."""

    def __init__(self, kind, says=False, **options):
        make = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM
        torch.manual_seed(0)
        self.module, self.says = make(INPUTS, HIDDEN, **options), says

    def run(self, sequences, windows, between=lambda s: s):
        module = self.module
        for _ in range(sequences):
            state, loss = None, 0.0
            for k in range(windows):
                ended = torch.full((BATCH,), k == windows - 1) if self.says else None
                if isinstance(module, fd.FusedDNILSTMCell):
                    for step in torch.randn(2, BATCH, INPUTS):
                        state = module(step, state)
                    loss = loss + state[0].square().mean()
                    state = between(module.boundary(state, ended))
                else:
                    output, state = module(
                        torch.randn(2, BATCH, INPUTS), state, end_of_sequence=ended
                    )
                    loss = loss + output.square().mean()
                    state = between(state)
            loss.backward()


def said(use, *arguments):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        use(*arguments)
    return [str(w.message) for w in seen if "Full backward" not in str(w.message)]


kinds = pytest.mark.parametrize("kind", ["window", "cell"])


@kinds
@pytest.mark.parametrize("windows", [2, 5])
@pytest.mark.parametrize("rule", [None, fd.SGD(1e-3)])
def test_ends_that_nobody_told(kind, windows, rule):
    """Said once, with the remedy; what was counted is in diagnostics."""
    use = Forgetful(kind, update=rule)
    (message,) = said(use.run, 60, windows)
    assert "end_of_sequence=" in message and type(use.module).__name__ in message
    assert said(use.run, 60, windows) == []
    found = fd.diagnostics(use.module)[""]
    assert found["windows"] == 120 * windows
    assert found["windows_continued"] == 120 * (windows - 1)


@kinds
def test_ends_that_were_told(kind):
    assert said(Forgetful(kind, says=True).run, 150, 2) == []


@kinds
def test_ends_of_long_streams_need_no_word(kind):
    """An epoch's end among many windows."""
    assert said(Forgetful(kind).run, 50, 30) == []


@kinds
def test_no_warning_without_predictions(kind):
    """Without a synthesizer, in eval and without gradients, whatever is done."""
    use = Forgetful(kind, synthesizer=None)
    assert said(use.run, 150, 2) == []
    use = Forgetful(kind)
    use.module.eval()
    assert said(use.run, 150, 2) == []
    use.module.train()
    with torch.no_grad():
        x = torch.randn(BATCH, INPUTS) if kind == "cell" else torch.randn(2, BATCH, INPUTS)
        assert said(lambda: [use.module(x) for _ in range(200)]) == []


@kinds
@pytest.mark.parametrize(
    ("windows", "between"), [(1, lambda s: s), (3, lambda s: tuple(t.detach() * 0.5 for t in s))]
)
def test_a_synthesizer_that_is_never_taught(kind, windows, between):
    """Nothing is ever continued, or never as it was returned."""
    use = Forgetful(kind)
    (message,) = said(use.run, 150, windows, between)
    assert "the synthesizer was never taught" in message and "synthesizer=None" in message
    assert said(use.run, 150, windows, between) == []


@kinds
def test_predictions_out_of_proportion(kind):
    use = Forgetful(kind, says=True)
    with torch.no_grad():
        use.module.synthesizer.bias.fill_(1e4)
    (message,) = said(use.run, 40, 2)
    assert "times as large as the gradients" in message and "max_target_norm" in message
    assert fd.diagnostics(use.module)[""]["norm_ratio"] > 100


def test_a_warning_shows_the_users_line():
    use = Forgetful("window")
    with pytest.warns(UserWarning, match="end_of_sequence=") as seen:
        use.run(60, 2)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "rule"])
def test_inference_mode(training, rule):
    """As no_grad(): windows, their states, and what ended; training goes on behind it."""
    lstm = fd.FusedDNILSTM(4, 5, update=rule).train(training)
    x, ended = torch.randn(3, 2, 4), torch.tensor([True, False])
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, state = lstm(x, end_of_sequence=ended)
            copied = tuple(t.clone() for t in state)
            found.append([lstm(x, state)[0], lstm(x, copied)[0], lstm(x)[0]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[1][0][:, 0], found[1][2][:, 0])  # started anew
    lstm.train()(x)[0].sum().backward()
    cell = fd.FusedDNILSTMCell(4, 5).train(training)
    with torch.inference_mode():
        state = cell.boundary(cell(x[0]), ended)
        torch.testing.assert_close(cell(x[1], state)[0][0], cell(x[1])[0][0])
