"""Repeating an interrupted forward pass: counters start again, models with inner state refuse."""

from types import SimpleNamespace

import pytest

from actors.errors import StepInterrupted


class Client:
    """Counts what the runner asks of an experts' client."""

    def __init__(self):
        self.steps = []
        self.waits = []

    def begin_step(self, lanes):
        self.steps.append(lanes)

    def await_change(self, interrupted):
        self.waits.append(str(interrupted))


def run_step(failures: int, hybrid: bool, inner_state: bool):
    """A forward pass that is interrupted some times: (result or error, steps, waits, counters)."""
    from vllm.forward_context import get_forward_context, override_forward_context

    from actors.runner import LaneRunner

    runner, client, counters = LaneRunner(), Client(), []
    runner.model_config = SimpleNamespace(is_hybrid=hybrid, has_inner_state=inner_state)

    def forward():
        context = get_forward_context()
        counters.append(context.moe_layer_index)
        context.moe_layer_index += 3
        if len(counters) <= failures:
            raise StepInterrupted(f"failure {len(counters)}")
        return "done"

    with override_forward_context(SimpleNamespace(moe_layer_index=0)):
        try:
            result = runner._until_finished(client, None, forward)
        except StepInterrupted as error:
            result = str(error)
    return result, client.steps, client.waits, counters


@pytest.mark.timeout(300)
def test_a_pass_runs_until_it_is_not_interrupted(vllm_process):
    assert vllm_process(run_step, 0, False, False) == ("done", [1], [], [0])
    result = vllm_process(run_step, 2, False, False)
    assert result == ("done", [1, 1, 1], ["failure 1", "failure 2"], [0, 0, 0])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("hybrid", "inner_state"), [(True, False), (False, True)])
def test_a_model_with_inner_state_is_not_repeated(vllm_process, hybrid, inner_state):
    assert vllm_process(run_step, 1, hybrid, inner_state) == ("failure 1", [1], [], [0])
