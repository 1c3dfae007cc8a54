import pytest

from serving.cluster.messages import GatewayHeartbeat
from serving.sim.transport import Link, LinkEnd, NetworkFaults
from serving.sim.world import World


def link_with_worker(faults: NetworkFaults):
    """A link whose worker end collects (time, sender) and notes when it closed."""
    world = World(1)
    link = Link(world, faults, world.chance("link"), number=1)
    arrived, closed = [], []
    link.worker_end = LinkEnd(
        lambda message: arrived.append((world.now, message.gateway_id)),
        lambda: closed.append(world.now),
    )
    return world, link, arrived, closed


def send(link, count):
    for index in range(count):
        link.send_to_worker(GatewayHeartbeat(str(index)))


def run(world):
    while world.time.step():
        pass


def test_without_faults_everything_arrives_once():
    world, link, arrived, _ = link_with_worker(NetworkFaults())
    send(link, 50)
    run(world)
    assert sorted(int(name) for _, name in arrived) == list(range(50))


def test_messages_are_lost_repeated_and_reordered_until_faults_end():
    faults = NetworkFaults(loss=0.3, duplication=0.3, delay=(0.0, 1.0), until=10.0)
    world, link, arrived, _ = link_with_worker(faults)
    send(link, 300)
    run(world)
    names = [int(name) for _, name in arrived]
    assert len(set(names)) < 300
    assert len(names) > len(set(names))
    assert names != sorted(names)
    world.time.at(10.0, lambda: send(link, 300))
    arrived.clear()
    run(world)
    assert len({name for _, name in arrived}) == len(arrived) == 300


def test_a_severed_link_loses_what_is_on_its_way_and_its_ends_learn_it():
    world, link, arrived, closed = link_with_worker(NetworkFaults(notice=(0.5, 0.6)))
    send(link, 3)
    link.sever()
    link.sever()
    send(link, 3)
    run(world)
    assert arrived == []
    assert len(closed) == 1
    assert closed[0] == pytest.approx(0.55, abs=0.05)


def test_partition_swallows_and_stall_holds_back():
    world, link, arrived, _ = link_with_worker(NetworkFaults(delay=(0.0, 0.0)))
    link.partition(1.0)
    send(link, 2)
    world.time.at(1.5, lambda: link.stall(1.0))
    world.time.at(2.0, lambda: send(link, 1))
    run(world)
    assert arrived == [(2.5, "0")]
