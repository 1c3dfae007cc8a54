"""The replica's thread: both loops give the same tokens, and it stops, wakes and fails cleanly."""

import itertools
import threading

import pytest

from serving.engine.core import EngineCore
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.loop import LoopPorts, ReplicaThread, run_overlapped, run_plain
from serving.engine.mailbox import Mailbox
from serving.engine.request import EngineRequest, FinishReason, SamplingParams
from serving.errors import ExecutorError
from serving.sim.modelled_executor import ModelledExecutor

PATIENCE_S = 30.0


class Client:
    """Collects what a replica publishes, and lets a test wait for it."""

    def __init__(self):
        self.changed = threading.Condition()
        self.tokens = {}
        self.ends = {}
        self.loads = []
        self.failures = []

    def publish(self, outputs, load):
        with self.changed:
            self.loads.append(load)
            for output in outputs:
                tokens = self.tokens.setdefault(output.request_id, [])
                assert output.start_index == len(tokens)
                tokens.extend(output.tokens)
                if output.finish is not None:
                    self.ends[output.request_id] = output.finish
            self.changed.notify_all()

    def fail(self, reason):
        with self.changed:
            self.failures.append(reason)
            self.changed.notify_all()

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), PATIENCE_S)


@pytest.fixture
def make_ports(make_driver):
    def make(client, **config):
        parts = make_driver(config=config)
        executor = ModelledExecutor(parts.limits, eos_token_ids=(7,), eos_every=20)
        core = EngineCore(parts.limits, parts.core.config)
        ticks = itertools.count()
        return LoopPorts(core, executor, client.publish, lambda: float(next(ticks)))

    return make


def requests(make_prompt, count):
    for index in range(count):
        sampling = SamplingParams(temperature=0.0, max_tokens=5 + index)
        yield EngineRequest(f"r{index}", 1, tuple(make_prompt(4 + index, index)), sampling)


@pytest.mark.parametrize("steps", [1, 4])
def test_overlapped_equals_plain(make_ports, make_prompt, steps):
    results = []
    for run, depth in ((run_plain, 1), (run_overlapped, 2)):
        client, mailbox = Client(), Mailbox()
        ports = make_ports(client, pipeline_depth=depth, decode_steps=steps)

        def publish(outputs, load, client=client, mailbox=mailbox):
            client.publish(outputs, load)
            if len(client.ends) == 20:
                mailbox.close()

        ports = LoopPorts(ports.core, ports.executor, publish, ports.clock)
        for request in requests(make_prompt, 20):
            mailbox.put(AddRequest(request))
        run(ports, mailbox)
        assert ports.executor.violations == []
        results.append((client.tokens, client.ends))
    assert results[0] == results[1]


@pytest.mark.parametrize(("depth", "steps"), [(1, 1), (2, 1), (2, 4)])
def test_a_thread_serves_wakes_up_and_stops(make_ports, make_prompt, depth, steps):
    client = Client()
    ports = make_ports(client, pipeline_depth=depth, decode_steps=steps)
    replica = ReplicaThread(ports, client.fail)
    replica.start()
    for request in requests(make_prompt, 10):
        replica.post(AddRequest(request))
        if request.request_id == "r4":
            client.wait(lambda c: len(c.ends) == 5)  # idle, then woken by the next
    client.wait(lambda c: len(c.ends) == 10)
    for request in requests(make_prompt, 10):
        count = request.sampling.max_tokens
        function = ports.executor.function
        expected = function.reference_tokens(request.prompt, count, request.sampling)
        assert client.tokens[request.request_id] == list(expected)
    replica.stop()
    assert replica.join(PATIENCE_S)
    assert client.failures == []
    assert client.loads[-1].running == 0


def test_a_cancellation_reaches_a_running_request(make_ports):
    client = Client()
    ports = make_ports(client, pipeline_depth=2)
    replica = ReplicaThread(ports, client.fail)
    replica.start()
    sampling = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    # Each is cancelled as soon as it is posted, wherever it is by then.
    for index in range(20):
        replica.post(AddRequest(EngineRequest(f"r{index}", 1, (9, 10, 11), sampling)))
        replica.post(CancelRequest(f"r{index}", 1))
    client.wait(lambda c: len(c.ends) == 20)
    assert FinishReason.CANCELLED in client.ends.values()
    replica.stop()
    assert replica.join(PATIENCE_S)


def test_a_failed_executor_ends_the_thread_with_a_reason(make_ports):
    client = Client()
    ports = make_ports(client)
    ports.executor.fail("the device is gone")
    replica = ReplicaThread(ports, client.fail)
    replica.start()
    replica.post(AddRequest(EngineRequest("a", 1, (9, 10), SamplingParams())))
    client.wait(lambda c: c.failures)
    assert client.failures == ["the device is gone"]
    assert replica.join(PATIENCE_S)
    replica.post(AddRequest(EngineRequest("b", 1, (9, 10), SamplingParams())))  # nobody is there
    assert client.ends == {}


def test_a_fault_in_the_loop_is_reported_as_well(make_ports):
    client = Client()
    ports = make_ports(client)

    def broken(_outputs, _load):
        raise ValueError("the pipe broke")

    ports = LoopPorts(ports.core, ports.executor, broken, ports.clock)
    replica = ReplicaThread(ports, client.fail)
    replica.start()
    replica.post(AddRequest(EngineRequest("a", 1, (9, 10), SamplingParams())))
    client.wait(lambda c: c.failures)
    assert client.failures == ["the pipe broke"]
    assert replica.join(PATIENCE_S)


def test_plain_loop_raises_what_the_executor_reports(make_ports):
    client, mailbox = Client(), Mailbox()
    ports = make_ports(client)
    ports.executor.fail("out of memory")
    mailbox.put(AddRequest(EngineRequest("a", 1, (9, 10), SamplingParams())))
    with pytest.raises(ExecutorError, match="out of memory"):
        run_plain(ports, mailbox)


def test_a_mailbox_keeps_order_and_closes(make_prompt):
    mailbox = Mailbox()
    assert mailbox.receive(wait=False) == []
    events = [CancelRequest(f"r{index}", 1) for index in range(3)]
    for event in events:
        mailbox.put(event)
    assert mailbox.receive(wait=True) == events
    mailbox.put(events[0])
    mailbox.close()
    assert mailbox.receive(wait=True) is None
    mailbox.put(events[0])
    assert mailbox.receive(wait=False) is None
