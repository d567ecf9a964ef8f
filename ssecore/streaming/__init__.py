"""Streams: generators and the sender."""
