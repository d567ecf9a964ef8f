"""Requests, responses, routes, authentication."""
