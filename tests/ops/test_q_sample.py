import pytest
import torch
from oracle import DTYPES, LAYOUTS, backends, check

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


@pytest.mark.parametrize("backend", backends("q_sample"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(backend, dtype, layout, shape, poison_empty) -> None:
    tensors = arguments(shape)
    noise = {"noise": torch.randn(shape, dtype=torch.float64)}
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": TABLE_NAMES}
    check(ops.q_sample, reference.q_sample, tensors | noise, wrt=["x_start", "noise"], **options)
    check(ops.q_sample, reference.q_sample, tensors, {"noise": STATE}, wrt=["x_start"], **options)


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
