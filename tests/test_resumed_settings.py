"""A resumed run's own settings win over the checkpoint's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from sapo_trl.resumed_settings import optimizer_settings, restore_settings


def optimizer(rate: float, **kwargs) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    groups = [{"params": [parameters[0]], "weight_decay": 0.0}, {"params": [parameters[1]]}]
    return torch.optim.AdamW(groups, lr=rate, **kwargs)


def schedule(kind: str, trained: torch.optim.Optimizer, steps: int):
    return get_scheduler(kind, trained, num_warmup_steps=2, num_training_steps=steps)


def rates(trained: torch.optim.Optimizer, scheduler, steps: int) -> list[float]:
    """The learning rate of each of so many steps."""
    seen = []
    for _ in range(steps):
        seen.append(trained.param_groups[1]["lr"])
        trained.step()
        scheduler.step()
    return seen


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.tuples(*[st.sampled_from(["linear", "cosine", "constant", "constant_with_warmup"])] * 2),
    bases=st.tuples(*[st.floats(1e-6, 1.0)] * 2),
    lengths=st.tuples(*[st.integers(12, 20)] * 2),
    step=st.integers(1, 11),
)
def test_the_rates_are_those_of_a_run_that_had_these_settings_from_the_start(kinds, bases, lengths, step):
    before = optimizer(bases[0])
    scheduler_before = schedule(kinds[0], before, lengths[0])
    rates(before, scheduler_before, step)

    resumed = optimizer(bases[1])
    scheduler = schedule(kinds[1], resumed, lengths[1])
    own = optimizer_settings(resumed)
    resumed.load_state_dict(before.state_dict())
    scheduler.load_state_dict(scheduler_before.state_dict())
    restore_settings("policy", resumed, scheduler, own)

    fresh = optimizer(bases[1])
    expected = rates(fresh, schedule(kinds[1], fresh, lengths[1]), lengths[1])
    assert rates(resumed, scheduler, lengths[1] - step) == expected[step:]


def resumed_with(caplog, before: dict, after: dict) -> torch.optim.Optimizer:
    saved, trained = optimizer(**before), optimizer(**after)
    schedules = [schedule("linear", one, 10) for one in (saved, trained)]
    rates(saved, schedules[0], 3)
    own = optimizer_settings(trained)
    trained.load_state_dict(saved.state_dict())
    schedules[1].load_state_dict(schedules[0].state_dict())
    restore_settings("critic", trained, schedules[1], own)
    return trained


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rate": 0.2}, "learning rate 0.1 → 0.2"),
        ({"weight_decay": 0.5}, "weight decay 0.25 → 0.5"),
        ({"betas": (0.8, 0.9)}, "betas (0.9, 0.999) → (0.8, 0.9)"),
        ({"eps": 1e-6}, "epsilon 1e-08 → 1e-06"),
    ],
)
def test_each_change_is_applied_and_said(changed, said, caplog):
    before = {"rate": 0.1, "weight_decay": 0.25, "betas": (0.9, 0.999), "eps": 1e-8}
    trained = resumed_with(caplog, before, {**before, **changed})
    (record,) = caplog.records
    assert record.getMessage().endswith(f"The new ones apply from here on: {said}.")
    assert "the critic's optimizer" in record.getMessage()
    fresh = optimizer(**{**before, **changed})
    schedule("linear", fresh, 10)  # which notes the rate that it begins from
    for group, wanted in zip(trained.param_groups, fresh.param_groups, strict=True):
        for name in ("initial_lr", "weight_decay", "betas", "eps"):
            assert group[name] == wanted[name]
    assert trained.state  # the moments stay


def test_the_same_settings_are_not_worth_a_word(caplog):
    resumed_with(caplog, {"rate": 0.1}, {"rate": 0.1})
    assert not caplog.records


def test_a_schedule_that_depends_on_the_run_keeps_its_share(caplog):
    """What a plateau has made of the learning rate stays; the rest is as if the new rate had been set at first."""
    saved, trained = optimizer(0.1), optimizer(0.4)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    schedules = [plateau(one, factor=0.5, patience=0) for one in (saved, trained)]
    own = [optimizer_settings(one) for one in (saved, trained)][1]
    for loss in (1.0, 2.0):
        schedules[0].step(loss)
    trained.load_state_dict(saved.state_dict())
    schedules[1].load_state_dict(schedules[0].state_dict())
    restore_settings("policy", trained, schedules[1], own)
    assert [group["lr"] for group in trained.param_groups] == pytest.approx([0.2, 0.2])
