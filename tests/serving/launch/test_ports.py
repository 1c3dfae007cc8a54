import socket

import pytest

from serving.errors import ConfigurationError
from serving.launch.ports import reserve_port


def test_a_free_port_is_found_and_can_be_bound():
    port = reserve_port("127.0.0.1", 0, "http_port")
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("option", [None, socket.SO_REUSEPORT])
def test_a_port_in_use_is_named_with_its_flag(option):
    with socket.socket() as other:
        if option is not None:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"Port {port} .*--http_port"):
            reserve_port("127.0.0.1", port, "http_port")


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1.*--host"):
        reserve_port("192.0.2.1", 0, "http_port")
