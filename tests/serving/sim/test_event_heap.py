from serving.sim.event_heap import EventHeap


def test_actions_run_in_order_of_time_then_of_scheduling():
    heap = EventHeap()
    ran = []
    heap.at(2.0, lambda: ran.append("late"))
    heap.at(1.0, lambda: ran.append("first"))
    heap.at(1.0, lambda: ran.append("second"))
    heap.at(1.0, lambda: heap.after(0.0, lambda: ran.append("last of that time")))
    while heap.step():
        pass
    assert ran == ["first", "second", "last of that time", "late"]
    assert heap.now == 2.0
    assert heap.events_run == 5


def test_the_past_is_now():
    heap = EventHeap()
    times = []
    heap.at(5.0, lambda: heap.at(1.0, lambda: times.append(heap.now)))
    while heap.step():
        pass
    assert times == [5.0]
    assert heap.next_time() is None
