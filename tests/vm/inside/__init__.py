"""What the tests of tests/vm run in the machine."""
