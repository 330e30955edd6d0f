"""What a study stands on: digests, headers, columns, task definitions. The only I/O before a plan; no torch, no Ray."""
