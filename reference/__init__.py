"""What tests and benchmarks compare fast paths with."""
