"""What the planner raises when it is given something it cannot plan with.

For input a person can mend: a malformed trace, an unknown preset, a negative coefficient. It is
not for programming errors, which stay what Python raises.
"""


class PlannerError(ValueError):
    """Says what was given, what was expected and what to do; the CLI shows it as one line."""
