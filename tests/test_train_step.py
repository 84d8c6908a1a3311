"""A whole training step as one call: the weights of the lines it stands for, eagerly and recorded on a stand-in."""

import copy

import numpy as np
import pytest
import torch
from steps import adam, batch, diffusion, pair, recorded, same, script
from steps import on_reference as on_reference  # for every test here
from tape import Tape
from torch import Tensor, nn

from ddpm_fast import Diffusion, TrainStep
from ddpm_fast.graphs import WARM_UPS

OPTIONS = {
    "plain": {},
    "no clipping": {"clip": 0},
    "clip": {"clip": 0.05},
    "accumulate": {"accumulate": 2, "clip": 0.05},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_weights_of_the_script(tape: Tape, engine: str, options) -> None:
    """Bit for bit, over both ways of the average, with the same losses and gradients left behind."""
    a, optimizer, step = pair(engine=engine, **options)
    for k in range(12):
        expected = script(a, optimizer, *batch(k), **options)
        assert torch.equal(step(*batch(k)), expected), k
        same(step.diffusion, a)
        for p, q in zip(step.diffusion.model.parameters(), a.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    for ours, theirs in zip(step.optimizer.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert tape.replays == (12 - 2 * WARM_UPS if engine == "graph" else 0)
    assert tape.records == (2 if engine == "graph" else 0), "one for copies, one for averages"
    assert step.optimizer.param_groups[0]["lr"] == 2**-7 and not step.optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("recompute", ["none", "norm", "block"])
def test_sums_made_later_and_computed_again(tape: Tape, recompute: str) -> None:
    """As on a GPU: recorded as it was eager, and the same with less kept."""
    a, optimizer, step = pair(engine="graph", clip=0.05)
    a.model.fused = step.diffusion.model.fused = True
    step.diffusion.model.recompute = recompute
    for k in range(12):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k), clip=0.05)), k
    same(step.diffusion, a)
    assert tape.records == 2


def load(d: Diffusion, *_) -> None:
    d.load_state_dict(diffusion(ema_decay=0.5).state_dict(), step=20)


def reload(d: Diffusion, optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# What happens between two steps, and whether another recording is due.
BETWEEN = {
    "another rate": (lambda d, o: o.param_groups[0].update(lr=2**-5), False),
    "rate in a tensor": (lambda d, o: o.param_groups[0].update(lr=torch.tensor(2**-5)), False),
    "a call for the loss": (lambda d, o: d(*batch(50)), False),
    "another seed": (lambda d, o: setattr(d, "seed", 99), False),
    "samples": (lambda d, o: d.sample(1, "cpu", y=torch.tensor([1]), seed=1), False),
    "weights": (load, True),  # it notes that it was loaded
    "eval mode and back": (lambda d, o: d.eval().train(), False),
    "weights by assignment": (lambda d, o: d.load_state_dict(copy.deepcopy(d.state_dict()), assign=True), True),
    "the optimizer's state": (reload, True),
    "an option of the optimizer": (lambda d, o: o.param_groups[0].update(weight_decay=0.1), True),
    "a frozen layer": (lambda d, o: d.model.out_conv.requires_grad_(False), True),
    "eval mode": (lambda d, o: d.eval(), True),
    "loss": (lambda d, o: setattr(d, "loss_type", "l1"), True),
    "the average's decay": (lambda d, o: setattr(d.ema, "decay", 0.5), True),
    "a thawed layer": (lambda d, o: d.model.out_norm.requires_grad_(True), True),
    "gradients dropped": (lambda d, o: o.zero_grad(), False),
}


@pytest.mark.parametrize("change", BETWEEN)
def test_what_happens_between_steps_counts(tape: Tape, change: str) -> None:
    a, optimizer, step = recorded()
    alter, again = BETWEEN[change]
    alter(a, optimizer)
    alter(step.diffusion, step.optimizer)
    records = tape.records
    for k in range(WARM_UPS + 2):  # another recording comes after as many eager steps as the first
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
        same(step.diffusion, a)
    assert tape.records == records + again


def test_batches_of_other_shapes(tape: Tape) -> None:
    """The last one of an epoch runs eagerly, in between; gradients are those of the last step."""
    a, optimizer, step = recorded()
    for k, size in enumerate((4, 3, 4, 4, 3, 4)):
        assert torch.equal(step(*batch(k, size)), script(a, optimizer, *batch(k, size)))
        same(step.diffusion, a)
        assert torch.equal(step.diffusion.model.out_conv.weight.grad, a.model.out_conv.weight.grad)
    assert tape.records == 2


def test_an_average_every_third_step(tape: Tape) -> None:
    """Two recordings in turn, each with gradients of its own."""
    a, b = (diffusion(ema_update_rate=3, ema_start=0) for _ in range(2))
    optimizer, step = adam(a), TrainStep(b, adam(b), engine="graph")
    for k in range(16):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
        same(b, a)
        assert torch.equal(b.model.out_conv.weight.grad, a.model.out_conv.weight.grad)
    assert tape.records == 2 and tape.replays > 6


def test_rates_are_rounded_where_steps_are_recorded(tape: Tape) -> None:
    """In those before the recording, too: the weights must not depend on which of them was the last eager one."""
    a, b = (diffusion(ema_start=0) for _ in range(2))
    optimizer, step = adam(a, lr=float(np.float32(1e-2))), TrainStep(b, adam(b, lr=1e-2), engine="graph")
    for k in range(5):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
        same(b, a)
    assert tape.replays == 2 and step.optimizer.param_groups[0]["lr"] == 1e-2


def test_a_result_stays_what_it_was(tape: Tape) -> None:
    _, _, step = recorded()
    losses = [step(*batch(k)) for k in range(3)]
    assert len({float(loss) for loss in losses}) == 3


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_float16_scales_the_loss_as_gradscaler_does(tape: Tape, engine: str) -> None:
    """The first scale overflows, and is halved until it doesn't; steps that overflow change no weight."""
    a, b = diffusion(), diffusion()
    for d in (a, b):  # so that gradients overflow
        d.model.out_conv.weight.data.mul_(300)
    optimizer, step = adam(a), TrainStep(b, adam(b), dtype=torch.float16, clip=1.0, engine=engine)
    scaler = torch.amp.GradScaler("cpu")
    scales = []
    for k in range(14):
        x, y = batch(k)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = a(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(a.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        a.update_ema()
        assert torch.equal(step(x, y), loss.detach().float())
        same(b, a)
        scales.append(float(step.scale))
        assert scales[-1] == scaler.get_scale()
    assert scales[0] < 2.0**16 and scales[-1] > 0 and tape.replays == (8 if engine == "graph" else 0)


def test_a_check_can_stop_the_optimizer(tape: Tape) -> None:
    d = diffusion(ema_start=0)
    stop, told = torch.zeros(()), torch.zeros(2)

    def check(loss: Tensor, norm: Tensor) -> Tensor:
        told.copy_(torch.stack([loss, norm]))
        return stop

    step = TrainStep(d, adam(d), clip=1e-3, check=check, engine="graph")
    for k in range(5):
        loss = step(*batch(k))
        assert told[0] == loss and told[1] > 1e-3, "the norm before clipping"
    before = copy.deepcopy(d.model.state_dict())
    stop.fill_(1)
    step(*batch(9))
    assert tape.replays == 3 and all(torch.equal(v, before[name]) for name, v in d.model.state_dict().items())
    stop.fill_(0)
    step(*batch(9))
    assert not torch.equal(before["out_conv.weight"], d.model.out_conv.weight)


def test_an_observer_sees_every_step(tape: Tape) -> None:
    d, count = diffusion(), torch.zeros(())
    step = TrainStep(d, adam(d), observer=lambda t, losses: count.add_(len(t)), engine="graph")
    for k in range(5):
        step(*batch(k))
    assert count == 20 and tape.replays == 2


def test_what_the_step_itself_is_told_later_counts(tape: Tape) -> None:
    a, optimizer, step = recorded()
    step.clip = 1e-3
    for k in range(WARM_UPS + 2):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k), clip=1e-3))
    same(step.diffusion, a)
    step.optimizer, optimizer = adam(step.diffusion, lr=2**-6), adam(a, lr=2**-6)
    for k in range(WARM_UPS + 2):
        step(*batch(k))
        script(a, optimizer, *batch(k), clip=1e-3)
    same(step.diffusion, a)
    for o, d in ((optimizer, a), (step.optimizer, step.diffusion)):
        d.extra = nn.Parameter(torch.ones(3))
        o.add_param_group({"params": [d.extra], "lr": 0.5})
        d.extra.grad = torch.ones(3)
    script(a, optimizer, *batch(0), clip=1e-3)
    step(*batch(0))
    same(step.diffusion, a)


def test_a_scheduler_of_the_rate_is_followed(tape: Tape) -> None:
    a, optimizer, step = pair(engine="graph")
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, step.optimizer)]
    for k in range(9):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k)))
        same(step.diffusion, a)
        for schedule in schedules:
            schedule.step()
    assert tape.replays > 2


def test_in_the_caller_s_autocast_weights_are_cast_anew_in_each_step(tape: Tape) -> None:
    """Which autocast keeps as long as its block lasts."""
    a, optimizer, step = pair(engine="graph")
    with torch.autocast("cpu", torch.bfloat16):
        losses = [step(*batch(k)) for k in range(6)]
    expected = [script(a, optimizer, *batch(k), dtype=torch.bfloat16) for k in range(6)]
    assert all(map(torch.equal, losses, expected))
    same(step.diffusion, a)


def test_a_scale_goes_on_where_it_was() -> None:
    d = diffusion()
    step = TrainStep(d, adam(d), dtype=torch.float16)
    step.scale.fill_(8)
    for k in range(3):
        step(*batch(k))
    other = TrainStep(d, adam(d), dtype=torch.float16)
    other.load_state_dict(step.state_dict())
    assert step.state_dict() == other.state_dict() == {"scale": 8.0, "growth": 3}
    assert TrainStep(d, adam(d)).state_dict() == {}
    assert not hasattr(step.optimizer, "found_inf"), "a step of the caller's own would be left out with the last one"


OBJECTIVES = {
    "weights": {"loss_weighting": "min_snr", "timestep_sampling": "log_normal", "loss_type": "huber"},
    "their losses": {"timestep_sampling": "loss_second_moment", "num_timesteps": 3},
    "learned variance": {"learned_variance": True},
    "label dropout": {"label_dropout": 0.3},
    "noise levels": {"time_input": "noise_level"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_recorded(tape: Tape, objective: str) -> None:
    """The weights of the script, bit for bit, and what the objective remembers."""
    a = diffusion(**OBJECTIVES[objective])
    b = copy.deepcopy(a)
    optimizer, step = adam(a), TrainStep(b, adam(b), engine="graph")
    for k in range(16):
        assert torch.equal(step(*batch(k)), script(a, optimizer, *batch(k))), k
    same(b, a)
    assert tape.replays == 16 - 2 * WARM_UPS and a.extra_state() == b.extra_state()
    if objective == "their losses":
        assert int(a.timestep_sampler.seen.min()) >= 10  # so that they were gone by


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_with_an_image_condition(tape: Tape, engine: str) -> None:
    a = diffusion(cond_channels=2)
    b = copy.deepcopy(a)
    optimizer, step = adam(a), TrainStep(b, adam(b), engine=engine, accumulate=2)
    for k in range(12):
        (x, y), cond = batch(k), torch.randn(4, 2, 8, 8)
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 4)):
            (a(x[part], y[part], cond=cond[part]) / 2).backward()
        optimizer.step()
        a.update_ema()
        step(x, y, cond=cond)
        same(b, a)
    assert tape.replays == (12 - 2 * WARM_UPS if engine == "graph" else 0)
