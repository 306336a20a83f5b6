"""Order of events, and how a run ends."""

from planner.clock import Clock


def test_things_happen_in_order_of_time_and_then_of_asking():
    clock, seen = Clock(), []

    def note(subject):
        seen.append((clock.now, subject))
        if subject == "b":
            clock.at(clock.now, note, "asked last")

    for time, subject in ((2.0, "c"), (1.0, "b"), (1.0, "a")):
        clock.at(time, note, subject)
    clock.run()

    assert seen == [(1.0, "b"), (1.0, "a"), (1.0, "asked last"), (2.0, "c")]
    assert clock.idle


def test_a_run_ends_at_its_time_or_when_stopped():
    clock, seen = Clock(), []
    clock.at(1.0, seen.append, 1)
    clock.at(5.0, seen.append, 5)
    clock.run(until=3.0)
    assert (seen, clock.now) == ([1], 3.0)

    clock = Clock()
    clock.at(1.0, lambda _: clock.stop())
    clock.at(2.0, seen.append, 2)
    clock.run()
    assert (seen, clock.now) == ([1], 1.0)
    assert not clock.idle
