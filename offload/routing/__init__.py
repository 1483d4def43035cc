"""Which experts are asked for, and which are worth keeping. No tensors, no devices."""
