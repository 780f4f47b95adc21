"""Serving: requests, paged KV blocks, the scheduler, the runners that execute or price its steps, and the API."""
