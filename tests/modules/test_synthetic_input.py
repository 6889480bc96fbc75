"""Predicted inputs: what a layer sees, what its model learns, and what goes down."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from clusters import clusters
from torch import nn

import fused_dni as fd

N, I, O, X = 6, 5, 4, 7  # noqa: E741 rows, inputs, outputs, features of the source


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(synthetic: bool = True, update: fd.SGD | None = None) -> fd.FusedDNILinear:
    made = fd.FusedDNILinear(
        I,
        O,
        activation="tanh",
        synthesizer=fd.LinearSynthesizer(O, dtype=torch.float64) if synthetic else None,
        update=update,
        dtype=torch.float64,
    )
    if synthetic:
        nn.init.normal_(made.synthesizer.weight)
    return made


def stand(module: nn.Module | None = None, **more) -> fd.SyntheticInput:
    model = nn.Linear(X, I, dtype=torch.float64)
    return fd.SyntheticInput(layer() if module is None else module, model, **more)


def close(got, exact):
    torch.testing.assert_close(got, exact, rtol=64 * torch.finfo(torch.float64).eps, atol=1e-15)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss])
def test_one_step_equals_the_formulas(loss):
    made = stand(layer(synthetic=False), loss=loss)
    h, x, arriving = double(N, I).requires_grad_(), double(N, X), double(N, O)
    made(h, source=x).backward(arriving)

    plain = copy.deepcopy(made)
    plain.zero_grad()
    guess = plain.model(x)
    loss(guess, h.detach()).backward()
    cut = guess.detach().requires_grad_()
    torch.tanh(F.linear(cut, plain.module.weight, plain.module.bias)).backward(arriving)
    close(h.grad, cut.grad)
    for got, exact in zip(made.parameters(), plain.parameters(), strict=True):
        close(got.grad, exact.grad)


def test_the_layer_never_sees_the_value_of_its_input():
    """Forward unlocked: output, update and dx are the same to the bit whatever is below."""
    found = []
    start = stand(layer(update=fd.SGD(0.1)))
    x = double(N, X)
    for below in (double(N, I), double(N, I)):
        made, h = copy.deepcopy(start), below.requires_grad_()
        out = made(h, source=x)
        out.sum().backward()
        found.append((out.detach(), h.grad, made.module.weight.detach(), made.model.weight.grad))
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[0][3], found[1][3])
    assert not torch.equal(found[0][2], start.module.weight)


def test_it_is_what_a_process_without_the_input_does():
    made = stand()
    apart = copy.deepcopy(made)
    h, x, arriving = double(N, I).requires_grad_(), double(N, X), double(N, O)
    made(h, source=x).backward(arriving)

    guess = apart.model(x)
    _, (dx,), ticket = fd.step_local(apart.module, guess.detach().requires_grad_())
    fd.learn_late(apart.module, ticket, arriving)
    apart.loss(guess, h.detach()).backward()
    close(h.grad, dx)
    for got, exact in zip(made.parameters(), apart.parameters(), strict=True):
        close(got.grad, exact.grad)


def test_a_model_with_a_rule_is_updated_by_it():
    model = fd.FusedDNILinear(X, I, synthesizer=None, update=fd.SGD(0.1), dtype=torch.float64)
    made = fd.SyntheticInput(layer(), model)
    h, x = double(N, I), double(N, X)
    before, bias = (p.detach().clone().requires_grad_() for p in (model.weight, model.bias))
    made(h, source=x).sum().backward()
    F.mse_loss(F.linear(x, before, bias), h).backward()
    close(model.weight.detach(), (before - 0.1 * before.grad).detach())


def test_the_model_learns_where_nothing_below_asks_for_a_gradient():
    made = stand()
    made(double(N, I), source=double(N, X)).sum().backward()
    assert made.model.weight.grad.abs().sum() > 0


def test_on_a_step_without_a_target_nothing_goes_down_and_the_model_learns():
    below = fd.FusedDNILinear(
        X, I, synthesizer=fd.LinearSynthesizer(I, dtype=torch.float64), dtype=torch.float64
    )
    made = stand()
    both = nn.ModuleList([below, made])
    schedule = fd.Schedule(both, target_every=2)
    x = double(N, X)
    seen = []
    for _ in range(2):
        both.zero_grad()
        made(below(x), source=x).sum().backward()
        seen.append((below.synthesizer.weight.grad, made.model.weight.grad))
        schedule.step()
    assert seen[0][0] is not None and seen[1][0] is None
    assert all(grad.abs().sum() > 0 for _, grad in seen)


def test_in_warm_up_the_layer_sees_its_input_and_the_model_learns():
    made = stand()
    fd.Schedule(made, warmup_steps=1)
    h, x = double(N, I), double(N, X)
    out = made(h, source=x)
    with torch.no_grad():
        assert torch.equal(out, made.module(h))
    out.sum().backward()
    assert made.model.weight.grad.abs().sum() > 0


def test_elsewhere_it_is_the_layer_alone():
    made = stand()
    h, x = double(N, I), double(N, X)
    with torch.no_grad():
        alone = made.module(h)
        assert torch.equal(made(h), alone) and torch.equal(made(h, source=x), alone)
    made.eval()
    assert torch.equal(made(h), alone)


def test_diagnostics_look_at_true_inputs_and_leave_the_model_alone():
    made = stand()
    h, x = double(N, I), double(N, X)
    seen = []
    made.module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    fd.diagnostics(made, lambda: made(h, source=x).sum())
    assert all(torch.equal(given, h) for given in seen) and seen
    assert made.model.weight.grad is None


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_of_the_model_have_the_loss_scale(scale):
    made = stand()
    fd.Schedule(made, loss_scale=scale)
    h, x = double(N, I), double(N, X)
    (scale * made(h, source=x).sum()).backward()
    got = made.model.weight.grad / scale
    exact = torch.autograd.grad(F.mse_loss(made.model(x), h), made.model.weight)[0]
    close(got, exact)


def test_copies_pickles_and_state_dicts_go_on_with_the_same_bits():
    made = stand(layer(update=fd.SGD(0.1)))
    fresh = stand(layer(update=fd.SGD(0.1)))
    fresh.load_state_dict(made.state_dict())
    assert {name.split(".")[0] for name in made.state_dict()} == {"module", "model"}
    h, x = double(N, I), double(N, X)
    ends = []
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), fresh):
        optimizer = torch.optim.SGD(one.model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(h, source=x).sum().backward()
            optimizer.step()
        ends.append([p.detach() for p in one.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_a_network_without_locks_learns():
    """All layers from predicted inputs, behind a warm-up; then the true forward alone."""
    torch.manual_seed(0)
    data = clusters()
    x, y = data.train
    sizes = [data.features, 32, 32, data.classes]
    layers = []
    for i, (size, out) in enumerate(itertools.pairwise(sizes)):
        head = out == data.classes
        made = fd.FusedDNILinear(
            size,
            out,
            bias=head,
            normalization=None if head else "batch",
            activation="identity" if head else "relu",
            synthesizer=None if head else fd.LinearSynthesizer(out, 4, data.classes),
            update=fd.Adam(1e-2),
        )
        model = nn.Sequential(nn.Linear(data.features, size), nn.ReLU())
        layers.append(made if i == 0 else fd.SyntheticInput(made, model))
    network = nn.ModuleList(layers)

    def logits(x):
        h = network[0](x)
        for one in network[1:]:
            h = one(h, source=x)
        return h

    schedule = fd.Schedule(network, 20)
    optimizer = torch.optim.Adam(list(fd.ordinary_parameters(network)), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        with fd.condition_on(y):
            F.cross_entropy(logits(x), y).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    test_x, test_y = data.test
    assert float((logits(test_x).argmax(1) != test_y).float().mean()) < 0.1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_is_as_eager():
    made = stand()
    h, x = double(N, I), double(N, X)
    made(h, source=x).sum().backward()
    exact = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    torch.compile(made, backend="eager")(h, source=x).sum().backward()
    for p, grad in zip(made.parameters(), exact, strict=True):
        close(p.grad, grad)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.SyntheticInput(None, nn.Identity()), TypeError, "module must be an nn.Module"),
        (lambda: fd.SyntheticInput(nn.Identity(), F.relu), TypeError, "model must be an nn.Module"),
        (lambda: fd.SyntheticInput(layer(), layer(), "mse"), TypeError, "loss must be callable"),
        (lambda: stand()(double(N, I)), TypeError, "source must be the tensor"),
        (lambda: stand()(double(N, I + 1), source=double(N, X)), RuntimeError, r"\[6, 6\], got"),
        (lambda: stand()(double(N, I), source=double(3, X)), RuntimeError, r"\[6, 5\], got \[3, 5"),
        (
            lambda: stand(loss=lambda a, b: (a - b).square())(double(N, I), source=double(N, X)),
            RuntimeError,
            "loss must return a scalar",
        ),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_bad_input_changes_nothing():
    made = stand(layer(update=fd.SGD(0.1)))
    before = {
        name: value.clone() for name, value in made.state_dict().items() if "_extra" not in name
    }
    with pytest.raises(RuntimeError, match="model must return the shape"):
        made(double(N, I), source=double(N + 1, X))
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())
