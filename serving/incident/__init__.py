"""Event logs of cores: recorded by a live run, executed again anywhere, to the same effects.

A core is a state machine: what it was made from and the events with their times are all that it
ever knew. `recorder` writes them down while a shell runs, `replay` makes the core anew and compares
what it answers.
"""
