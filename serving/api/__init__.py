"""gRPC and OpenAI-compatible HTTP: messages, servicers, status codes."""
