import pytest
import torch
from oracle import LAYOUTS, backends, check, laid_out, typed_backends

from ddpm_fast import ops
from ddpm_fast.ops import PERTURB, NoiseState
from ddpm_fast.reference import diffusion_loss as reference
from ddpm_fast.reference.diffusion_loss import LOSSES

STATE = NoiseState.at(1, 2, 3)
# one element; odd sizes; a vector (1-D data); samples in several pieces
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (4, 6), (2, 3, 29, 23)]


def arguments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        "model_out": torch.randn(shape, dtype=torch.float64),
        "x_start": torch.randn(shape, dtype=torch.float64),
        "noise_coef": torch.rand(shape[0], dtype=torch.float64),
        "x_coef": torch.rand(shape[0], dtype=torch.float64),
    }


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("diffusion_loss"), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "loss_type", "reduction"),
    # All pairs; a third of them outside of CI.
    [
        pytest.param(layout, loss, "mean" if loss == "l2" else "none", marks=[pytest.mark.minutes] * (i != j))
        for i, layout in enumerate(LAYOUTS)
        for j, loss in enumerate(LOSSES)
    ],
)
def test_against_reference(backend, dtype, layout, shape, loss_type, reduction, poison_empty) -> None:
    tensors = arguments(shape)
    noise = {"noise": torch.randn(shape, dtype=torch.float64)}
    only = {"model_out": tensors["model_out"]}
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": ("noise_coef", "x_coef")}
    static = {"loss_type": loss_type, "reduction": reduction}
    for t, s in ((only | noise, static), (tensors | noise, static), (only, static | {"noise": STATE})):
        check(ops.diffusion_loss, reference.diffusion_loss, t, s, wrt=["model_out"], **options)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_formula(loss_type: str) -> None:
    a = arguments((3, 2, 4, 4))
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    d = a["model_out"] - a["noise_coef"].view(3, 1, 1, 1) * z - a["x_coef"].view(3, 1, 1, 1) * a["x_start"]
    huber = torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)
    each = {"l1": d.abs(), "l2": d**2, "huber": huber}[loss_type].sum((1, 2, 3)) / d[0].numel()
    for reduction, expected in (("mean", each.sum() / 3), ("none", each)):
        got = ops.diffusion_loss(noise=z, loss_type=loss_type, reduction=reduction, **a)
        assert got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-14)


def test_redrawn_noise_is_that_of_q_sample_also_in_half_precision() -> None:
    """The loss must not see the noise rounded to the network's dtype: x_t was made with the exact one."""
    out = torch.randn(4, 3, 8, 8).bfloat16()
    z = ops.noise((4, 3, 8, 8), STATE, PERTURB)
    loss = ops.diffusion_loss(out, STATE)
    assert loss.dtype == torch.float32
    exact = ((out.double() - z.double()) ** 2).mean()
    assert abs(loss - exact) <= torch.finfo(torch.float32).eps * exact


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_backward_draws_what_the_forward_drew(loss_type: str, backend: str) -> None:
    """Whoever counts the draws advances them in place, maybe before the backward."""
    model_out = torch.randn(2, 3, 29, 23, requires_grad=True)
    state = NoiseState.at(5, 7, 3)
    with ops.use_backend(backend):
        loss = ops.diffusion_loss(model_out, state, loss_type=loss_type)
        state.seed.add_(1)
        state.draw.add_(1)
        (got,) = torch.autograd.grad(3 * loss, model_out)
        z = ops.noise(model_out.shape, NoiseState.at(5, 7, 3), PERTURB)
    (expected,) = torch.autograd.grad(3 * reference.diffusion_loss(model_out, z, loss_type=loss_type), model_out)
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
def test_l1_has_no_gradient_where_it_is_zero(backend: str) -> None:
    z = torch.randn(2, 3, 5, 5)
    model_out = (z + torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)).requires_grad_()
    with ops.use_backend(backend):
        (got,) = torch.autograd.grad(ops.diffusion_loss(model_out, z, loss_type="l1"), model_out)
    assert torch.equal(got, torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(z.shape) / z.numel())


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
def test_huber_where_its_pieces_meet_and_far_away(backend: str) -> None:
    inf, nan = float("inf"), float("nan")
    d = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, inf, -inf, nan], requires_grad=True)
    with ops.use_backend(backend):
        losses = ops.diffusion_loss(d, torch.zeros(10), loss_type="huber", reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), d)
    assert losses.tolist()[:-1] == [2.5, 0.5, 0.125, 0, 0.125, 0.5, 2.5, inf, inf] and losses[-1].isnan()
    assert grad.tolist()[:-1] == [-1, -1, -0.5, 0, 0.5, 1, 1, 1, -1] and grad[-1].isnan()


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
def test_gradients_of_losses_may_lie_in_any_way(backend: str) -> None:
    """Those that a mean sends back are one number in memory; and gradients add up in `.grad`."""
    model_out = torch.randn(4, 3, 5, 7, requires_grad=True)
    with ops.use_backend(backend):
        losses = ops.diffusion_loss(model_out, STATE, reduction="none")
        for grad in (torch.tensor(0.3).expand(4), torch.randn(4, 3)[:, 1], torch.randn(9)[1::2]):
            (expected,) = torch.autograd.grad(losses, model_out, grad.contiguous(), retain_graph=True)
            model_out.grad = torch.ones_like(model_out)
            losses.backward(grad, retain_graph=True)
            assert torch.equal(model_out.grad, 1 + expected) and expected.any()


@pytest.mark.skipif("native" not in backends("diffusion_loss"), reason="torch's sum depends on the batch")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_an_image_has_the_same_loss_alone(loss_type: str) -> None:
    model_out, z = torch.randn(2, 3, 3, 29, 23)
    with ops.use_backend("native"):
        losses = ops.diffusion_loss(model_out, z, loss_type=loss_type, reduction="none")
        alone = [ops.diffusion_loss(m[None], n[None], loss_type=loss_type) for m, n in zip(model_out, z, strict=True)]
    assert torch.equal(losses, torch.stack(alone))


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("at", [0, -1])
def test_nan_shows_in_the_loss(at: int, loss_type: str, backend: str) -> None:
    model_out = torch.randn(2, 3, 29, 23)
    model_out.view(-1)[at] = float("nan")
    with ops.use_backend(backend):
        assert ops.diffusion_loss(model_out, STATE, loss_type=loss_type).isnan()
        losses = ops.diffusion_loss(model_out, STATE, loss_type=loss_type, reduction="none")
    assert losses.isnan().tolist() == [at == 0, at == -1]


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
@pytest.mark.parametrize(("shape", "losses"), [((0, 3, 4), 0), ((0,), 0), ((2, 0, 4), 2)], ids=str)
def test_the_mean_of_nothing(shape: tuple[int, ...], losses: int, backend: str) -> None:
    model_out = torch.zeros(shape, requires_grad=True)
    with ops.use_backend(backend):
        whole = ops.diffusion_loss(model_out, STATE)
        each = ops.diffusion_loss(model_out, STATE, reduction="none")
        (grad,) = torch.autograd.grad(whole + each.sum(), model_out)
    assert whole.shape == () and whole.isnan()
    assert each.shape == (losses,) and each.isnan().all() and grad.shape == shape


@pytest.mark.skipif("native" not in backends("diffusion_loss"), reason="the reference has them")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative_of_the_kernel(reduction: str) -> None:
    model_out = torch.randn(2, 3, 4, 4, requires_grad=True)
    with ops.use_backend("native"):
        loss = ops.diffusion_loss(model_out, STATE, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative; ops.use_backend\('reference'\) has one"):
        torch.autograd.grad(loss, model_out, create_graph=True)


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
def test_what_changed_before_the_backward_is_refused(backend: str) -> None:
    model_out, z = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    with ops.use_backend(backend):
        loss = ops.diffusion_loss(model_out, z)
        z.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.skipif("native" not in backends("diffusion_loss"), reason="torch's sum depends on the layout")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_same_numbers_have_the_same_loss_in_any_layout(loss_type: str) -> None:
    a = {k: v.float() for k, v in arguments((2, 3, 29, 23)).items()}
    with ops.use_backend("native"):
        z = ops.noise((2, 3, 29, 23), STATE, PERTURB)
        losses, grads = [], []
        for layout in LAYOUTS:
            of = {k: laid_out(v, layout) for k, v in a.items()}
            of["model_out"].requires_grad_()
            for noise in (STATE, z, laid_out(z, layout)):
                losses.append(ops.diffusion_loss(noise=noise, loss_type=loss_type, **of))
                grads.append(torch.autograd.grad(losses[-1], of["model_out"])[0])
    for each in (losses, grads):
        assert all(torch.equal(v, each[0]) for v in each)


@pytest.mark.parametrize(
    "change",
    [
        {"model_out": torch.randn(2, 3, 4, 4).half().requires_grad_()},
        {"model_out": torch.randn(2, 3, 4, 4).double().requires_grad_()},
        {"noise": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"x_start": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"x_coef": torch.randn(2).requires_grad_()},
        {"noise_coef": torch.randn(2).requires_grad_()},
        {"noise_coef": torch.randn(2).double(), "model_out": torch.randn(2, 3, 4, 4).requires_grad_()},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"loss_type": "huber", "reduction": "none"}], ids=str)
def test_what_no_kernel_takes_goes_to_the_reference(options: dict, change: dict[str, torch.Tensor]) -> None:
    a = {k: v.float() for k, v in arguments((2, 3, 4, 4)).items()} | {"noise": torch.randn(2, 3, 4, 4)} | change
    wrt = [v for v in a.values() if v.requires_grad]
    got, expected = ops.diffusion_loss(**a, **options), reference.diffusion_loss(**a, **options)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), wrt)[0] for loss in (got, expected)))


X = torch.zeros(2, 3, 4, 4)
C = torch.zeros(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), X), {}, TypeError, "model_out"),
        ((X, X[:1]), {}, ValueError, "noise must have shape"),
        ((X, X), {"loss_type": "l3"}, ValueError, "loss_type must be one of l1, l2, huber; got 'l3'"),
        ((X, X), {"reduction": "sum"}, ValueError, "reduction must be one of mean, none; got 'sum'"),
        ((X, X), {"noise_coef": C[:1]}, ValueError, "noise_coef must have shape"),
        ((X, X), {"x_coef": C}, ValueError, "x_coef and x_start go together"),
        ((X, X), {"x_coef": C, "x_start": X[:, :1]}, ValueError, "x_start must have shape"),
        ((torch.zeros(()), torch.zeros(())), {}, ValueError, "batch dimension"),
    ],
)
def test_bad_input(args, kwargs, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.diffusion_loss(*args, **kwargs)
