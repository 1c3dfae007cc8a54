from serving.launch.restart import (
    LONGEST_DELAY_S,
    MAX_FAILED_STARTS,
    STABLE_AFTER_S,
    GiveUp,
    Restart,
    RestartPolicy,
)


def test_a_child_that_never_gets_ready_is_given_up():
    policy = RestartPolicy("worker")
    for _ in range(MAX_FAILED_STARTS - 1):
        assert isinstance(policy.died(0.0, "exit status 1", hopeless=False), Restart)
    last = policy.died(0.0, "exit status 1", hopeless=False)
    assert isinstance(last, GiveUp)
    assert "worker" in last.reason
    assert "exit status 1" in last.reason


def test_a_hopeless_child_is_given_up_at_once():
    assert isinstance(RestartPolicy("worker").died(0.0, "exit status 2", hopeless=True), GiveUp)


def test_delays_double_up_to_a_limit_and_a_ready_child_is_never_given_up():
    policy = RestartPolicy("worker")
    delays = []
    for death in range(20):
        policy.ready(float(death))
        decision = policy.died(float(death), "signal SIGKILL", hopeless=False)
        assert isinstance(decision, Restart)
        delays.append(decision.after_s)
    assert delays[1] == 2 * delays[0]
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S


def test_a_stable_child_starts_over_with_the_shortest_delay():
    policy = RestartPolicy("worker")
    policy.ready(0.0)
    first = policy.died(1.0, "signal SIGKILL", hopeless=False)
    policy.ready(2.0)
    policy.died(3.0, "signal SIGKILL", hopeless=False)
    policy.ready(4.0)
    assert policy.died(4.0 + STABLE_AFTER_S, "signal SIGKILL", hopeless=False) == first


def test_a_ready_child_forgets_its_failed_starts():
    policy = RestartPolicy("worker")
    for _ in range(5):
        for _ in range(MAX_FAILED_STARTS - 1):
            assert isinstance(policy.died(0.0, "exit status 1", hopeless=False), Restart)
        policy.ready(0.0)
        policy.died(0.0, "signal SIGKILL", hopeless=False)
