"""The command line: parse, call, show. It decides nothing, and it imports torch in no module of its own."""
