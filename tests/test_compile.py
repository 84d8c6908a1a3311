"""torch.compile, torch.export and the rest of PyTorch's machinery around the ops."""

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_fast import Diffusion, UNet, Upsample, generate_linear_schedule, ops
from ddpm_fast.models.layers import AttentionBlock, ResidualBlock
from ddpm_fast.ops import _group_norm

NODES = torch.ops.ddpm_fast
SEED, DRAW = torch.tensor(5), torch.tensor(3)
SMALL = {"channel_mults": (1,), "attention_resolutions": ()}  # for the inductor, which compiles for long
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for the inductor"
)
X, Y, T = (
    torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 2]),
    torch.tensor([3, 7]),
)


def unet(**options: Any) -> UNet:
    torch.manual_seed(0)
    defaults = {"channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (1,), "dropout": 0.2}
    fixed = {"time_emb_dim": 8, "num_classes": 3, "num_groups": 4, "activation": nn.functional.silu}
    return UNet(1, 8, **fixed | defaults | options)


def diffusion(seed: int | None = 1, **options: Any) -> Diffusion:
    return Diffusion(unet(**options), (8, 8), 1, 3, generate_linear_schedule(12, 1e-2, 0.3), seed=seed)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


SAMPLES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "attention": [((leaf(2, 5, 4), leaf(2, 5, 4) + 1, leaf(2, 5, 4) - 1), {})],
    "q_sample": [((leaf(2, 3, 4), T - 3, leaf(5), leaf(5), leaf(2, 3, 4)), {})],
    "diffusion_loss": [
        ((leaf(2, 3, 4), leaf(2, 3, 4)), {}),
        (
            (leaf(2, 3, 4), leaf(2, 3, 4)),
            {"loss_type": "l1", "noise_coef": leaf(2), "x_coef": leaf(2), "x_start": leaf(2, 3, 4)},
        ),
        ((leaf(2, 3, 4), leaf(2, 3, 4)), {"loss_type": "huber", "reduction": "none"}),
    ],
    "sampler_step": [
        ((leaf(2, 3, 4), leaf(2, 3, 4), leaf(5, 8), torch.tensor(2)), {}),
        (
            (leaf(2, 3, 4), leaf(2, 3, 4), leaf(5, 9), torch.tensor(2)),
            {"noise": leaf(2, 3, 4), "hist": leaf(2, 3, 4), "variance": leaf(2, 3, 4), "clip": 1.0},
        ),
    ],
    "noise": [(((2, 3, 4), SEED, DRAW, 1, ops.PERTURB), {"dtype": torch.bfloat16})],
    "timesteps": [((4, 1000, SEED, DRAW, 1, 2), {})],
    "dropout_mask": [(((2, 4, 3, 3), 0.2, SEED, DRAW, 1, ops.DROPOUT), {})],
    "timestep_embedding": [((T, 8, 1.0), {})],
    "ema_update": [(([torch.randn(3, 2), torch.randn(5)], [torch.randn(3, 2), torch.randn(5)], 0.9), {})],
    "group_norm_silu": [
        ((leaf(2, 8, 3, 5), leaf(8), leaf(8), 4), {}),
        (
            (leaf(2, 8, 3, 5).detach().to(memory_format=torch.channels_last).requires_grad_(), None, None, 6),
            {"x2": leaf(2, 4, 3, 5), "add": leaf(2, 12), "residual": leaf(2, 8, 3, 5), "scale": leaf(2, 12)},
        ),
        ((leaf(2, 8, 3, 5), leaf(8), leaf(8), 4), {"mask": torch.ones(2, 8, 3, 5), "activation": "mish"}),
    ],
    "residual_sum": [
        ((leaf(2, 4, 5, 3), leaf(2, 4, 5, 3)), {}),
        ((leaf(2, 4, 5, 3).detach().bfloat16().requires_grad_(), leaf(2, 4, 5, 3), leaf(4)), {}),
    ],
    "conv3x3": [
        ((leaf(2, 4, 5, 3), leaf(6, 4, 3, 3), leaf(6)), {}),
        (
            (leaf(2, 4, 5, 3), leaf(6, 7, 3, 3)),
            {"x2": leaf(2, 3, 5, 3), "scale": leaf(2, 7), "shift": leaf(2, 7), "residual": leaf(2, 6, 5, 3)}
            | {"stats": True},
        ),
    ],
}


NATIVE = {(n, b): r for n, b, r in ops.availability()}["group_norm_silu", "native"] is None
NORM = "group_norm_silu_native" if NATIVE else "group_norm_silu"  # without a native module one that compilers look into
if NATIVE:
    images = [
        leaf(*s).detach().to(memory_format=torch.channels_last).requires_grad_() for s in ((2, 8, 3, 5), (2, 4, 3, 5))
    ]
    rest = (4, 1e-5, "silu")
    SAMPLES["group_norm_silu_native"] = [
        ((images[0], None, None, leaf(8), leaf(8), None, None, None, *rest, 0.0, 0, 0, None, None), {}),
        (
            (
                *images,
                leaf(2, 8, 3, 5),
                None,
                None,
                leaf(12),
                leaf(2, 12),
                None,
                *rest,
                0.2,
                1,
                ops.DROPOUT,
                SEED,
                DRAW,
            ),
            {},
        ),
    ]


def test_every_op_is_a_node() -> None:
    assert set(ops.OPS) <= set(SAMPLES)


@pytest.mark.parametrize(("name", "args", "kwargs"), [(n, a, k) for n, calls in SAMPLES.items() for a, k in calls])
def test_opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.library.opcheck(getattr(NODES, name).default, args, kwargs)


class Recorder:
    """A compiler that keeps what it was given to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph

    def nodes(self) -> Counter[str]:
        """How often each function stands in the last graph, ours under their own names."""
        calls = [n for n in self.graphs[-1].graph.nodes if n.op.startswith("call")]
        return Counter(str(n.target).removeprefix("ddpm_fast.").removesuffix(".default") for n in calls)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def norms_of(net: UNet) -> int:
    """How many norms there are: two in a residual block, one in an attention block and one at the end."""
    kinds = Counter(type(m) for m in net.modules())
    return 2 * kinds[ResidualBlock] + kinds[AttentionBlock] + 1


def test_the_graph_of_a_unet_holds_the_ops() -> None:
    net, recorder = unet(dropout=0.0), Recorder()
    out = torch.compile(net, fullgraph=True, backend=recorder)(X, T, Y)
    assert torch.allclose(out, net(X, T, Y), atol=1e-5)  # the embedding's node is the reference, eager it is native
    nodes = recorder.nodes()
    blocks, ups = (sum(isinstance(m, kind) for m in net.modules()) for kind in (ResidualBlock, Upsample))
    assert (nodes["conv3x3"], nodes[NORM], nodes["timestep_embedding"]) == (2 * blocks + ups, norms_of(net), 1)
    assert not [name for name in nodes if "group_norm" in name and name != NORM]


def test_the_graph_of_a_forward_holds_the_ops() -> None:
    ours, recorder = diffusion(seed=1), Recorder()
    torch.compile(ours, fullgraph=True, backend=recorder)(X, Y)
    nodes = recorder.nodes()
    blocks = [m for m in ours.model.modules() if isinstance(m, ResidualBlock)]
    expected = {"timesteps": 1, "noise": 2, "q_sample": 1, "diffusion_loss": 1}
    expected["dropout_mask"] = 0 if NATIVE else len(blocks)  # the norm draws it
    assert {name: nodes[name] for name in expected} == expected


def test_a_compiled_loss_weighted_by_timesteps() -> None:
    def run(model_out: Tensor, weight: Tensor) -> Tensor:
        losses = ops.diffusion_loss(model_out, X, loss_type="huber", reduction="none")
        return (weight * losses).mean()

    weight, results = torch.tensor([0.2, 3.0]), []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        model_out = (3 * X).requires_grad_()
        loss = function(model_out, weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, model_out)))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(*results, strict=True))


def test_a_graph_dispatches_noise_when_it_runs() -> None:
    """A graph that had taken the reference while it was traced would run under any forced backend."""

    def draw(seed: Tensor, draw: Tensor) -> Tensor:
        return ops.noise((2, 3, 4), ops.NoiseState(seed, draw), ops.PERTURB)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    expected = draw(SEED, DRAW)
    for backend in [b for name, b, reason in ops.availability() if name == "noise" and reason is None]:
        with ops.use_backend(backend):
            assert torch.equal(compiled(SEED, DRAW), expected)
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="the forced backend 'cuda' can't run"):
        compiled(SEED, DRAW)


@pytest.mark.skipif(not NATIVE, reason="the native module is not built here")
def test_a_compiled_unet_runs_the_native_norm_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        run = getattr(_group_norm, name)

        def count(*args: Any) -> Any:
            calls[name] += 1
            return run(*args)

        return count

    for name in ("forward", "backward"):
        monkeypatch.setattr(_group_norm, name, counted(name))
    net = unet(dropout=0.0)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in (1, 2):
        compiled(X, T, Y).square().sum().backward()
        assert calls == {"forward": step * norms_of(net), "backward": step * norms_of(net)}
    with ops.use_backend("reference"), pytest.raises(RuntimeError, match="compiled for native, 'reference' is forced"):
        compiled(X, T, Y)
    torch._dynamo.reset()
    with ops.use_backend("reference"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(X, T, Y)
    assert calls["forward"] == 2 * norms_of(net)


@pytest.mark.parametrize(
    ("backend", "seed", "options"),
    [
        ("aot_eager", 1, {}),
        ("aot_eager", None, {}),
        pytest.param("inductor", 1, SMALL, marks=needs_compiler),
    ],
)
def test_a_compiled_forward_trains_as_an_eager_one(backend: str, seed: int | None, options: dict[str, Any]) -> None:
    ours, eager = diffusion(seed=seed, **options), diffusion(seed=seed, **options)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for _ in range(3):
        losses = []
        for run in (compiled, eager):
            loss = run(X, Y)
            loss.backward()
            losses.append(loss.detach())
            eager.seed = ours.seed  # where the first one drew it
        assert torch.allclose(*losses, rtol=1e-5)
        for p, q in zip(ours.model.parameters(), eager.model.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    assert ours.calls == eager.calls == 3


@needs_compiler
def test_compiled_upsampling_keeps_its_gradients_in_bf16() -> None:
    net = unet(num_res_blocks=0, channel_mults=(1, 1), attention_resolutions=(), time_emb_dim=None, dropout=0.0)

    def gradients(run: Callable[..., Tensor], x: Tensor, bf16: bool) -> Tensor:
        net.to(x.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(x, T, Y).float().square().sum()
        found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found]).double()

    truth = gradients(net, X.double(), bf16=False)
    eager = gradients(net, X, bf16=True)
    compiled = gradients(torch.compile(net, fullgraph=True), X, bf16=True)
    allowed = 3 * (eager - truth).norm() + torch.finfo(torch.bfloat16).eps * truth.norm()
    assert (compiled - truth).norm() < allowed


def test_compiled_models_draw_seeds_of_their_own() -> None:
    seeds = []
    for _ in range(2):
        d = diffusion(seed=None)
        torch.compile(d, fullgraph=True, backend="aot_eager")(X, Y)
        seeds.append(d.seed)
    torch.manual_seed(0)
    other = diffusion(seed=None)
    torch.manual_seed(0)
    assert seeds[0] == seeds[1] is not None  # `unet` seeds torch's generator alike
    torch.manual_seed(5)
    torch.compile(other, fullgraph=True, backend="aot_eager")(X, Y)
    assert other.seed not in (None, seeds[0])


def test_a_compiled_forward_is_not_compiled_anew_at_each_step() -> None:
    recorder = Recorder()
    compiled = torch.compile(diffusion(seed=1), fullgraph=True, backend=recorder)
    losses = {float(compiled(X, Y).detach()) for _ in range(4)}
    assert len(recorder.graphs) == 1 and len(losses) == 4


def test_dynamic_shapes() -> None:
    compiled = torch.compile(
        lambda x: ops.group_norm_silu(x, None, None, 2), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (2, 3, 5):
        x = torch.randn(n, 8, 4, 4)
        assert torch.allclose(compiled(x), ops.group_norm_silu(x, None, None, 2), atol=1e-6)


def test_export() -> None:
    net = unet(dropout=0.0).eval()
    program = torch.export.export(net, (X, T, Y))
    assert torch.allclose(program.module()(X, T, Y), net(X, T, Y), atol=1e-6)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"ddpm_fast.group_norm_silu.default", "ddpm_fast.conv3x3.default"} <= targets
    lowered = {str(n.target) for n in program.run_decompositions().graph.nodes if n.op == "call_function"}
    assert not [name for name in lowered if name.startswith("ddpm_fast")]  # runs where there is no ddpm_fast


def test_second_derivatives() -> None:
    """On the reference, also through a UNet whose attention is made of products."""
    x, w, b = (leaf(2, 4, 3, 3).double(), leaf(4).double(), leaf(4).double())
    torch.autograd.gradgradcheck(lambda *a: ops.group_norm_silu(*a, 2), (x, w, b))
    net, inner = unet().double().eval(), X.double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (g,) = torch.autograd.grad(net(inner, T, Y).square().sum(), inner, create_graph=True)
        g.square().sum().backward()
    assert inner.grad is not None and inner.grad.abs().max() > 0


def test_deterministic_algorithms() -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            d = diffusion(seed=1)
            d(X, Y).backward()
            results.append([p.grad for p in d.model.parameters()] + [d.sample(2, "cpu", Y, use_ema=False, seed=1)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
