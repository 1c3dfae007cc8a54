"""One prompt through the public endpoint, so that a newcomer sees it work."""

import http.client
import json

from serving.errors import InternalError

TIMEOUT_S = 60.0
ANSWER_TOKENS = 16


def complete_once(host: str, port: int, prompt: str) -> str:
    """The greedy completion of `prompt` by the OpenAI-compatible endpoint at host:port.

    Raises InternalError saying what came instead.
    """
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        models = _call(connection, "GET", "/v1/models", None)
        body = {
            "model": models["data"][0]["id"],
            "prompt": prompt,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        return str(_call(connection, "POST", "/v1/completions", body)["choices"][0]["text"])
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        raise InternalError(f"The self-check failed: {error!r}.") from error
    finally:
        connection.close()


def _call(
    connection: http.client.HTTPConnection, method: str, path: str, body: object
) -> dict[str, list[dict[str, object]]]:
    payload = None if body is None else json.dumps(body)
    connection.request(method, path, payload, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != http.HTTPStatus.OK:
        raise InternalError(f"The self-check failed: {path} answered {response.status}: {text}")
    answer: dict[str, list[dict[str, object]]] = json.loads(text)
    return answer
