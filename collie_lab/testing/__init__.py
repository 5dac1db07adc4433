"""Reusable conformance suites: what every implementation of an interface must satisfy. Needs no test framework."""
