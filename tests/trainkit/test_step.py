import math

import pytest
import torch
from torch import nn

from trainkit.errors import InputError
from trainkit.optimizer import ema
from trainkit.step import MAX_SKIPPED_IN_A_ROW, TrainStep, module_gradient_norms


def make(losses_of=None, weights=None, *, amp="none", lr=0.1, clip_norm=None, average=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = TrainStep(
        model, optimizer, forward=lambda model, batch: ((losses_of or two_losses)(model, batch), {}),
        weights=weights or {"square": 1.0, "mean": 0.5}, describe=lambda batch: [f"image-{len(batch)}.png"],
        device="cpu", schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        average=ema(model, 0.9) if average else None, amp=amp, clip_norm=clip_norm,
    )  # fmt: skip
    return model, step


def two_losses(model, batch) -> dict[str, torch.Tensor]:
    output = model(batch)
    return {"square": output.square().mean(), "mean": output.mean()}


def batch(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))


def test_a_step_is_what_its_parts_are_by_hand():
    model, step = make(clip_norm=0.1, average=True)
    by_hand, _ = make()
    losses = two_losses(by_hand, batch())
    total = losses["square"] + 0.5 * losses["mean"]
    total.backward()
    norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()

    result = step([batch()])
    assert result.losses == {name: loss.item() for name, loss in losses.items()}
    assert result.total == pytest.approx(total.item())
    assert result.grad_norm == pytest.approx(norm.item()) and norm > 0.1
    assert result.lr == 0.1 and not result.skipped and step.steps == 1
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()))
    assert all(map(torch.equal, model.parameters(), step.average.module.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert step.optimizer.param_groups[0]["lr"] < 0.1


def test_metrics_are_means_over_the_micro_batches():
    _, step = make()
    recalls = iter([1.0, 2.0, 6.0])
    step.forward = lambda model, batch: (two_losses(model, batch), {"recall": torch.tensor(next(recalls))})
    assert step(list(batch(6).split(2))).metrics == {"recall": 3.0}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_reaches_the_forward_pass_and_the_weights_stay_float32(amp):
    seen = []

    def losses_of(model, inputs):
        output = model(inputs)
        seen.append(output.dtype)
        return {"square": output.float().square().mean()}

    model, step = make(losses_of, {"square": 1.0}, amp=amp)
    exact, exact_step = make(lambda m, x: {"square": m(x).square().mean()}, {"square": 1.0})
    result, expected = step([batch()]), exact_step([batch()])
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]]
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)
    torch.testing.assert_close(list(model.parameters()), list(exact.parameters()), rtol=0.02, atol=2e-3)


def overflow_if_asked(model, inputs):
    """A finite loss whose gradient is infinite where the first input is 9."""
    slope = math.inf if inputs[0, 0] == 9 else 1.0
    output = model(inputs).float()
    output.register_hook(lambda gradient: gradient * slope)
    return {"square": output.square().mean()}


def test_an_fp16_overflow_is_skipped_and_counted():
    model, step = make(overflow_if_asked, {"square": 1.0}, amp="fp16", average=True)
    before = [parameter.clone() for parameter in model.parameters()]
    bad = batch()
    bad[0, 0] = 9
    scale = step.state_dict()["scaler"]["scale"]
    result = step([bad])
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert (step.steps, step.skipped) == (0, 1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert step.schedule.last_epoch == 0 and step.average.n_averaged == 0
    assert step.state_dict()["scaler"]["scale"] == scale / 2
    assert not step([batch()]).skipped
    assert (step.steps, step.skipped, step.schedule.last_epoch, int(step.average.n_averaged)) == (1, 1, 1, 1)
    with pytest.raises(InputError, match=f"{MAX_SKIPPED_IN_A_ROW + 1} times in a row.*image-4.png"):
        for _ in range(MAX_SKIPPED_IN_A_ROW + 1):
            step([bad])


def test_without_a_scaler_a_gradient_that_is_not_finite_stops():
    _, step = make(overflow_if_asked, {"square": 1.0})
    bad = batch()
    bad[0, 0] = 9
    with pytest.raises(InputError, match=r"step 1: the losses are finite, but the gradient of 0.weight .*image-4.png"):
        step([bad])


def test_a_loss_that_is_not_finite_stops_before_the_weights_move():
    model, step = make()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match=r"step 1: square is nan, mean is nan, .* the images image-2.png\.$"):
        step([batch(4), batch(2) * math.nan])
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_losses_and_weights_must_have_the_same_names():
    with pytest.raises(InputError, match="enabled loss absent: macl"):
        make(weights={"square": 1.0, "mean": 1.0, "macl": 0.2})[1]([batch()])
    with pytest.raises(InputError, match="unknown loss: mean"):
        make(weights={"square": 1.0})[1]([batch()])


def test_weight_0_is_for_losses_that_are_switched_off():
    _, step = make(weights={"square": 1.0, "mean": 0.0, "macl": 0.0})
    _, alone = make(lambda model, x: {"square": model(x).square().mean()}, {"square": 1.0})
    result, expected = step([batch()]), alone([batch()])
    assert set(result.losses) == {"square", "mean"}
    assert (result.total, result.grad_norm) == (expected.total, expected.grad_norm)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_loss_without_a_path_to_the_parameters_may_only_be_0(value):
    def losses_of(model, x):
        return {"square": model(x).square().mean(), "macl": torch.tensor(value)}

    _, step = make(losses_of, {"square": 1.0, "macl": 1.0})
    if value:
        with pytest.raises(InputError, match="step 1: macl is not 0 but has no path to the parameters"):
            step([batch()])
    else:
        assert step([batch()]).losses["macl"] == 0.0


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_step_in_which_every_loss_is_0_is_fine(amp):
    _, step = make(lambda model, x: {"macl": torch.zeros(())}, {"macl": 1.0}, amp=amp)
    assert [step([batch()]).grad_norm for _ in range(2)] == [0.0, 0.0]
    assert step.steps == 2


def test_gradients_kept_for_a_check_are_named_by_module_and_gone_with_the_next_step():
    model, step = make()
    model[2].bias.requires_grad_(False)
    model.append(nn.Linear(2, 2))
    model[2].register_parameter("unused", nn.Parameter(torch.ones(2)))
    step.forward = lambda model, inputs: (two_losses(model[:3], inputs), {})
    result = step([batch()], keep_gradients=True)
    norms = module_gradient_norms(model, depth=1)
    assert set(norms) == {"0", "2", "3"} and norms["3"] is None
    assert math.hypot(norms["0"], norms["2"]) == pytest.approx(result.grad_norm)
    assert norms["2"] == pytest.approx(model[2].weight.grad.norm().item())
    weight = model[0].weight.detach().clone()
    rate = step.optimizer.param_groups[0]["lr"]
    second = step([batch()], keep_gradients=True)
    torch.testing.assert_close(model[0].weight, weight - rate * model[0].weight.grad)
    assert second.grad_norm < 2 * result.grad_norm


def test_counts_and_scaler_resume():
    _, step = make(overflow_if_asked, {"square": 1.0}, amp="fp16")
    bad = batch()
    bad[0, 0] = 9
    step([batch()])
    step([bad])
    _, resumed = make(overflow_if_asked, {"square": 1.0}, amp="fp16")
    resumed.load_state_dict(step.state_dict())
    assert resumed.state_dict() == step.state_dict()
    with pytest.raises(InputError, match="--amp none: the checkpoint was trained with fp16"):
        make()[1].load_state_dict(step.state_dict())


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(InputError, match="nothing would be learnt"):
        make(weights={"square": 0.0})
