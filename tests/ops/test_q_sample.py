import pytest
import torch
from oracle import LAYOUTS, check, laid_out, typed_backends

from ddpm_fast import ops
from ddpm_fast.ops import PERTURB, NoiseState
from ddpm_fast.reference import q_sample as reference
from ddpm_fast.schedules import generate_linear_schedule, tables

TABLES = tables(generate_linear_schedule(50, 1e-3, 0.3))
SIGNAL, SIGMA = (torch.from_numpy(TABLES[name]) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
STATE = NoiseState.at(1, 2, 3)

# one element; odd sizes; a vector register and one more; a vector (1-D data); a batch of none
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (2, 1, 13, 5), (4, 6), (0, 3, 4, 4)]


def arguments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        "x_start": torch.randn(shape, dtype=torch.float64),
        "t": torch.randint(0, 50, shape[:1]),
        "sqrt_alphas_cumprod": SIGNAL,
        "sqrt_one_minus_alphas_cumprod": SIGMA,
    }


TABLE_NAMES = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


@pytest.mark.parametrize(("backend", "dtype"), typed_backends("q_sample"), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    tensors = arguments(shape)
    noise = {"noise": torch.randn(shape, dtype=torch.float64)}
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": TABLE_NAMES}
    wrt = ["x_start", "noise"] if backend == "reference" else []  # kernels have no gradient
    check(ops.q_sample, reference.q_sample, tensors | noise, wrt=wrt, **options)
    check(ops.q_sample, reference.q_sample, tensors, {"noise": STATE}, wrt=wrt[:1], **options)


def test_formula() -> None:
    """Equation 4 of Ho et al., written out for one pixel at a time."""
    a = arguments((3, 2, 2, 2))
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    x_t = ops.q_sample(**a, noise=z)
    for n, t in enumerate(a["t"].tolist()):
        abar = TABLES["alphas_cumprod"][t]
        expected = abar**0.5 * a["x_start"][n] + (1 - abar) ** 0.5 * z[n]
        assert torch.allclose(x_t[n], expected, rtol=1e-14, atol=1e-14)


def test_state_draws_the_perturb_stream() -> None:
    a = arguments((3, 2, 5, 5))
    z = ops.noise((3, 2, 5, 5), STATE, PERTURB, dtype=torch.float64)
    assert torch.equal(ops.q_sample(**a, noise=STATE), ops.q_sample(**a, noise=z))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", ["tensor", "drawn"])
def test_float32_has_the_bits_of_the_reference(noise: str, layout: str) -> None:
    """Also across pieces of a sample, for what is not finite, and with each operand in a layout of its own."""
    shape = (3, 3, 29, 23)
    a = {k: v.float() if v.is_floating_point() else v for k, v in arguments(shape).items()}
    a["x_start"].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    a["x_start"] = laid_out(a["x_start"], layout)
    z = STATE if noise == "drawn" else torch.randn(shape).transpose(2, 3).contiguous().transpose(2, 3)
    drawn = ops.noise(shape, STATE, PERTURB) if noise == "drawn" else z
    expected = reference.q_sample(**a, noise=drawn)
    got = ops.q_sample(**a, noise=z)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)) and got.isnan().sum() == 1
    wide = ops.q_sample(**a | {"x_start": a["x_start"].bfloat16()}, noise=z)
    assert torch.equal(
        wide.nan_to_num(7.0),
        reference.q_sample(**a | {"x_start": a["x_start"].bfloat16()}, noise=drawn).nan_to_num(7.0),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"x_start": torch.randn(2, 3, 4, 4).half()},
        {"x_start": torch.randn(2, 3, 4, 4).double()},
        {"noise": torch.randn(2, 3, 4, 4).double()},
        {"sqrt_alphas_cumprod": SIGNAL.double()},
        {"x_start": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"noise": torch.randn(2, 3, 4, 4).requires_grad_()},
        {"sqrt_one_minus_alphas_cumprod": SIGMA.float().requires_grad_()},
        {"x_start": torch.complex(*torch.randn(2, 2, 3, 4, 4)).conj().imag},
        {"x_start": torch.randn(2, *[1] * 8), "noise": torch.randn(2, *[1] * 8)},
    ],
    ids=str,
)
def test_what_no_kernel_takes_goes_to_the_reference(change: dict[str, torch.Tensor]) -> None:
    a = {"x_start": torch.randn(2, 3, 4, 4), "t": torch.tensor([0, 49]), "noise": torch.randn(2, 3, 4, 4)}
    a |= {"sqrt_alphas_cumprod": SIGNAL.float(), "sqrt_one_minus_alphas_cumprod": SIGMA.float()} | change
    wrt = [v for v in a.values() if v.requires_grad]
    got, expected = ops.q_sample(**a), reference.q_sample(**a)
    assert torch.equal(got, expected) and got.dtype == expected.dtype
    if wrt:
        cotangent = torch.randn(got.shape)
        assert torch.equal(*(torch.autograd.grad(out, wrt, cotangent)[0] for out in (got, expected)))
        with torch.no_grad():
            assert torch.equal(ops.q_sample(**a), expected)


X = torch.zeros(2, 3, 4, 4)
T = torch.zeros(2, dtype=torch.int64)
S = torch.ones(50)


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((X.long(), T, S, S, X), TypeError, "x_start must be a floating"),
        ((X, T.float(), S, S, X), TypeError, "t must have dtype"),
        ((X, T[:1], S, S, X), ValueError, r"t must have shape \[2\]"),
        ((X, T + 50, S, S, X), ValueError, r"t must lie in \[0, 50\)"),
        ((X, T - 1, S, S, X), ValueError, r"t must lie in \[0, 50\)"),
        ((X, T, S[None], S, X), ValueError, "sqrt_alphas_cumprod must have 1 dim"),
        ((X, T, S, S[1:], X), ValueError, "sqrt_one_minus_alphas_cumprod must have shape"),
        ((X, T, S, S, X[:1]), ValueError, "noise must have shape"),
        ((X, T, S, S, None), TypeError, "noise must be a tensor"),
        ((X.to("meta"), T.to("meta"), S, S, X), ValueError, "must be on meta"),
    ],
)
def test_bad_input(args, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.q_sample(*args)
