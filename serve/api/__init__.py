"""The bodies of requests and replies, and the runtime's options of a request."""
