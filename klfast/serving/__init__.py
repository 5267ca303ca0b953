"""A server of text: one engine that writes many answers at once, behind OpenAI's HTTP interface."""
