"""``python -m bench scale``: what grows, and how far.

1 TB, packets of one row, data that arrives late, a thousand streams, readers beside a writer,
and several cores. One option sets the size of all of it. See run.py.
"""
