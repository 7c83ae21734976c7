"""The command line: parse, call one function of the same verb, print."""
