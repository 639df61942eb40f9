"""kvstore measured against the limits of the machine it runs on: ``python -m bench``.

Not part of the wheel. Every measurement runs beside its limit, in the same run, in turns;
the target it is held to is the one of the project's table and lives next to it in the code.
"""
