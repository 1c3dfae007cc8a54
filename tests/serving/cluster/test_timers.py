from serving.cluster.timers import Timers


def test_due_keys_come_out_in_order_and_once():
    timers: Timers[str] = Timers()
    timers.arm("b", 2.0)
    timers.arm("a", 2.0)
    timers.arm("c", 1.0)
    assert timers.next_due() == 1.0
    assert timers.pop_due(0.5) == []
    assert timers.pop_due(2.0) == ["c", "b", "a"]
    assert timers.pop_due(9.0) == []
    assert timers.next_due() is None


def test_arming_only_makes_earlier():
    timers: Timers[str] = Timers()
    timers.arm("a", 2.0)
    timers.arm("a", 5.0)
    assert timers.next_due() == 2.0
    timers.arm("a", 1.0)
    assert timers.pop_due(1.0) == ["a"]
    assert timers.pop_due(9.0) == []


def test_disarmed_keys_do_not_come_out_and_can_be_armed_again():
    timers: Timers[str] = Timers()
    timers.arm("a", 1.0)
    timers.disarm("a")
    timers.disarm("nobody")
    assert not timers.is_armed("a")
    assert timers.next_due() is None
    timers.arm("a", 3.0)
    assert timers.is_armed("a")
    assert timers.pop_due(1.0) == []
    assert timers.pop_due(3.0) == ["a"]
