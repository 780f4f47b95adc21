"""Benchmarks of serving: traffic, its way through an engine or an endpoint, and statistics of what came back."""
