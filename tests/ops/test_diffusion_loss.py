import pytest
import torch
from oracle import DTYPES, LAYOUTS, backends, check

from ddpm_fast import ops
from ddpm_fast.ops import PERTURB, NoiseState
from ddpm_fast.reference import diffusion_loss as reference

STATE = NoiseState.at(1, 2, 3)
# one element; odd sizes; a vector (1-D data)
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (4, 6)]


def arguments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        "model_out": torch.randn(shape, dtype=torch.float64),
        "x_start": torch.randn(shape, dtype=torch.float64),
        "noise_coef": torch.rand(shape[0], dtype=torch.float64),
        "x_coef": torch.rand(shape[0], dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", backends("diffusion_loss"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_against_reference(backend, dtype, layout, shape, loss_type, poison_empty) -> None:
    tensors = arguments(shape)
    noise = {"noise": torch.randn(shape, dtype=torch.float64)}
    only = {"model_out": tensors["model_out"]}
    options = {"backend": backend, "dtype": dtype, "layout": layout, "keep": ("noise_coef", "x_coef")}
    static = {"loss_type": loss_type}
    for t, s in ((only | noise, static), (tensors | noise, static), (only, static | {"noise": STATE})):
        check(ops.diffusion_loss, reference.diffusion_loss, t, s, wrt=["model_out"], **options)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_formula(loss_type: str) -> None:
    a = arguments((3, 2, 4, 4))
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    d = a["model_out"] - a["noise_coef"].view(3, 1, 1, 1) * z - a["x_coef"].view(3, 1, 1, 1) * a["x_start"]
    expected = (d.abs() if loss_type == "l1" else d**2).sum() / d.numel()
    assert torch.allclose(ops.diffusion_loss(noise=z, loss_type=loss_type, **a), expected, rtol=1e-14)


def test_redrawn_noise_is_that_of_q_sample_also_in_half_precision() -> None:
    """The loss must not see the noise rounded to the network's dtype: x_t was made with the exact one."""
    out = torch.randn(4, 3, 8, 8).bfloat16()
    z = ops.noise((4, 3, 8, 8), STATE, PERTURB)
    loss = ops.diffusion_loss(out, STATE)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ((out.float() - z) ** 2).mean())


X = torch.zeros(2, 3, 4, 4)
C = torch.zeros(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((X.long(), X), {}, TypeError, "model_out"),
        ((X, X[:1]), {}, ValueError, "noise must have shape"),
        ((X, X), {"loss_type": "huber"}, ValueError, "loss_type must be one of l1, l2"),
        ((X, X), {"noise_coef": C[:1]}, ValueError, "noise_coef must have shape"),
        ((X, X), {"x_coef": C}, ValueError, "x_coef and x_start go together"),
        ((X, X), {"x_coef": C, "x_start": X[:, :1]}, ValueError, "x_start must have shape"),
        ((torch.zeros(()), torch.zeros(())), {}, ValueError, "batch dimension"),
    ],
)
def test_bad_input(args, kwargs, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.diffusion_loss(*args, **kwargs)
