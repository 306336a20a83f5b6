"""The command line: arguments in, text or JSON out. What the commands do lives in ``cluster/``."""

__version__ = "0.1.0"
