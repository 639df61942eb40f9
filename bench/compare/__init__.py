"""This store beside what a user would pick instead: ``python -m bench compare``.

peers/ has one module for each store, all with the same two functions and four constants (see
peer.py). child.py runs one of them in a process of its own and measures; run.py starts the
children in turns, each peer right beside a run of this store; table.py says what came out, rows
that this store loses included.
"""
